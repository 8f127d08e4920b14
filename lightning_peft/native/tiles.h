// Products of bf16 matrices, summed in fp32 registers, and the layout they take.
//
// vdpbf16ps adds to each of 16 fp32 lanes the products of two bf16 neighbours. So a right factor (K, N) is "paired":
// it lies as [K / 2][N][2]. Of a left factor (M, K) two neighbours of a row are fetched at a time.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace {

typedef uint16_t bf16;

constexpr int LANES = 16;
constexpr int TILE = 6, PANEL = 4 * LANES;  // 6 x 4 registers of sums leave 8 of 32 to the factors

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Left {  // pair p of row r: data + r * row + p * step
  const bf16* data;
  long row, step;
  Left at(int r, int p) const { return {data + r * row + p * step, row, step}; }
};

struct Right {  // pair p of column n: data + p * depth + 2 n
  const bf16* data;
  long depth;
  Right at(int p, int n) const { return {data + p * depth + 2 * n, depth}; }
};

template <int ROWS, int VECTORS>
inline __attribute__((always_inline)) void multiply_tile(Left a, Right b, int pairs, float* c, long row, bool add) {
  __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sums[r][v] = add ? _mm512_loadu_ps(c + r * row + v * LANES) : _mm512_setzero_ps();
#pragma GCC unroll 1
  for (int p = 0; p < pairs; p++) {
    __m512bh right[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) right[v] = (__m512bh)_mm512_loadu_si512(b.data + p * b.depth + v * 2 * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int pair;
      memcpy(&pair, a.data + r * a.row + p * a.step, sizeof pair);
      __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(c + r * row + v * LANES, sums[r][v]);
}

template <int VECTORS>
void multiply_rows(int rows, Left a, Right b, int pairs, float* c, long row, bool add) {
  switch (rows) {
    case 1: return multiply_tile<1, VECTORS>(a, b, pairs, c, row, add);
    case 2: return multiply_tile<2, VECTORS>(a, b, pairs, c, row, add);
    case 3: return multiply_tile<3, VECTORS>(a, b, pairs, c, row, add);
    case 4: return multiply_tile<4, VECTORS>(a, b, pairs, c, row, add);
    case 5: return multiply_tile<5, VECTORS>(a, b, pairs, c, row, add);
    default: return multiply_tile<6, VECTORS>(a, b, pairs, c, row, add);
  }
}

// c = a b or, with `add`, c += a b: c (rows <= TILE, vectors * LANES <= PANEL), its rows `row` apart.
void multiply(int rows, int vectors, Left a, Right b, int pairs, float* c, long row, bool add) {
  switch (vectors) {
    case 1: return multiply_rows<1>(rows, a, b, pairs, c, row, add);
    case 2: return multiply_rows<2>(rows, a, b, pairs, c, row, add);
    case 3: return multiply_rows<3>(rows, a, b, pairs, c, row, add);
    default: return multiply_rows<4>(rows, a, b, pairs, c, row, add);
  }
}

inline __m512 widened(const bf16* x) {
  __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

inline void store_rounded(bf16* into, __m512 x) { _mm256_storeu_si256((__m256i*)into, (__m256i)_mm512_cvtneps_pbh(x)); }

// 16 numbers of one row and, in the upper half, of the next: 16 pairs.
inline __m512i paired(__m512i rows) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, rows);
}

inline void store_paired(bf16* into, __m512 even, __m512 odd) {
  _mm512_storeu_si512(into, paired((__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}

// Of the lanes at, at + 1, ... those in [first, last).
inline __mmask16 lanes_of(int first, int last, int at) {
  int from = max(0, min(LANES, first - at)), to = max(0, min(LANES, last - at));
  return (__mmask16)(((1u << to) - 1) & ~((1u << from) - 1));
}

// x (n, width) paired: [n / 2][width][2], a row of zeros after an odd number.
void pair_rows(const bf16* x, long stride, int n, int width, bf16* into) {
  for (int i = 0; i < n; i += 2)
    for (int j = 0; j < width; j += LANES) {
      __m256i even = _mm256_loadu_si256((const __m256i*)(x + i * stride + j));
      __m256i odd = _mm256_setzero_si256();
      if (i + 1 < n) odd = _mm256_loadu_si256((const __m256i*)(x + (i + 1) * stride + j));
      __m512i rows = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
      _mm512_storeu_si512(into + (long)i * width + 2 * j, paired(rows));
    }
}

// x^T (width, n) paired, panel after panel: [n / PANEL][width / 2][PANEL][2], zeros past n. In whole rows those of a panel
// could lie a power of two apart, where they share few lines of the cache.
void pair_columns(const bf16* x, long stride, int n, int width, bf16* into) {
  const __m512i counted = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i rows = _mm512_mullo_epi32(counted, _mm512_set1_epi32((int)(stride * sizeof(bf16))));
  for (int i = 0; i < round_up(n, PANEL); i += LANES) {
    __mmask16 there = lanes_of(0, n, i);
    bf16* panel = into + (long)(i / PANEL) * PANEL * width + i % PANEL * 2;
    for (int j = 0; j < width; j += 2) {
      __m512i pairs = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, rows, x + i * stride + j, 1);
      _mm512_storeu_si512(panel + j * PANEL, pairs);
    }
  }
}

}  // namespace
