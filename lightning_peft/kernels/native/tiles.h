// Products of bf16 matrices, summed in fp32 registers, and the layout they take.
//
// vdpbf16ps adds to each of 16 fp32 lanes the products of two bf16 neighbours. So a right factor (K, N) is "paired":
// it lies as [K / 2][N][2]. Two neighbours of a row of a left factor (M, K) are fetched at a time.
#pragma once

#include "vectors.h"

namespace {

constexpr int TILE = 6, PANEL = 4 * LANES;  // 6 x 4 registers of sums leave 8 of 32 to the factors

struct Left {  // pair p of row r: data + r * row + p * step
  const bf16* data;
  long row, step;
  Left at(long r, int p) const { return {data + r * row + p * step, row, step}; }
};

struct Right {  // pair p of column n: data + p * depth + 2 n
  const bf16* data;
  long depth;
  Right at(int p, int n) const { return {data + p * depth + 2 * n, depth}; }
};

template <int ROWS, int VECTORS>
struct Sums {  // of a tile, in registers
  __m512 at[ROWS][VECTORS];

  // Calls visit(place, column, sum) for each vector of c, whose rows are `row` apart.
  template <class Number, class Visit>
  inline __attribute__((always_inline)) void each(Number* c, long row, Visit visit) {
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) visit(c + r * row + v * LANES, v * LANES, at[r][v]);
  }

  // += a b. With AHEAD the rows after the tile's are fetched meanwhile, which memory order alone would bring too late.
  template <bool AHEAD = false>
  inline __attribute__((always_inline)) void add(Left a, Right b, int pairs) {
#pragma GCC unroll 1
    for (int p = 0; p < pairs; p++) {
      if (AHEAD) _mm_prefetch((const char*)(a.data + ROWS * a.row) + 64 * p, _MM_HINT_T0);
      __m512bh right[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) right[v] = (__m512bh)_mm512_loadu_si512(b.data + p * b.depth + v * 2 * LANES);
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; r++) {
        int pair;
        memcpy(&pair, a.data + r * a.row + p * a.step, sizeof pair);
        __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) at[r][v] = _mm512_dpbf16_ps(at[r][v], left, right[v]);
      }
    }
  }
};

// Calls run(tile) with an empty Sums<rows, vectors>, rows <= TILE and vectors * LANES <= PANEL.
template <class Run>
inline void with_tile(int rows, int vectors, Run run) {
  switch (rows * 8 + vectors) {
#define SIZE(ROWS, VECTORS) \
  case ROWS * 8 + VECTORS: { \
    Sums<ROWS, VECTORS> tile; \
    return run(tile); \
  }
#define SIZES(ROWS) SIZE(ROWS, 1) SIZE(ROWS, 2) SIZE(ROWS, 3) SIZE(ROWS, 4)
    SIZES(1) SIZES(2) SIZES(3) SIZES(4) SIZES(5) SIZES(6)
#undef SIZES
#undef SIZE
  }
}

// c = a b or, with `add`, c += a b: c (rows <= TILE, vectors * LANES <= PANEL), its rows `row` apart.
void multiply(int rows, int vectors, Left a, Right b, int pairs, float* c, long row, bool add) {
  with_tile(rows, vectors, [=](auto& tile) __attribute__((always_inline)) {
    tile.each(c, row, [=](float* place, int, __m512& sum) {
      sum = add ? _mm512_loadu_ps(place) : _mm512_setzero_ps();
    });
    tile.add(a, b, pairs);
    tile.each(c, row, [](float* place, int, __m512 sum) { _mm512_storeu_ps(place, sum); });
  });
}

// 16 numbers of one row and, in the upper half, of the next: 16 pairs.
inline __m512i paired(__m512i rows) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, rows);
}

inline void store_paired(bf16* into, __m512 even, __m512 odd) {
  _mm512_storeu_si512(into, paired((__m512i)_mm512_cvtne2ps_pbh(odd, even)));
}

// x (n, width) paired: [n / 2][padded][2]. Zeros pad the width to a multiple of LANES, and an odd n by a row.
void pair_rows(const bf16* x, long stride, int n, int width, bf16* into) {
  const int padded = round_up(width, LANES);
  const __m256i none = _mm256_setzero_si256();
  for (int i = 0; i < n; i += 2)
    for (int j = 0; j < padded; j += LANES) {
      const __mmask16 there = j + LANES <= width ? (__mmask16)0xffff : lanes_of(j, width, j);
      __m256i even = _mm256_maskz_loadu_epi16(there, x + i * stride + j);
      __m256i odd = i + 1 < n ? _mm256_maskz_loadu_epi16(there, x + (i + 1) * stride + j) : none;
      __m512i rows = _mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1);
      _mm512_storeu_si512(into + (long)i * padded + 2 * j, paired(rows));
    }
}

// 16 x 16 numbers of 32 bits, transposed.
inline void transpose(__m512i (&x)[LANES]) {
  __m512i y[LANES];
  for (int i = 0; i < LANES; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4) {  // then lane l of x[i + j] is column 4 l + j of rows i to i + 3
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int j = 0; j < 4; j++) {
    __m512i even = _mm512_shuffle_i32x4(x[j], x[4 + j], 0x88), odd = _mm512_shuffle_i32x4(x[j], x[4 + j], 0xdd);
    __m512i even_below = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0x88);
    __m512i odd_below = _mm512_shuffle_i32x4(x[8 + j], x[12 + j], 0xdd);
    y[j] = _mm512_shuffle_i32x4(even, even_below, 0x88);
    y[4 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
    y[8 + j] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
    y[12 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
  }
  memcpy(x, y, sizeof x);
}

// x^T (width, n) paired, panel after panel: [n / PANEL][width / 2][PANEL][2], zeros past n; width is even. In whole
// rows those of a panel could lie a power of two apart, where they share few lines of the cache.
void pair_columns(const bf16* x, long stride, int n, int width, bf16* into) {
  for (int i = 0; i < round_up(n, PANEL); i += LANES) {
    bf16* panel = into + (long)(i / PANEL) * PANEL * width + i % PANEL * 2;
    for (int j = 0; j < width; j += 2 * LANES) {
      int pairs = min(LANES, (width - j) / 2);
      __mmask16 there = lanes_of(0, pairs, 0);
      __m512i rows[LANES];
      for (int r = 0; r < LANES; r++)
        rows[r] = i + r < n ? _mm512_maskz_loadu_epi32(there, x + (i + r) * stride + j) : _mm512_setzero_si512();
      transpose(rows);
      for (int p = 0; p < pairs; p++) _mm512_storeu_si512(panel + (j + 2 * p) * PANEL, rows[p]);
    }
  }
}

}  // namespace
