// Products of a frozen layer and of the low-rank adapter beside it: bf16, sums in fp32. Called by kernels/products.py.
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

// The gradients of y = ... + x A^T B^T, with inner = x A^T (rows, rank), from that of y, grad (rows, out): grad_inner =
// grad B (rows, rank), grad_A = grad_inner^T x (rank, in) and grad_B = grad^T inner (out, rank), fp32. B is (out, rank).
//
// x (rows, in) and grad are read from memory once; in, out are multiples of LANES, rank <= PANEL. Scratch: sums_A
// (threads, padded, in), sums_B (threads, padded, out) and B_paired (out, padded), rank padded to a multiple of LANES.
void low_rank_gradients(const bf16* grad, const bf16* x, const bf16* inner, const bf16* B, long rows, int in, int out,
                        int rank, bf16* grad_inner, float* grad_A, float* grad_B, float* sums_A, float* sums_B,
                        bf16* B_paired, int threads) {
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
      for (int r = 0; r < rank; r++) {
        __m512 sum = _mm512_setzero_ps();
        const long at = (long)r * in + n;
        for (int t = 0; t < started; t++) sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums_A + t * size_A + at));
        _mm512_storeu_ps(grad_A + at, sum);
      }
#pragma omp for schedule(static)
    for (int n = 0; n < out; n++)
      for (int r = 0; r < rank; r++) {
        float sum = 0;
        for (int t = 0; t < started; t++) sum += sums_B[t * size_B + (long)r * out + n];
        grad_B[(long)n * rank + r] = sum;
      }
  }
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

}  // extern "C"
