// Products of the few rows of a decoding step with their low-rank changes, bf16: each weight is read from memory once.
// Changes of the many rows of prompts, by themselves. Called by kernels/few_rows.py.
//
// A row's numbers are the same in any batch: see rows.h. Sums are fp32, the change is added to them, and an output is
// rounded once.
#include "rows.h"

namespace {

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
        const bf16* next = r + 1 < rows && A[r + 1] != A[r] ? A[r + 1] : nullptr;
        multiply_factor(x + r * in, A[r], ranks[r], in, inner + r * most_rank, next);
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
      finish(sums, inner, most_rank, B, ranks, bias, rows, out, first, width, y);
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
