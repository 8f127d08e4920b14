// Products of the few rows of a decoding step, fp32: each weight is read from memory once. Called by kernels/few_rows.py.
//
// Every output is one sum over the inputs in one order, whatever rows stand beside its own: a row's numbers are the same
// in any batch.
#include <immintrin.h>

namespace {

constexpr int LANES = 8;  // fp32 numbers of a vector

inline float total(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// sums[r * stride + o] = x[r] . w[o] + bias[o]; the accumulators of the tile stay in registers. On the way the memory from
// `ahead` on is asked for, a line of 64 bytes every `every` inputs.
template <int ROWS, int OUTPUTS>
inline void multiply(const float* x, long x_stride, const float* w, const float* bias, long in, float* sums, long stride,
                     const char* ahead = nullptr, long every = 0) {
  __m256 sum[ROWS][OUTPUTS];
  for (int r = 0; r < ROWS; r++)
    for (int o = 0; o < OUTPUTS; o++) sum[r][o] = _mm256_setzero_ps();
  for (long k = 0; k < in; k += LANES) {
    _mm_prefetch(ahead, _MM_HINT_T0);
    ahead += every;
    __m256 left[ROWS];
    for (int r = 0; r < ROWS; r++) left[r] = _mm256_loadu_ps(x + r * x_stride + k);
    for (int o = 0; o < OUTPUTS; o++) {
      const __m256 right = _mm256_loadu_ps(w + o * in + k);
      for (int r = 0; r < ROWS; r++) sum[r][o] = _mm256_fmadd_ps(left[r], right, sum[r][o]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int o = 0; o < OUTPUTS; o++) sums[r * stride + o] = total(sum[r][o]) + (bias ? bias[o] : 0);
}

template <int OUTPUTS>
inline void multiply_all(const float* x, long rows, const float* w, const float* bias, long in, float* sums, long stride) {
  // The weights of the next tile come from memory while those of this one are multiplied.
  const long tiles = rows / 4 + (rows % 4) / 2 + rows % 2;
  const long each = (OUTPUTS * LANES * (long)sizeof(float) + tiles - 1) / tiles;
  const char* ahead = (const char*)(w + OUTPUTS * in);
  const long part = in / LANES * each;
  long r = 0;
  for (; r + 4 <= rows; r += 4, ahead += part)
    multiply<4, OUTPUTS>(x + r * in, in, w, bias, in, sums + r * stride, stride, ahead, each);
  for (; r + 2 <= rows; r += 2, ahead += part)
    multiply<2, OUTPUTS>(x + r * in, in, w, bias, in, sums + r * stride, stride, ahead, each);
  for (; r < rows; r++, ahead += part)
    multiply<1, OUTPUTS>(x + r * in, in, w, bias, in, sums + r * stride, stride, ahead, each);
}

constexpr int OUTPUTS = 3;   // of a tile of four rows: twelve sums, four inputs and a weight are the sixteen registers
constexpr long RUN = 24;     // outputs that a thread takes at a time

}  // namespace

extern "C" {

// y (rows, out) = x w^T + bias for x (rows, in), w (out, in), bias (out) or null; `in` is a multiple of LANES.
void few_rows_product(const float* x, const float* w, const float* bias, long rows, long in, long out, float* y,
                      int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long first = 0; first < out; first += RUN) {
    const long last = first + RUN < out ? first + RUN : out;
    long o = first;
    for (; o + OUTPUTS <= last; o += OUTPUTS)
      multiply_all<OUTPUTS>(x, rows, w + o * in, bias ? bias + o : nullptr, in, y + o, out);
    for (; o < last; o++) multiply_all<1>(x, rows, w + o * in, bias ? bias + o : nullptr, in, y + o, out);
  }
}

// y[r] += (x[r] A_r^T) B_r for y (rows, out), x (rows, in), and each row's own A (rank, in) and B (rank, out), by address;
// a row of rank 0 is left alone. `inner` has room for (rows, most_rank); `in` and `out` are multiples of LANES.
void few_rows_low_rank(const float* x, const float* const* A, const float* const* B, const int* ranks, long rows, long in,
                       long out, int most_rank, float* inner, float* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (long r = 0; r < rows; r++) {
    float* own = inner + r * most_rank;
    int rank = 0;
    for (; rank + 4 <= ranks[r]; rank += 4)
      multiply<1, 4>(x + r * in, in, A[r] + rank * in, nullptr, in, own + rank, most_rank);
    for (; rank < ranks[r]; rank++) multiply<1, 1>(x + r * in, in, A[r] + rank * in, nullptr, in, own + rank, most_rank);
    if (!ranks[r]) continue;
    for (long n = 0; n < out; n += LANES) {
      __m256 sum = _mm256_setzero_ps();
      for (int k = 0; k < ranks[r]; k++)
        sum = _mm256_fmadd_ps(_mm256_set1_ps(own[k]), _mm256_loadu_ps(B[r] + k * out + n), sum);
      float* place = y + r * out + n;
      _mm256_storeu_ps(place, _mm256_add_ps(_mm256_loadu_ps(place), sum));
    }
  }
}

}  // extern "C"
