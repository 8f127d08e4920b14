// The operations between the products of a decoding step, bf16: norms, gates, rotation and attention of one position a
// row. kernels/decoding.py calls them. Numbers are rounded where transformers' modules round them.
#include <math.h>
#include <omp.h>

#include <type_traits>

#include "vectors.h"

namespace {

template <int N>
using number = std::integral_constant<int, N>;

constexpr int MOST_SIZE = 256;   // of a head
constexpr int TOGETHER = 4;      // queries that read values together
constexpr int PAIRS = 32;        // bf16 numbers of a vector

inline __m512 rounded(__m512 x) {
  __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// into (size) = x turned by cosine and sine (size), in halves: (a, b) -> (a c + b s, b c' + a s').
inline void turn(const bf16* x, const bf16* cosine, const bf16* sine, int size, bf16* into) {
  const int half = size / 2;
  for (int d = 0; d < half; d += LANES) {
    const __m512 a = widened(x + d), b = widened(x + half + d);
    const __m512 first = rounded(_mm512_mul_ps(a, widened(cosine + d)));
    const __m512 second = rounded(_mm512_mul_ps(b, widened(sine + d)));
    store_rounded(into + d, _mm512_add_ps(first, second));
    const __m512 third = rounded(_mm512_mul_ps(b, widened(cosine + half + d)));
    const __m512 fourth = rounded(_mm512_mul_ps(a, widened(sine + half + d)));
    store_rounded(into + half + d, _mm512_add_ps(third, fourth));
  }
}

// scores (positions) = the products of a query and of keys (positions, size), times log2(e) scaling.
inline void multiply_keys(const bf16* query, const bf16* keys, long positions, int size, float scaling, float* scores) {
  __m512bh own[MOST_SIZE / PAIRS];
  for (int d = 0; d < size / PAIRS; d++) own[d] = (__m512bh)_mm512_loadu_si512(query + d * PAIRS);
  const __m128 scale = _mm_set1_ps(scaling);
  for (long p = 0; p < positions; p += 4) {
    __m512 sum[4];
    for (int i = 0; i < 4; i++) {
      const bf16* key = keys + (p + i < positions ? p + i : positions - 1) * size;
      sum[i] = _mm512_setzero_ps();
      for (int d = 0; d < size / PAIRS; d++)
        sum[i] = _mm512_dpbf16_ps(sum[i], own[d], (__m512bh)_mm512_loadu_si512(key + d * PAIRS));
    }
    _mm_storeu_ps(scores + p, _mm_mul_ps(totals(sum), scale));
  }
}

// scores (positions) become 2^(score - the largest); returns their sum.
inline float exponentials(float* scores, long positions) {
  __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
  for (long p = 0; p < positions; p += LANES) {
    const __mmask16 mask = positions - p < LANES ? (1u << (positions - p)) - 1 : 0xffff;
    most = _mm512_mask_max_ps(most, mask, most, _mm512_maskz_loadu_ps(mask, scores + p));
  }
  const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (long p = 0; p < positions; p += LANES) {
    const __mmask16 mask = positions - p < LANES ? (1u << (positions - p)) - 1 : 0xffff;
    const __m512 share = exp2(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + p), largest));
    _mm512_mask_storeu_ps(scores + p, mask, share);
    sum = _mm512_mask_add_ps(sum, mask, sum, share);
  }
  return _mm512_reduce_add_ps(sum);
}

// mixed (QUERIES, size) = the sums of values (positions, size) by their shares (QUERIES, room), over `totals`.
template <int QUERIES>
inline void mix(const float* shares, long room, const float* totals, const bf16* values, long positions, int size,
                bf16* mixed) {
  for (int d = 0; d < size; d += PAIRS) {
    __m512 sum[QUERIES][2];
    for (int q = 0; q < QUERIES; q++) sum[q][0] = sum[q][1] = _mm512_setzero_ps();
    for (long p = 0; p < positions; p++) {
      const __m512 left = widened(values + p * size + d), right = widened(values + p * size + d + LANES);
      for (int q = 0; q < QUERIES; q++) {
        const __m512 share = _mm512_set1_ps(shares[q * room + p]);
        sum[q][0] = _mm512_fmadd_ps(share, left, sum[q][0]);
        sum[q][1] = _mm512_fmadd_ps(share, right, sum[q][1]);
      }
    }
    for (int q = 0; q < QUERIES; q++) {
      const __m512 part = _mm512_set1_ps(1 / totals[q]);
      store_rounded(mixed + q * size + d, _mm512_mul_ps(sum[q][0], part));
      store_rounded(mixed + q * size + d + LANES, _mm512_mul_ps(sum[q][1], part));
    }
  }
}

// Attention of QUERIES queries (QUERIES, size) of one head to its keys and values (positions, size).
template <int QUERIES>
inline void attend_some(const bf16* queries, const bf16* cosine, const bf16* sine, const bf16* keys, const bf16* values,
                        long positions, int size, float scaling, float* scores, long room, bf16* mixed) {
  float totals[QUERIES];
  for (int q = 0; q < QUERIES; q++) {
    bf16 query[MOST_SIZE];
    turn(queries + q * size, cosine, sine, size, query);
    multiply_keys(query, keys, positions, size, scaling, scores + q * room);
    totals[q] = exponentials(scores + q * room, positions);
  }
  mix<QUERIES>(scores, room, totals, values, positions, size, mixed);
}

}  // namespace

extern "C" {

// y (rows, width) = weight x / sqrt(mean(x^2) + epsilon), rounded before the weight; width is a multiple of LANES.
void rms_norm_bf16(const bf16* x, const bf16* weight, float epsilon, long rows, long width, bf16* y) {
  for (long r = 0; r < rows; r++, x += width, y += width) {
    __m512 squares = _mm512_setzero_ps();
    for (long d = 0; d < width; d += LANES) squares = _mm512_fmadd_ps(widened(x + d), widened(x + d), squares);
    const float mean = _mm512_reduce_add_ps(squares) / width + epsilon;
    const __m512 scale = _mm512_set1_ps(1 / __builtin_sqrtf(mean));
    for (long d = 0; d < width; d += LANES)
      store_rounded(y + d, _mm512_mul_ps(rounded(_mm512_mul_ps(widened(x + d), scale)), widened(weight + d)));
  }
}

// gate (count) = silu(gate) up, rounded before `up`; count is a multiple of LANES.
void gated_bf16(bf16* gate, const bf16* up, long count) {
  const __m512 one = _mm512_set1_ps(1), factor = _mm512_set1_ps(-1.44269504088896341f);
  for (long d = 0; d < count; d += LANES) {
    const __m512 x = widened(gate + d);
    const __m512 silu = _mm512_div_ps(x, _mm512_add_ps(one, exp2(_mm512_mul_ps(x, factor))));
    store_rounded(gate + d, _mm512_mul_ps(rounded(silu), widened(up + d)));
  }
}

// Attention of one position a row: mixed (rows, heads * group, size) from queries of that shape, keys and values
// (rows, heads, size). Keys are turned and go with values into the row's place lengths[r] of the cache, (rows, heads,
// width, size) each; queries are turned and see the places up to it. cosine, sine (rows, size). Scratch: scores
// (threads, TOGETHER, width rounded up to LANES). size is a multiple of PAIRS up to MOST_SIZE.
void attend_bf16(const bf16* queries, const bf16* keys, const bf16* values, const bf16* cosine, const bf16* sine,
                 const int64_t* lengths, long rows, int heads, int group, int size, long width, float scaling,
                 bf16* kept_keys, bf16* kept_values, bf16* mixed, float* scratch, int threads) {
  const long room = (width + LANES - 1) / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long i = 0; i < rows * heads; i++) {
    const long r = i / heads, positions = lengths[r] + 1;
    bf16 *own_keys = kept_keys + i * width * size, *own_values = kept_values + i * width * size;
    turn(keys + i * size, cosine + r * size, sine + r * size, size, own_keys + lengths[r] * size);
    memcpy(own_values + lengths[r] * size, values + i * size, size * sizeof(bf16));
    float* scores = scratch + omp_get_thread_num() * TOGETHER * room;
    const bf16 *own_cosine = cosine + r * size, *own_sine = sine + r * size;
    auto some = [&](int first, auto count) {
      const long at = (i * group + first) * size;
      attend_some<count>(queries + at, own_cosine, own_sine, own_keys, own_values, positions, size,
                         scaling * (float)M_LOG2E, scores, room, mixed + at);
    };
    int g = 0;
    for (; g + TOGETHER <= group; g += TOGETHER) some(g, number<TOGETHER>());
    if (group - g == 3) some(g, number<3>());
    if (group - g == 2) some(g, number<2>());
    if (group - g == 1) some(g, number<1>());
  }
}

}  // extern "C"
