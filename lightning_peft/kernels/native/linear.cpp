// Products of a frozen layer and of the low-rank adapters beside it: bf16, sums in fp32. Called by kernels/products.py, and
// for adapters of several models, each on rows of its own, by kernels/segment_changes.py.
#include <omp.h>

#include "tiles.h"

namespace {

constexpr int ROWS = 96;    // of wide matrices, which lie in the second-level cache while several products read them
constexpr int NARROW = 12;  // rows of a tile of one or two vectors

// into (rows, columns <= PANEL) = gain (x w + inner small) + bias; gain and bias (columns) may be null. With `onto` what
// is there before is added to the products. `weight` and `small` are paired, `depth` numbers a pair.
struct LowRankSum {
  Left x, inner;
  const bf16 *weight, *small, *bias;
  const float* gain;
  int in, rank, columns;
  long depth;
  bool onto;

  void run(long rows, bf16* into, long stride) const {
    for (long r = 0; r < rows; r += TILE)
      with_tile(rows - r < TILE ? rows - r : TILE, columns / LANES, [&](auto& tile) __attribute__((always_inline)) {
        tile.each(into + r * stride, stride, [&](bf16* place, int, __m512& sum) {
          sum = onto ? widened(place) : _mm512_setzero_ps();
        });
        tile.add(x.at(r, 0), {weight, depth}, in / 2);
        tile.add(inner.at(r, 0), {small, depth}, rank / 2);
        tile.each(into + r * stride, stride, [&](bf16* place, int column, __m512 sum) {
          if (gain) sum = _mm512_mul_ps(sum, _mm512_loadu_ps(gain + column));
          if (bias) sum = _mm512_add_ps(sum, widened(bias + column));
          store_rounded(place, sum);
        });
      });
  }
};

// into (rows, rank) = x (rows, width) b.
void multiply_narrow(const bf16* x, int rows, int width, Right b, int rank, bf16* into) {
  float sums[NARROW * PANEL];
  const int vectors = round_up(rank, LANES) / LANES;
  for (int r = 0; r < rows; r += NARROW) {
    int taken = min(NARROW, rows - r);
    Left left{x + (long)r * width, width, 2};
    auto run = [&](auto& tile) __attribute__((always_inline)) {
      tile.each(sums, PANEL, [](float*, int, __m512& sum) { sum = _mm512_setzero_ps(); });
      tile.template add<true>(left, b, width / 2);
      tile.each(sums, PANEL, [](float* place, int, __m512 sum) { _mm512_storeu_ps(place, sum); });
    };
    if (taken == NARROW && vectors == 1) {
      Sums<NARROW, 1> tile;
      run(tile);
    } else if (taken == NARROW && vectors == 2) {
      Sums<NARROW, 2> tile;
      run(tile);
    } else {
      for (int t = 0; t < taken; t += TILE)
        multiply(min(TILE, taken - t), vectors, left.at(t, 0), b, width / 2, sums + t * PANEL, PANEL, false);
    }
    for (int t = 0; t < taken; t++)
      for (int n = 0; n < rank; n += LANES) {
        __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + t * PANEL + n));
        _mm256_mask_storeu_epi16(into + (long)(r + t) * rank + n, lanes_of(0, rank, n), rounded);
      }
  }
}

// sums (padded, width) += small^T x, where small (rows <= ROWS, padded) is paired.
void add_transposed(const bf16* small, int padded, const bf16* x, int rows, int width, float* sums) {
  bf16 panel[ROWS * PANEL];
  for (int n = 0; n < width; n += PANEL) {
    int columns = min(PANEL, width - n);
    pair_rows(x + n, width, rows, columns, panel);
    for (int r = 0; r < padded; r += TILE) {
      Left left{small + 2 * r, 2, 2L * padded};
      float* into = sums + (long)r * width + n;
      multiply(min(TILE, padded - r), columns / LANES, left, {panel, 2L * columns}, (rows + 1) / 2, into, width, true);
    }
  }
}

// The gradients of y = ... + scaling x A^T B^T, with inner = scaling x A^T (rows, rank), from that of y, grad (rows, out):
// grad_inner = grad B (rows, rank), grad_A = scaling grad_inner^T x (kept, in) and grad_B = grad^T inner (out, kept), fp32.
// B is (out, rank), and of the rank `kept` are more than padding.
//
// x (rows, in) and grad are read from memory once; in, out are multiples of LANES, rank <= PANEL. Scratch: sums_A
// (threads, padded, in), sums_B (threads, padded, out) and B_paired (out, padded), rank padded to a multiple of LANES.
inline void factor_gradients(const bf16* grad, const bf16* x, const bf16* inner, const bf16* B, float scaling, long rows,
                             int in, int out, int rank, int kept, bf16* grad_inner, float* grad_A, float* grad_B,
                             float* sums_A, float* sums_B, bf16* B_paired, int threads) {
  const int padded = round_up(rank, LANES);
  const long size_A = (long)padded * in, size_B = (long)padded * out;
  pair_rows(B, rank, out, rank, B_paired);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), started = omp_get_num_threads();
    float *mine_A = sums_A + thread * size_A, *mine_B = sums_B + thread * size_B;
    bf16 small[ROWS * PANEL];
    memset(mine_A, 0, size_A * sizeof(float));
    memset(mine_B, 0, size_B * sizeof(float));
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r += ROWS) {
      const int n = rows - r < ROWS ? rows - r : ROWS;
      multiply_narrow(grad + r * out, n, out, {B_paired, 2L * padded}, rank, grad_inner + r * rank);
      pair_rows(inner + r * rank, rank, n, rank, small);
      add_transposed(small, padded, grad + r * out, n, out, mine_B);
      pair_rows(grad_inner + r * rank, rank, n, rank, small);
      add_transposed(small, padded, x + r * in, n, in, mine_A);
    }
#pragma omp for schedule(static)
    for (int n = 0; n < in; n += LANES)
      for (int r = 0; r < kept; r++) {
        __m512 sum = _mm512_setzero_ps();
        const long at = (long)r * in + n;
        for (int t = 0; t < started; t++) sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums_A + t * size_A + at));
        _mm512_storeu_ps(grad_A + at, _mm512_mul_ps(sum, _mm512_set1_ps(scaling)));
      }
#pragma omp for schedule(static)
    for (int n = 0; n < out; n++)
      for (int r = 0; r < kept; r++) {
        float sum = 0;
        for (int t = 0; t < started; t++) sum += sums_B[t * size_B + (long)r * out + n];
        grad_B[(long)n * kept + r] = sum;
      }
  }
}

constexpr int CHUNK = 64;  // rows of a model that a thread takes at a time, where models are fewer than threads

// The change of one model: rows from `start` to `stop`, A (rank, in) and B (out, rank) in fp32, all contiguous.
struct Change {
  const float *A, *B;
  float scaling;
  int rank, start, stop;
};

// Both factors in bf16, with zeros that make the rank even: scaling A (even, in) and B (out, even).
struct Cast {
  bf16 *A, *B;
  int even;

  Cast(const Change& change, int in, int out, bf16* room) : A(room), even(round_up(change.rank, 2)) {
    B = A + (long)even * in;
    const __m512 scaling = _mm512_set1_ps(change.scaling);
    for (int r = 0; r < even; r++)
      for (int n = 0; n < in; n += LANES) {
        const __m512 row = r < change.rank ? _mm512_loadu_ps(change.A + (long)r * in + n) : _mm512_setzero_ps();
        store_rounded(A + (long)r * in + n, _mm512_mul_ps(row, scaling));
      }
    for (int o = 0; o < out; o++)
      for (int r = 0; r < even; r += LANES) {
        const __m512 row = _mm512_maskz_loadu_ps(lanes_of(0, change.rank, r), change.B + (long)o * change.rank + r);
        _mm256_mask_storeu_epi16(B + (long)o * even + r, lanes_of(0, even, r), (__m256i)_mm512_cvtneps_pbh(row));
      }
  }

  bf16* behind(int in, int out) const { return A + (long)even * (in + out); }
};

// Calls visit(g, first, rows) for runs of rows of each change, in several threads where there are.
template <class Visit>
inline void each_part(const Change* changes, int count, int threads, Visit visit) {
  const int parts = count >= threads ? 1 : threads;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
  for (int i = 0; i < count * parts; i++) {
    const int g = i / parts, rows = changes[g].stop - changes[g].start;
    const int taken = max((rows + parts - 1) / parts, min(CHUNK, rows)), first = i % parts * taken;
    if (first < rows) visit(g, first, min(taken, rows - first));
  }
}

// output (rows, width) = inner (rows, rank) small, whose panel of columns from n on `pair(n, columns)` makes.
template <class Pair>
inline void multiply_wide(const bf16* inner, long rows, int rank, int width, long depth, bf16* panel, bf16* output, Pair pair) {
  for (int n = 0; n < width; n += PANEL) {
    LowRankSum sum = {};
    sum.columns = min(PANEL, width - n);
    pair(n, sum.columns);
    sum.inner = {inner, rank, 2};
    sum.small = panel, sum.rank = rank;
    sum.depth = depth ? depth : 2 * sum.columns;
    sum.run(rows, output + n, width);
  }
}

}  // namespace

extern "C" {

// output (rows, out) = gain (x (rows, in) w + inner (rows, rank) small) + bias; gain and bias (out) may be null. With
// `onto` what is in the output before is added to the products.
//
// `weight` is w (in, out) and `small` (rank, out) or, both `transposed`, (out, in) and (out, rank). Rows of x are
// `stride` apart, all else is contiguous; in and rank are even, out is a multiple of LANES. The rows are shared by
// `parts`, each of which pairs its panel of the weight in scratch (threads, in + rank, PANEL).
void low_rank_sum(const bf16* x, long stride, const bf16* weight, const bf16* inner, const bf16* small,
                  const float* gain, const bf16* bias, int transposed, int onto, long rows, int in, int out, int rank,
                  bf16* output, int parts, bf16* scratch, int threads) {
  const int panels = (out + PANEL - 1) / PANEL;
  const long taken = (rows + parts - 1) / parts;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int i = 0; i < panels * parts; i++) {
    const int n = i / parts * PANEL, columns = min(PANEL, out - n);
    const long first = i % parts * taken, last = first + taken < rows ? first + taken : rows;
    bf16* panel = scratch + (long)(in + rank) * PANEL * omp_get_thread_num();
    bf16* small_panel = panel + (long)in * PANEL;
    if (transposed) {
      pair_columns(weight + (long)n * in, in, columns, in, panel);
      pair_columns(small + (long)n * rank, rank, columns, rank, small_panel);
    } else {
      pair_rows(weight + n, out, in, columns, panel);
      pair_rows(small + n, out, rank, columns, small_panel);
    }
    LowRankSum sum;
    sum.x = {x + first * stride, stride, 2};
    sum.inner = {inner + first * rank, rank, 2};
    sum.weight = panel, sum.small = small_panel;
    sum.gain = gain ? gain + n : nullptr, sum.bias = bias ? bias + n : nullptr;
    sum.in = in, sum.rank = rank, sum.columns = columns;
    sum.depth = transposed ? 2 * PANEL : 2 * columns;
    sum.onto = onto;
    sum.run(last - first, output + first * out + n, out);
  }
}

// The gradients of y = ... + x A^T B^T: see `factor_gradients`, of which nothing is padding and nothing scaled.
void low_rank_gradients(const bf16* grad, const bf16* x, const bf16* inner, const bf16* B, long rows, int in, int out,
                        int rank, bf16* grad_inner, float* grad_A, float* grad_B, float* sums_A, float* sums_B,
                        bf16* B_paired, int threads) {
  factor_gradients(grad, x, inner, B, 1, rows, in, out, rank, rank, grad_inner, grad_A, grad_B, sums_A, sums_B, B_paired,
                   threads);
}

// dots (width) = the dot product of each pair of columns of left and right (rows, width), fp32. width is a multiple of
// LANES; scratch (threads, width).
void column_dots(const bf16* left, const bf16* right, long rows, int width, float* dots, float* scratch, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int started = omp_get_num_threads();
    float* mine = scratch + (long)omp_get_thread_num() * width;
    memset(mine, 0, width * sizeof(float));
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++)
      for (int n = 0; n < width; n += LANES) {
        __m512 l = widened(left + r * width + n), sum = _mm512_loadu_ps(mine + n);
        _mm512_storeu_ps(mine + n, _mm512_fmadd_ps(l, widened(right + r * width + n), sum));
      }
#pragma omp for schedule(static)
    for (int n = 0; n < width; n++) {
      dots[n] = 0;
      for (int t = 0; t < started; t++) dots[n] += scratch[(long)t * width + n];
    }
  }
}

// Of each change g: inner_g = scaling x A^T (rows, even) and the output's rows = inner_g B^T, for x (all rows, in) and output
// (all rows, out). `inner` has all inner_g behind each other, from places[g] on. in and out are multiples of LANES, ranks at
// most PANEL, and `even` is a rank rounded up to an even number. `room` has for each thread `size` bf16 numbers: see `takes`.
void segment_changes(const bf16* x, const Change* changes, const long* places, int count, int in, int out, bf16* inner,
                     bf16* output, bf16* room, long size, int threads) {
  each_part(changes, count, threads, [&](int g, int first, int rows) {
    const Cast cast(changes[g], in, out, room + size * omp_get_thread_num());
    bf16 *panel = cast.behind(in, out), *paired_A = panel + (long)PANEL * cast.even;
    bf16* own = inner + places[g] + (long)first * cast.even;
    const long row = changes[g].start + first;
    pair_columns(cast.A, in, cast.even, in, paired_A);
    multiply_narrow(x + row * in, rows, in, {paired_A, 2 * PANEL}, cast.even, own);
    multiply_wide(own, rows, cast.even, out, 2 * PANEL, panel, output + row * out, [&](int at, int columns) {
      pair_columns(cast.B + (long)at * cast.even, cast.even, columns, cast.even, panel);
    });
  });
}

// The gradients of each change from grad (all rows, out), that of its output: of A and B at grads_A[g] and grads_B[g], of
// inner, and in grad_x (all rows, in) that of its input. `sums` has for each thread padded * (in + out) fp32 numbers, padded
// the highest rank rounded up to LANES.
void segment_gradients(const bf16* grad, const bf16* x, const bf16* inner, const Change* changes, const long* places,
                       int count, int in, int out, bf16* grad_inner, float* const* grads_A, float* const* grads_B,
                       bf16* grad_x, bf16* room, long size, float* sums, int padded, int threads) {
  const int each = count >= threads ? 1 : threads;  // threads of a change
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (each == 1 && threads > 1)
  for (int g = 0; g < count; g++) {
    const Change& change = changes[g];
    const int thread = each == 1 ? omp_get_thread_num() : 0;
    const Cast cast(change, in, out, room + size * thread);
    float* own = sums + (long)thread * padded * (in + out);
    factor_gradients(grad + (long)change.start * out, x + (long)change.start * in, inner + places[g], cast.B,
                     change.scaling, change.stop - change.start, in, out, cast.even, change.rank, grad_inner + places[g],
                     grads_A[g], grads_B[g], own, own + (long)each * padded * in, cast.behind(in, out), each);
  }
  each_part(changes, count, threads, [&](int g, int first, int rows) {
    const Cast cast(changes[g], in, out, room + size * omp_get_thread_num());
    bf16* panel = cast.behind(in, out);
    bf16* into = grad_x + (long)(changes[g].start + first) * in;
    multiply_wide(grad_inner + places[g] + (long)first * cast.even, rows, cast.even, in, 0, panel, into,
                  [&](int at, int columns) { pair_rows(cast.A + at, in, cast.even, columns, panel); });
  });
}

}  // extern "C"
