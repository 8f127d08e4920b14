// Cross entropy of bf16 logits and its gradient, in fp32 between them. Called by kernels/cross_entropy.py.
#include <math.h>

#include "vectors.h"

extern "C" {

// losses[i] = log sum_j exp(logits[i, j]) - logits[i, labels[i]], and logits (rows, vocabulary) become their gradient,
// softmax - onehot. The vocabulary is a multiple of LANES.
void cross_entropy_gradient(bf16* logits, const int64_t* labels, long rows, long vocabulary, float* losses,
                            int threads) {
  const __m512 log2_e = _mm512_set1_ps((float)M_LOG2E);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < rows; i++) {
    bf16* x = logits + i * vocabulary;  // a few hundred KiB: the second-level cache keeps it
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (long j = 0; j < vocabulary; j += LANES) most = _mm512_max_ps(most, widened(x + j));
    const float largest = _mm512_reduce_max_ps(most) * (float)M_LOG2E;
    const __m512 largest_everywhere = _mm512_set1_ps(largest);
    for (long j = 0; j < vocabulary; j += LANES)
      total = _mm512_add_ps(total, exp2(_mm512_fmsub_ps(widened(x + j), log2_e, largest_everywhere)));
    const float normalizer = largest + log2f(_mm512_reduce_add_ps(total));
    // In fp32: near a certain prediction softmax - 1 is below bf16's resolution.
    const long aligned = labels[i] / LANES * LANES;
    __m512 labelled = _mm512_setzero_ps();
    for (long j = 0; j < vocabulary; j += LANES) {
      __m512 logit = widened(x + j);
      __m512 gradient = exp2(_mm512_fmsub_ps(logit, log2_e, _mm512_set1_ps(normalizer)));
      if (j == aligned) {
        const __mmask16 label = (__mmask16)(1u << (labels[i] - aligned));
        labelled = _mm512_maskz_mov_ps(label, logit);
        gradient = _mm512_mask_sub_ps(gradient, label, gradient, _mm512_set1_ps(1));
      }
      store_rounded(x + j, gradient);
    }
    losses[i] = normalizer * (float)M_LN2 - _mm512_reduce_add_ps(labelled);
  }
}

}  // extern "C"
