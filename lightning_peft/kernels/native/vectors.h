// Vectors of 16 fp32 numbers, from and to bf16.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

typedef uint16_t bf16;

constexpr int LANES = 16;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

inline __m512 widened(const bf16* x) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline void store_rounded(bf16* into, __m512 x) { _mm256_storeu_si256((__m256i*)into, (__m256i)_mm512_cvtneps_pbh(x)); }

// The mask of the lanes at, at + 1, ... that are in [first, last).
inline __mmask16 lanes_of(int first, int last, int at) {
  int from = max(0, min(LANES, first - at)), to = max(0, min(LANES, last - at));
  return (__mmask16)(((1u << to) - 1) & ~((1u << from) - 1));
}

// The totals of four vectors.
inline __m128 totals(const __m512* x) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
  const __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512 all = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// 2^x, within 2e-7 of it: Taylor's polynomial between -1/2 and 1/2.
inline __m512 exp2(__m512 x) {
  __m512 whole = _mm512_roundscale_ps(x, 8), rest = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

}  // namespace
