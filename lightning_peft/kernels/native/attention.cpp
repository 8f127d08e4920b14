// Causal attention over packed samples and its gradients (Dao 2023, arXiv:2307.08691, algorithms 1 and 2), bf16 with
// fp32 scores, softmax and sums.
//
// A thread takes one sample and one key head, or a part of the query heads that share it, so it adds up the gradients
// of keys and values alone. It goes over blocks of queries and of the keys they see; products leave out what the mask
// hides in steps of a tile. Called by kernels/attention/native.py, which mirrors `View` and `Work`.
#include <math.h>
#include <omp.h>

#include "tiles.h"

struct View {  // (B, H, T, D), D contiguous; strides in numbers
  bf16* data;
  long batch, head, token;
};

struct Scratch {  // a thread's memory
  char* next;
  template <class Number>
  Number* take(long numbers) {
    Number* taken = (Number*)next;
    next += (numbers * sizeof(Number) + 63) / 64 * 64;
    return taken;
  }
};

struct Work {
  const int* samples;  // (num_samples, 2): position of the first token in the flattened batch, length
  int num_samples, row_width, heads, key_heads, parts, head_dim, window;
  float scaling;
  char* scratch;
  long scratch_bytes;  // of one thread
  int threads;

  int num_items() const { return num_samples * key_heads * parts; }
  Scratch scratch_of(int thread) const { return {scratch + scratch_bytes * thread}; }
};

namespace {

constexpr int QUERIES = 96, KEYS = 256;  // of a block, whose scores then lie in the second-level cache
constexpr int ROW = KEYS + LANES;        // of scores: rows a power of two apart would share few lines of the cache
constexpr int SQUARE = QUERIES * ROW;

struct Matrix {  // of one sample and head: token t at data + t * stride
  bf16* data;
  long stride;
  bf16* at(int token) const { return data + token * stride; }
};

struct Item {  // what a thread takes: a sample, and query heads [first_head, last_head) that share a key head
  int row, token, length, key_head, part, first_head, last_head;

  Item(const Work& work, int number) {
    const int* sample = work.samples + 2 * (number / (work.key_heads * work.parts));
    row = sample[0] / work.row_width;
    token = sample[0] % work.row_width;
    length = sample[1];
    key_head = number / work.parts % work.key_heads;
    part = number % work.parts;
    int sharing = work.heads / work.key_heads, taken = sharing / work.parts;
    first_head = key_head * sharing + part * taken;
    last_head = first_head + taken;
  }

  Matrix of(const View& x, int head) const {
    return {x.data + row * x.batch + head * x.head + token * x.token, x.token};
  }

  template <class Number>  // of (B, T, H): token t at [t * heads]
  Number* of(Number* x, const Work& work, int head) const {
    return x + ((long)row * work.row_width + token) * work.heads + head;
  }
};

struct Block {  // of queries and keys of a sample; numbered from the block's first
  int first_query, queries, first_key, keys, window;

  int begin(int query) const { return max(0, first_query + query - window + 1 - first_key); }  // keys it sees
  int end(int query) const { return min(keys, first_query + query + 1 - first_key); }
  int first_row(int key) const { return max(0, first_key + key - first_query); }  // the first query that sees it
};

int first_block(int query, int window) { return max(0, query - window + 1) / PANEL * PANEL; }

inline void scale(float* x, int numbers, __m512 factor) {
  for (int j = 0; j < numbers; j += LANES) _mm512_storeu_ps(x + j, _mm512_mul_ps(factor, _mm512_loadu_ps(x + j)));
}

inline void round_row(const float* x, int numbers, __m512 factor, bf16* into) {
  for (int j = 0; j < numbers; j += LANES) store_rounded(into + j, _mm512_mul_ps(factor, _mm512_loadu_ps(x + j)));
}

// into (queries, keys) = a x^T, where any key is seen; `columns` are what `pair_columns` makes of x.
void multiply_scores(const Block& block, Left a, const bf16* columns, int head_dim, float* into) {
  for (int n = 0; n < block.keys; n += PANEL) {
    int vectors = round_up(min(PANEL, block.keys - n), LANES) / LANES;
    Right panel{columns + (long)(block.first_key + n) * head_dim, 2 * PANEL};
    for (int q = block.first_row(n) / TILE * TILE; q < block.queries; q += TILE) {
      int rows = min(TILE, block.queries - q);
      multiply(rows, vectors, a.at(q, 0), panel, head_dim / 2, into + q * ROW + n, ROW, false);
    }
  }
}

// sums (queries, head_dim) += x (queries, keys) b.
void add_over_keys(const Block& block, const bf16* x, Right b, int head_dim, float* sums) {
  for (int n = 0; n < head_dim; n += PANEL) {
    int vectors = min(PANEL, head_dim - n) / LANES;
    for (int q = 0; q < block.queries; q += TILE) {
      int rows = min(TILE, block.queries - q), pairs = (block.end(q + rows - 1) + 1) / 2;
      multiply(rows, vectors, {x + q * ROW, ROW, 2}, b.at(0, n), pairs, sums + q * head_dim + n, head_dim, true);
    }
  }
}

// sums (keys, head_dim) += x^T b, where x (queries, keys) is paired.
void add_over_queries(const Block& block, const bf16* x, Right b, int head_dim, float* sums) {
  const Left transposed{x, 2, 2 * ROW};
  for (int n = 0; n < head_dim; n += PANEL) {
    int vectors = min(PANEL, head_dim - n) / LANES;
    for (int k = 0; k < block.keys; k += TILE) {
      int rows = min(TILE, block.keys - k), first = block.first_row(k) / 2, pairs = (block.queries + 1) / 2 - first;
      float* into = sums + k * head_dim + n;
      multiply(rows, vectors, transposed.at(k, first), b.at(first, n), pairs, into, head_dim, true);
    }
  }
}

struct Softmax {  // of a block of queries, over the keys so far; exponents are of two
  float largest[QUERIES], totals[QUERIES];

  // Probabilities of one more block of keys to the largest score so far, rounded; `sums` of earlier ones follow it.
  void add(const Block& block, const float* scores, float factor, bf16* probabilities, float* sums, int head_dim) {
    const __m512 factors = _mm512_set1_ps(factor);
    for (int i = 0; i < block.queries; i++) {
      const float* s = scores + i * ROW;
      bf16* p = probabilities + i * ROW;
      int begin = block.begin(i), end = block.end(i), aligned = begin / LANES * LANES;
      memset(p, 0, sizeof(bf16) * round_up(block.keys, LANES));
      if (begin >= end) continue;
      __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
      for (int n = aligned; n < end; n += LANES)
        most = _mm512_mask_max_ps(most, lanes_of(begin, end, n), most, _mm512_loadu_ps(s + n));
      float largest_now = fmaxf(largest[i], _mm512_reduce_max_ps(most) * factor);
      for (int n = aligned; n < end; n += LANES) {
        __m512 exponent = _mm512_fmsub_ps(_mm512_loadu_ps(s + n), factors, _mm512_set1_ps(largest_now));
        __m512 x = _mm512_maskz_mov_ps(lanes_of(begin, end, n), exp2(exponent));
        total = _mm512_add_ps(total, x);
        store_rounded(p + n, x);
      }
      if (largest_now != largest[i] && totals[i] != 0) {
        __m512 rescaling = exp2(_mm512_set1_ps(largest[i] - largest_now));
        totals[i] *= _mm512_cvtss_f32(rescaling);
        scale(sums + i * head_dim, head_dim, rescaling);
      }
      largest[i] = largest_now;
      totals[i] += _mm512_reduce_add_ps(total);
    }
  }
};

void attend(const Work& work, const Item& item, const View* views, float* normalizers, Scratch scratch) {
  const int length = item.length, padded = round_up(length, PANEL), head_dim = work.head_dim;
  const float factor = work.scaling * (float)M_LOG2E;
  bf16* key_columns = scratch.take<bf16>((long)padded * head_dim);
  bf16* value_rows = scratch.take<bf16>((long)padded * head_dim);
  float* scores = scratch.take<float>(SQUARE);
  bf16* probabilities = scratch.take<bf16>(SQUARE);
  float* sums = scratch.take<float>(QUERIES * head_dim);
  Matrix key = item.of(views[1], item.key_head), value = item.of(views[2], item.key_head);
  pair_columns(key.data, key.stride, length, head_dim, key_columns);
  pair_rows(value.data, value.stride, length, head_dim, value_rows);
  for (int head = item.first_head; head < item.last_head; head++) {
    Matrix query = item.of(views[0], head), output = item.of(views[3], head);
    float* normalizer = item.of(normalizers, work, head);
    for (int first = 0; first < length; first += QUERIES) {
      int queries = min(QUERIES, length - first);
      Softmax softmax;
      for (int i = 0; i < queries; i++) softmax.largest[i] = -INFINITY, softmax.totals[i] = 0;
      memset(sums, 0, sizeof(float) * queries * head_dim);
      for (int at = first_block(first, work.window); at < first + queries; at += KEYS) {
        Block block{first, queries, at, min(KEYS, first + queries - at), work.window};
        Left rows{query.at(first), query.stride, 2};
        multiply_scores(block, rows, key_columns, head_dim, scores);
        softmax.add(block, scores, factor, probabilities, sums, head_dim);
        Right values{value_rows + (long)at * head_dim, 2L * head_dim};
        add_over_keys(block, probabilities, values, head_dim, sums);
      }
      for (int i = 0; i < queries; i++) {
        round_row(sums + i * head_dim, head_dim, _mm512_set1_ps(1 / softmax.totals[i]), output.at(first + i));
        normalizer[(long)(first + i) * work.heads] = softmax.largest[i] * (float)M_LN2 + logf(softmax.totals[i]);
      }
    }
  }
}

struct Gradients {  // of the scores of a block
  float shifts[QUERIES], products[QUERIES];  // normaliser, as an exponent of two, and <dO, O> of each query
  bf16 *probability_pairs, *pairs, *rows;    // P and dS paired along the queries, and dS

  // P = 2^(factor s - shift) and dS = P (dP - <dO, O>).
  void compute(const Block& block, const float* scores, const float* grads, float factor) const {
    const __m512 factors = _mm512_set1_ps(factor);
    for (int i = 0; i < block.queries; i += 2) {
      int n = 0, end = block.end(min(i + 1, block.queries - 1));
      for (; n < end; n += LANES) {
        __m512 p[2], d[2];
        for (int j = 0; j < 2; j++) {
          int query = min(i + j, block.queries - 1);
          bool exists = i + j < block.queries;
          __mmask16 seen = exists ? lanes_of(block.begin(query), block.end(query), n) : (__mmask16)0;
          __m512 s = _mm512_loadu_ps(scores + query * ROW + n), g = _mm512_loadu_ps(grads + query * ROW + n);
          p[j] = _mm512_maskz_mov_ps(seen, exp2(_mm512_fmsub_ps(s, factors, _mm512_set1_ps(shifts[query]))));
          d[j] = _mm512_maskz_mul_ps(seen, p[j], _mm512_sub_ps(g, _mm512_set1_ps(products[query])));
          if (exists) store_rounded(rows + query * ROW + n, d[j]);
        }
        store_paired(probability_pairs + i * ROW + 2 * n, p[0], p[1]);
        store_paired(pairs + i * ROW + 2 * n, d[0], d[1]);
      }
      if (n >= block.keys) continue;
      const long hidden = sizeof(bf16) * (round_up(block.keys, LANES) - n);  // products read on to the end of a tile
      memset(probability_pairs + i * ROW + 2 * n, 0, 2 * hidden);
      memset(pairs + i * ROW + 2 * n, 0, 2 * hidden);
      for (int query = i; query < min(i + 2, block.queries); query++) memset(rows + query * ROW + n, 0, hidden);
    }
  }
};

void attend_backward(const Work& work, const Item& item, const View* views, const float* normalizers, Scratch scratch) {
  const int length = item.length, padded = round_up(length, PANEL), head_dim = work.head_dim;
  const long whole = (long)padded * head_dim;
  bf16* key_columns = scratch.take<bf16>(whole);
  bf16* key_rows = scratch.take<bf16>(whole);
  bf16* value_columns = scratch.take<bf16>(whole);
  float* key_sums = scratch.take<float>(whole);
  float* value_sums = scratch.take<float>(whole);
  float* scores = scratch.take<float>(SQUARE);
  float* grads = scratch.take<float>(SQUARE);
  Gradients gradients;
  gradients.probability_pairs = scratch.take<bf16>(SQUARE);
  gradients.pairs = scratch.take<bf16>(SQUARE);
  gradients.rows = scratch.take<bf16>(SQUARE);
  bf16* query_rows = scratch.take<bf16>(QUERIES * head_dim);
  bf16* grad_rows = scratch.take<bf16>(QUERIES * head_dim);
  float* query_sums = scratch.take<float>(QUERIES * head_dim);
  Matrix key = item.of(views[2], item.key_head), value = item.of(views[3], item.key_head);
  pair_columns(key.data, key.stride, length, head_dim, key_columns);
  pair_rows(key.data, key.stride, length, head_dim, key_rows);
  pair_columns(value.data, value.stride, length, head_dim, value_columns);
  memset(key_sums, 0, sizeof(float) * whole);
  memset(value_sums, 0, sizeof(float) * whole);
  const Right keys{key_rows, 2L * head_dim};
  const Right query_pairs{query_rows, 2L * head_dim}, grad_pairs{grad_rows, 2L * head_dim};
  for (int head = item.first_head; head < item.last_head; head++) {
    Matrix grad = item.of(views[0], head), query = item.of(views[1], head), output = item.of(views[4], head);
    Matrix grad_query = item.of(views[5], head);
    const float* normalizer = item.of(normalizers, work, head);
    for (int first = 0; first < length; first += QUERIES) {
      int queries = min(QUERIES, length - first);
      pair_rows(query.at(first), query.stride, queries, head_dim, query_rows);
      pair_rows(grad.at(first), grad.stride, queries, head_dim, grad_rows);
      memset(query_sums, 0, sizeof(float) * queries * head_dim);
      for (int i = 0; i < queries; i++) {
        __m512 sum = _mm512_setzero_ps();
        for (int j = 0; j < head_dim; j += LANES)
          sum = _mm512_fmadd_ps(widened(output.at(first + i) + j), widened(grad.at(first + i) + j), sum);
        gradients.products[i] = _mm512_reduce_add_ps(sum);
        gradients.shifts[i] = normalizer[(long)(first + i) * work.heads] * (float)M_LOG2E;
      }
      for (int at = first_block(first, work.window); at < first + queries; at += KEYS) {
        Block block{first, queries, at, min(KEYS, first + queries - at), work.window};
        const Left queried{query.at(first), query.stride, 2}, received{grad.at(first), grad.stride, 2};
        const long begin = (long)at * head_dim;
        multiply_scores(block, queried, key_columns, head_dim, scores);
        multiply_scores(block, received, value_columns, head_dim, grads);
        gradients.compute(block, scores, grads, work.scaling * (float)M_LOG2E);
        add_over_queries(block, gradients.probability_pairs, grad_pairs, head_dim, value_sums + begin);
        add_over_queries(block, gradients.pairs, query_pairs, head_dim, key_sums + begin);
        add_over_keys(block, gradients.rows, keys.at(at / 2, 0), head_dim, query_sums);
      }
      for (int i = 0; i < queries; i++)
        round_row(query_sums + i * head_dim, head_dim, _mm512_set1_ps(work.scaling), grad_query.at(first + i));
    }
  }
  int written = item.key_head * work.parts + item.part;
  Matrix grad_key = item.of(views[6], written), grad_value = item.of(views[7], written);
  for (int i = 0; i < length; i++) {
    round_row(key_sums + (long)i * head_dim, head_dim, _mm512_set1_ps(work.scaling), grad_key.at(i));
    round_row(value_sums + (long)i * head_dim, head_dim, _mm512_set1_ps(1), grad_value.at(i));
  }
}

}  // namespace

extern "C" {

// Bytes that a thread needs for samples of this length.
long attention_scratch(int length, int head_dim, int backward) {
  long whole = (long)round_up(length, PANEL) * head_dim, queries = QUERIES * head_dim;
  long bf16s = backward ? 3 * whole + 3 * SQUARE + 2 * queries : 2 * whole + SQUARE;
  long floats = backward ? 2 * whole + 2 * SQUARE + queries : SQUARE + queries;
  return bf16s * sizeof(bf16) + floats * sizeof(float) + 64 * 16;  // each begins at a multiple of 64
}

// views: query, key, value, output; normalizers (B, T, H).
void attention(const Work* work, const View* views, float* normalizers) {
#pragma omp parallel for num_threads(work->threads) schedule(dynamic, 1)
  for (int i = 0; i < work->num_items(); i++)
    attend(*work, Item(*work, i), views, normalizers, work->scratch_of(omp_get_thread_num()));
}

// views: gradient of the output, query, key, value, output, gradients of query, key and value. The last two have
// `parts` heads for each key head, to be added up.
void attention_backward(const Work* work, const View* views, const float* normalizers) {
#pragma omp parallel for num_threads(work->threads) schedule(dynamic, 1)
  for (int i = 0; i < work->num_items(); i++)
    attend_backward(*work, Item(*work, i), views, normalizers, work->scratch_of(omp_get_thread_num()));
}

}  // extern "C"
