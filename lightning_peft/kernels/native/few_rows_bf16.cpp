// Products of the few rows of a decoding step with their low-rank changes, bf16: each weight is read from memory once.
// Changes of the many rows of prompts, by themselves. Called by kernels/few_rows.py.
//
// Every output is one sum over the inputs in one order, whatever rows stand beside its own: a row's numbers are the same
// in any batch. Sums are fp32, the change is added to them, and an output is rounded once.
#include "vectors.h"

namespace {

constexpr int PAIRS = 32;    // bf16 numbers of a vector
constexpr int OUTPUTS = 4;   // of a tile of four rows: sixteen sums, four inputs and a weight of the 32 registers
constexpr int RUN = 32;      // outputs that a thread takes at a time
constexpr int MOST_ROWS = 64;

inline __m512bh numbers(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }
inline __m512bh numbers(const bf16* x, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, x); }

// sums[r * stride + o] = x[r] . w[o] for four outputs. On the way the memory from `ahead` on is asked for, `every` bytes a
// vector of inputs: into the nearest cache where there is little to multiply meanwhile.
template <int ROWS>
inline void multiply(const bf16* x, const bf16* w, long in, float* sums, long stride, const char* ahead, long every) {
  __m512 sum[ROWS][OUTPUTS];
  for (int r = 0; r < ROWS; r++)
    for (int o = 0; o < OUTPUTS; o++) sum[r][o] = _mm512_setzero_ps();
  long k = 0;
  for (; k + PAIRS <= in; k += PAIRS) {
    for (long line = 0; line < every; line += 64) _mm_prefetch(ahead + line, ROWS < 4 ? _MM_HINT_T0 : _MM_HINT_T1);
    ahead += every;
    __m512bh left[ROWS];
    for (int r = 0; r < ROWS; r++) left[r] = numbers(x + r * in + k);
    for (int o = 0; o < OUTPUTS; o++) {
      const __m512bh right = numbers(w + o * in + k);
      for (int r = 0; r < ROWS; r++) sum[r][o] = _mm512_dpbf16_ps(sum[r][o], left[r], right);
    }
  }
  if (k < in) {
    const __mmask32 rest = (1u << (in - k)) - 1;
    for (int o = 0; o < OUTPUTS; o++) {
      const __m512bh right = numbers(w + o * in + k, rest);
      for (int r = 0; r < ROWS; r++) sum[r][o] = _mm512_dpbf16_ps(sum[r][o], numbers(x + r * in + k, rest), right);
    }
  }
  for (int r = 0; r < ROWS; r++) _mm_storeu_ps(sums + r * stride, totals(sum[r]));
}

// The same for all rows of x (rows, in), the weights of the next tile coming from memory meanwhile.
inline void multiply_all(const bf16* x, long rows, const bf16* w, long in, float* sums, long stride) {
  const long tiles = rows / 4 + (rows % 4) / 2 + rows % 2;
  const long every = ((OUTPUTS * PAIRS * (long)sizeof(bf16) + tiles - 1) / tiles + 63) / 64 * 64;
  const long part = in / PAIRS * every;
  const char* ahead = (const char*)(w + OUTPUTS * in);
  long r = 0;
  for (; r + 4 <= rows; r += 4, ahead += part) multiply<4>(x + r * in, w, in, sums + r * stride, stride, ahead, every);
  for (; r + 2 <= rows; r += 2, ahead += part) multiply<2>(x + r * in, w, in, sums + r * stride, stride, ahead, every);
  for (; r < rows; r++, ahead += part) multiply<1>(x + r * in, w, in, sums + r * stride, stride, ahead, every);
}

// x . w.
inline float dot(const bf16* x, const bf16* w, long in) {
  __m512 sum = _mm512_setzero_ps();
  for (long k = 0; k < in; k += PAIRS) {
    const __mmask32 mask = in - k < PAIRS ? (1u << (in - k)) - 1 : ~0u;
    sum = _mm512_dpbf16_ps(sum, numbers(x + k, mask), numbers(w + k, mask));
  }
  return _mm512_reduce_add_ps(sum);
}

// sums (ROWS, width <= RUN) += inner (ROWS, rank) B, where B's rows of bf16 are `stride` apart, those of inner `most`.
template <int ROWS>
inline void add_change(const float* inner, long most, const bf16* B, long stride, int rank, int width, float* sums) {
  for (int n = 0; n < width; n += LANES) {
    const __mmask16 mask = lanes_of(0, width, n);
    __m512 sum[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = _mm512_maskz_loadu_ps(mask, sums + r * RUN + n);
    for (int k = 0; k < rank; k++) {
      const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, B + k * stride + n));
      const __m512 factor = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
      for (int r = 0; r < ROWS; r++) sum[r] = _mm512_fmadd_ps(_mm512_set1_ps(inner[r * most + k]), factor, sum[r]);
    }
    for (int r = 0; r < ROWS; r++) _mm512_mask_storeu_ps(sums + r * RUN + n, mask, sum[r]);
  }
}

}  // namespace

extern "C" {

// y (rows, out) = x w^T + bias + (x[r] A_r^T) B_r for x (rows, in), w (out, in), bias (out) or null, and each row's own
// A (rank, in) and B (rank, out), by address; a row of rank 0 has none. `inner` has room for (rows, most_rank).
void few_rows_bf16(const bf16* x, const bf16* w, const bf16* bias, const bf16* const* A, const bf16* const* B,
                   const int* ranks, long rows, long in, long out, int most_rank, float* inner, bf16* y, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    if (most_rank) {
#pragma omp for schedule(static)
      for (long r = 0; r < rows; r++) {
        float* own = inner + r * most_rank;
        int rank = 0;
        const bf16* next = r + 1 < rows && A[r + 1] != A[r] ? A[r + 1] : nullptr;
        for (; rank + OUTPUTS <= ranks[r]; rank += OUTPUTS) {
          const bf16* ahead = A[r] + (rank + OUTPUTS) * in;
          if (rank + 2 * OUTPUTS > ranks[r]) ahead = next;
          multiply<1>(x + r * in, A[r] + rank * in, in, own + rank, most_rank, (const char*)ahead,
                      ahead ? OUTPUTS * PAIRS * sizeof(bf16) : 0);
        }
        for (; rank < ranks[r]; rank++) own[rank] = dot(x + r * in, A[r] + rank * in, in);
      }
    }
#pragma omp for schedule(static)
    for (long first = 0; first < out; first += RUN) {
      const int width = out - first < RUN ? out - first : RUN;
      float sums[MOST_ROWS * RUN];
      int o = 0;
      for (; o + OUTPUTS <= width; o += OUTPUTS) {
        multiply_all(x, rows, w + (first + o) * in, in, sums + o, RUN);
        // Rows of B lie far apart, where no processor guesses them: they come while the next tiles are computed.
        const long part = (rows + RUN / OUTPUTS - 1) / (RUN / OUTPUTS), from = o / OUTPUTS * part;
        for (long r = from; most_rank && r < from + part && r < rows; r++)
          for (int k = 0; k < ranks[r] && (r == 0 || B[r] != B[r - 1]); k++)
            _mm_prefetch((const char*)(B[r] + k * out + first), _MM_HINT_T0);
      }
      for (; o < width; o++)
        for (long r = 0; r < rows; r++) sums[r * RUN + o] = dot(x + r * in, w + (first + o) * in, in);
      for (long r = 0; most_rank && r < rows;) {  // rows of one adapter read it together
        int same = 1;
        while (same < 4 && r + same < rows && B[r + same] == B[r]) same++;
        if (same == 3) same = 2;
        const float* own = inner + r * most_rank;
        float* into = sums + r * RUN;
        if (ranks[r] && same == 4) add_change<4>(own, most_rank, B[r] + first, out, ranks[r], width, into);
        if (ranks[r] && same == 2) add_change<2>(own, most_rank, B[r] + first, out, ranks[r], width, into);
        if (ranks[r] && same == 1) add_change<1>(own, most_rank, B[r] + first, out, ranks[r], width, into);
        r += same;
      }
      for (long r = 0; r < rows; r++) {
        const float* own = sums + r * RUN;
        for (int n = 0; n < width; n += LANES) {
          const __mmask16 mask = lanes_of(0, width, n);
          __m512 sum = _mm512_maskz_loadu_ps(mask, own + n);
          if (bias) {
            const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias + first + n));
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
          }
          _mm256_mask_storeu_epi16(y + r * out + first + n, mask, (__m256i)_mm512_cvtneps_pbh(sum));
        }
      }
    }
  }
}

// y (groups, each, out) = (x A_g^T) B_g for x (groups, each, in) and each group's own A (rank, in) and B (rank, out), by
// address; a group of rank 0 has zeros. `inner` has room for (groups, each, most_rank).
void changes_bf16(const bf16* x, const bf16* const* A, const bf16* const* B, const int* ranks, long groups, long each,
                  long in, long out, int most_rank, float* inner, bf16* y, int threads) {
  constexpr int ROWS = 16;  // that a thread takes at a time
  const long parts = (each + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long i = 0; i < groups * parts; i++) {
    const long g = i / parts, begin = i % parts * ROWS, end = begin + ROWS < each ? begin + ROWS : each;
    const bf16* own = x + g * each * in;
    float* into = inner + g * each * most_rank;
    int rank = 0;
    for (; rank + OUTPUTS <= ranks[g]; rank += OUTPUTS) {
      const bf16* part = A[g] + rank * in;
      long r = begin;
      for (; r + 4 <= end; r += 4) multiply<4>(own + r * in, part, in, into + r * most_rank + rank, most_rank, nullptr, 0);
      for (; r < end; r++) multiply<1>(own + r * in, part, in, into + r * most_rank + rank, most_rank, nullptr, 0);
    }
    for (; rank < ranks[g]; rank++)
      for (long r = begin; r < end; r++) into[r * most_rank + rank] = dot(own + r * in, A[g] + rank * in, in);
    for (long first = 0; first < out; first += RUN) {
      const int width = out - first < RUN ? out - first : RUN;
      float sums[ROWS * RUN];
      memset(sums, 0, sizeof sums);
      long r = begin;
      for (; ranks[g] && r + 4 <= end; r += 4)
        add_change<4>(into + r * most_rank, most_rank, B[g] + first, out, ranks[g], width, sums + (r - begin) * RUN);
      for (; ranks[g] && r < end; r++)
        add_change<1>(into + r * most_rank, most_rank, B[g] + first, out, ranks[g], width, sums + (r - begin) * RUN);
      for (r = begin; r < end; r++)
        for (int n = 0; n < width; n += LANES) {
          const __mmask16 mask = lanes_of(0, width, n);
          const __m512 sum = _mm512_maskz_loadu_ps(mask, sums + (r - begin) * RUN + n);
          _mm256_mask_storeu_epi16(y + (g * each + r) * out + first + n, mask, (__m256i)_mm512_cvtneps_pbh(sum));
        }
    }
  }
}

// into: scaling x of each of `count` fp32 matrices (rank, width), one behind the other in bf16; with `transposed` it lies
// as (width, rank).
void cast_factors_bf16(const float* const* x, const float* scalings, const int* ranks, const int* widths, int transposed,
                       long count, bf16* into) {
  for (long i = 0; i < count; into += (long)ranks[i] * widths[i], i++) {
    const __m512 scaling = _mm512_set1_ps(scalings[i]);
    const int row = transposed ? 1 : widths[i], step = transposed ? ranks[i] : 1;
    const __m512i places = _mm512_mullo_epi32(_mm512_set1_epi32(step), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int n = 0; n < widths[i]; n += LANES) {
      const __mmask16 mask = lanes_of(0, widths[i], n);
      for (int r = 0; r < ranks[i]; r++) {
        const float* from = x[i] + (long)r * row + (long)n * step;
        const __m512 found = transposed ? _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, places, from, 4)
                                        : _mm512_maskz_loadu_ps(mask, from);
        _mm256_mask_storeu_epi16(into + (long)r * widths[i] + n, mask,
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(found, scaling)));
      }
    }
  }
}

}  // extern "C"
