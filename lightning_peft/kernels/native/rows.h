// Products of single rows with their own low-rank factors, bf16, sums in fp32; and the end of a row's outputs.
//
// Every output is one sum over the inputs in one order, whatever rows stand beside its own.
#pragma once

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

// own (rank) = x (in) A^T, for A (rank, in). The memory from `next` on, if it is given, is asked for at the end.
inline void multiply_factor(const bf16* x, const bf16* A, int rank, long in, float* own, const bf16* next) {
  int k = 0;
  for (; k + OUTPUTS <= rank; k += OUTPUTS) {
    const bf16* ahead = k + 2 * OUTPUTS > rank ? next : A + (k + OUTPUTS) * in;
    multiply<1>(x, A + k * in, in, own + k, rank, (const char*)ahead, ahead ? OUTPUTS * PAIRS * sizeof(bf16) : 0);
  }
  for (; k < rank; k++) own[k] = dot(x, A + k * in, in);
}

// y (rows, width) = sums (rows, RUN) + bias + inner (rows, most_rank) B_r: the outputs from `first` on of rows of `out`.
inline void finish(float* sums, const float* inner, int most_rank, const bf16* const* B, const int* ranks, const bf16* bias,
                   long rows, long out, long first, int width, bf16* y) {
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

}  // namespace
