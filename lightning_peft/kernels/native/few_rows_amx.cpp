// Products of the few rows of a decoding step with their low-rank changes, bf16, by the tiles of AMX: each weight is read
// from memory once. Called by kernels/few_rows.py.
//
// A tile is 16 rows of 64 bytes. A weight's lie as they are stored, 16 outputs by 32 inputs; the rows of x are the columns of
// the other factor, two neighbouring inputs beside each other. A row's numbers are the same in any batch: see rows.h.
#include "rows.h"
#include "tiles.h"

namespace {

constexpr int SIDE = 16;               // rows of a tile, and the fp32 numbers of each
constexpr int PACKED = SIDE * PAIRS;   // bf16 numbers of a tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
};

// The tile of inputs k to k + 32 of rows of x (rows <= SIDE, in): [16 pairs][16 rows][2], zeros for rows past the last.
void pack(const bf16* x, long rows, long in, long k, bf16* into) {
  __m512i pairs[SIDE];
  for (int r = 0; r < SIDE; r++) pairs[r] = r < rows ? _mm512_loadu_si512(x + r * in + k) : _mm512_setzero_si512();
  transpose(pairs);
  for (int p = 0; p < SIDE; p++) _mm512_storeu_si512(into + p * 2 * SIDE, pairs[p]);
}

// sums (SIDE, RUN) from `column` on = the tile (SIDE outputs, SIDE rows) transposed.
inline void store(float* tile, float* sums, int column) {
  __m512i outputs[SIDE];
  for (int o = 0; o < SIDE; o++) outputs[o] = _mm512_loadu_si512(tile + o * SIDE);
  transpose(outputs);
  for (int r = 0; r < SIDE; r++) _mm512_storeu_si512(sums + r * RUN + column, outputs[r]);
}

// sums (SIDE or, where `two`, 2 SIDE, RUN) = x . w of RUN outputs. On the way `lines` of memory from `ahead` on are asked
// for at every 32 inputs.
template <bool two>
inline void multiply_tiles(const bf16* packed, const bf16* w, long in, const char* ahead, int lines, float* sums) {
  const bf16* other = packed + in / PAIRS * PACKED;
  _tile_zero(0);
  _tile_zero(1);
  if (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < in; k += PAIRS, packed += PACKED, other += PACKED) {
    for (int line = 0; line < lines; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    _tile_loadd(6, packed, 64);
    _tile_loadd(4, w + k, in * sizeof(bf16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, w + SIDE * in + k, in * sizeof(bf16));
    _tile_dpbf16ps(1, 5, 6);
    if (two) {
      _tile_loadd(7, other, 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float tile[SIDE * SIDE];
  _tile_stored(0, tile, 64);
  store(tile, sums, 0);
  _tile_stored(1, tile, 64);
  store(tile, sums, SIDE);
  if (two) {
    _tile_stored(2, tile, 64);
    store(tile, sums + SIDE * RUN, 0);
    _tile_stored(3, tile, 64);
    store(tile, sums + SIDE * RUN, SIDE);
  }
}

}  // namespace

extern "C" {

// As few_rows_bf16; `in` and `out` are multiples of 32. `packed` has room for x, its rows padded to a multiple of SIDE.
void few_rows_amx(const bf16* x, const bf16* w, const bf16* bias, const bf16* const* A, const bf16* const* B,
                  const int* ranks, long rows, long in, long out, int most_rank, float* inner, bf16* packed, bf16* y,
                  int threads) {
  const long groups = (rows + SIDE - 1) / SIDE, steps = in / PAIRS;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const TileConfig config;
    _tile_loadconfig(&config);
#pragma omp for schedule(static) nowait
    for (long i = 0; i < groups * steps; i++) {
      const long r = i / steps * SIDE;
      pack(x + r * in, rows - r, in, i % steps * PAIRS, packed + i * PACKED);
    }
    if (most_rank) {
#pragma omp for schedule(static) nowait
      for (long r = 0; r < rows; r++) {
        const bf16* next = r + 1 < rows && A[r + 1] != A[r] ? A[r + 1] : nullptr;
        multiply_factor(x + r * in, A[r], ranks[r], in, inner + r * most_rank, next);
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (long first = 0; first < out; first += RUN) {
      alignas(64) float sums[MOST_ROWS * RUN];
      // Rows of B lie far apart, where no processor guesses them; the weights of the next outputs follow these.
      for (long r = 0; most_rank && r < rows; r++)
        for (int k = 0; k < ranks[r] && (r == 0 || B[r] != B[r - 1]); k++)
          _mm_prefetch((const char*)(B[r] + k * out + first), _MM_HINT_T0);
      const bf16* own = w + first * in;
      const char* ahead = (const char*)(own + RUN * in);
      for (long g = 0; g < groups; g += 2) {
        const bf16* of_rows = packed + g * steps * PACKED;
        const int lines = g ? 0 : RUN * PAIRS * sizeof(bf16) / 64;
        if (g + 1 < groups)
          multiply_tiles<true>(of_rows, own, in, ahead, lines, sums + g * SIDE * RUN);
        else
          multiply_tiles<false>(of_rows, own, in, ahead, lines, sums + g * SIDE * RUN);
      }
      finish(sums, inner, most_rank, B, ranks, bias, rows, out, first, RUN, y);
    }
    _tile_release();
  }
}

}  // extern "C"
