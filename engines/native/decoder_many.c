/* Causal attention over a cache for many tokens at a time, with products in bfloat16.
 *
 * Queries and keys are rounded one by one, and a token attends to the keys before it and its own, so
 * its answer is the same whatever comes behind it and however a prompt is divided. All scores of
 * ROWS queries lie in the cache at once, so there is no rescaling on the way; what lies behind the
 * last of them is never computed.
 */

#include "decoder.h"

#if defined(__x86_64__)

#include "vector_avx512.h"
#include "vector_functions.h"

#include <stdlib.h>
#include <string.h>

#define BF16 OF_AVX512_BF16
#define ROWS 6  /* queries at a time: with WIDTH vectors of 16, 24 of 32 registers */
#define WIDTH 4 /* vectors of 16 keys, or of 16 channels */
#define NEVER -1e30f

struct block {
  size_t size, stride, padded, keys; /* padded: rows of scores; keys: that any of the rows sees */
  const uint8_t *k, *v;    /* [keys / 16][size / 2][16][2] and [keys / 2][size][2] bfloat16 */
  uint16_t *q, *weights;   /* [ROWS][size], [ROWS][padded] bfloat16 */
  float *scores;           /* [ROWS][padded] */
  float total[ROWS];
  size_t last[ROWS];       /* the position of each row */
};

static size_t known(const struct cached_attention *call, size_t batch) {
  return (size_t)call->last[batch] + 1;
}

/* Keys of the longest row, in whole blocks. */
static size_t padded_keys(const struct cached_attention *call) {
  size_t most = 0;
  for (size_t b = 0; b < call->batch; b++)
    if (known(call, b) > most) most = known(call, b);
  return rounded_up(most, KEYS_AT_A_TIME);
}

void *reserve_keys(const struct cached_attention *call) {
  size_t values = call->batch * call->kv_heads * padded_keys(call) * call->size;
  return aligned_alloc(64, 2 * values * sizeof(uint16_t));
}

/* Where keys of a head lie, and behind them its values. */
static uint8_t *packed(const struct cached_attention *call, const void *memory, size_t batch,
                       size_t kv_head) {
  size_t each = 2 * padded_keys(call) * call->size * sizeof(uint16_t);
  return (uint8_t *)memory + (batch * call->kv_heads + kv_head) * each;
}

BF16 INLINE __m256i in_bfloat16(const float *x) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x));
}

BF16 static void pack_key(const float *x, size_t size, uint8_t *group, size_t lane) {
  uint32_t pairs[LANES / 2];
  for (size_t d = 0; d < size; d += LANES) {
    _mm256_storeu_si256((__m256i *)pairs, in_bfloat16(x + d));
    for (size_t i = 0; i < LANES / 2; i++)
      memcpy(group + ((d / 2 + i) * LANES + lane) * 4, pairs + i, 4);
  }
}

BF16 static void pack_values(const float *x, const float *next, size_t size, uint8_t *to) {
  for (size_t d = 0; d < size; d += LANES) {
    __m512i low = _mm512_cvtepu16_epi32(in_bfloat16(x + d));
    __m512i high = next == NULL ? _mm512_setzero_si512()
                                : _mm512_cvtepu16_epi32(in_bfloat16(next + d));
    _mm512_storeu_si512(to + d * 4, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

BF16 void pack_keys(const struct cached_attention *call, void *memory, size_t batch,
                    size_t kv_head, size_t first) {
  size_t size = call->size, count = known(call, batch), begin = count - call->queries;
  size_t last = first + KEYS_AT_A_TIME;
  size_t cache = (batch * call->kv_heads + kv_head) * call->context * size;
  float *k = call->key + cache, *v = call->value + cache;
  uint8_t *keys = packed(call, memory, batch, kv_head);
  uint8_t *values = keys + padded_keys(call) * size * sizeof(uint16_t);
  if (first >= count) return;
  for (size_t t = first > begin ? first : begin; t < last && t < count; t++) {
    size_t from = ((batch * call->queries + t - begin) * call->kv_heads + kv_head) * size;
    rotate(call, call->k + from, t, k + t * size);
    memcpy(v + t * size, call->v + from, size * sizeof(float));
  }
  for (size_t t = first; t < last; t++) {
    uint8_t *group = keys + t / LANES * LANES * size * sizeof(uint16_t);
    if (t < count) {
      pack_key(k + t * size, size, group, t % LANES);
    } else {
      for (size_t i = 0; i < size / 2; i++) memset(group + (i * LANES + t % LANES) * 4, 0, 4);
    }
  }
  for (size_t t = first; t < last; t += 2) {
    uint8_t *to = values + t * size * sizeof(uint16_t);
    if (t < count)
      pack_values(v + t * size, t + 1 < count ? v + (t + 1) * size : NULL, size, to);
    else
      memset(to, 0, 2 * size * sizeof(uint16_t));
  }
}

/* Scores of ROWS queries and `width` vectors of keys, in log2, and the largest so far of each query;
 * masked: some of the keys are behind some of the queries. */
BF16 INLINE void score_tile(const struct block *b, size_t first, const int width, const int masked,
                            float scale, __m512 *most) {
  __m512 sums[ROWS][WIDTH];
  size_t words = b->size / 2, group = LANES * 2 * b->size;
  const uint8_t *k = b->k + first * 2 * b->size;
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int i = 0; i < width; i++) sums[r][i] = _mm512_setzero_ps();
  for (size_t word = 0; word < words; word++) {
    __m512i keys[WIDTH];
#pragma GCC unroll 4
    for (int i = 0; i < width; i++)
      keys[i] = _mm512_loadu_si512(k + (size_t)i * group + word * 4 * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int32_t two;
      memcpy(&two, b->q + (size_t)r * b->size + word * 2, 4);
      __m512bh query = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int i = 0; i < width; i++)
        sums[r][i] = _mm512_dpbf16_ps(sums[r][i], (__m512bh)keys[i], query);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < width; i++) {
    size_t at = first + LANES * (size_t)i;
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      __m512 score = _mm512_mul_ps(sums[r][i], _mm512_set1_ps(scale));
      if (masked) {
        __mmask16 seen = b->last[r] < at ? 0 : lanes_left(b->last[r] - at + 1);
        score = _mm512_mask_mov_ps(_mm512_set1_ps(NEVER), seen, score);
      }
      _mm512_storeu_ps(b->scores + (size_t)r * b->padded + at, score);
      most[r] = _mm512_max_ps(most[r], score);
    }
  }
}

BF16 static void all_scores(const struct block *b, float scale, __m512 *most) {
  size_t at = 0, wide = LANES * WIDTH, whole = (b->last[0] + 1) / LANES * LANES;
  for (int r = 0; r < ROWS; r++) most[r] = _mm512_set1_ps(NEVER);
  for (; at + wide <= whole; at += wide) score_tile(b, at, WIDTH, 0, scale, most);
  if (at + 2 * LANES <= whole) score_tile(b, at, 2, 0, scale, most), at += 2 * LANES;
  if (at < whole) score_tile(b, at, 1, 0, scale, most), at += LANES;
  for (; at < b->keys; at += LANES) score_tile(b, at, 1, 1, scale, most);
}

BF16 static void all_weights(struct block *b, const __m512 *most) {
  for (size_t r = 0; r < ROWS; r++) {
    const float *scores = b->scores + r * b->padded;
    uint16_t *weights = b->weights + r * b->padded;
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most[r])), total = _mm512_setzero_ps();
    for (size_t t = 0; t < b->keys; t += LANES) {
      __m512 p = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + t), top));
      total = _mm512_add_ps(total, p);
      _mm256_storeu_si256((__m256i *)(weights + t), (__m256i)_mm512_cvtneps_pbh(p));
    }
    b->total[r] = _mm512_reduce_add_ps(total);
  }
}

/* Sums of ROWS queries in `width` vectors of channels. */
BF16 INLINE void sum_tile(const struct block *b, size_t first, const int width, float *out,
                          size_t rows) {
  __m512 sums[ROWS][WIDTH];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int i = 0; i < width; i++) sums[r][i] = _mm512_setzero_ps();
  for (size_t t = 0; t < b->keys; t += 2) {
    __m512i values[WIDTH];
#pragma GCC unroll 4
    for (int i = 0; i < width; i++)
      values[i] = _mm512_loadu_si512(b->v + (t / 2 * b->size + first + LANES * (size_t)i) * 4);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int32_t two;
      memcpy(&two, b->weights + (size_t)r * b->padded + t, 4);
      __m512bh weight = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int i = 0; i < width; i++)
        sums[r][i] = _mm512_dpbf16_ps(sums[r][i], weight, (__m512bh)values[i]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
    if ((size_t)r >= rows) continue;
    __m512 share = _mm512_set1_ps(1.0f / b->total[r]);
#pragma GCC unroll 4
    for (int i = 0; i < width; i++)
      _mm512_storeu_ps(out + (size_t)r * b->stride + first + LANES * (size_t)i,
                       _mm512_mul_ps(sums[r][i], share));
  }
}

BF16 static void all_sums(const struct block *b, float *out, size_t rows) {
  size_t d = 0, wide = LANES * WIDTH;
  for (; d + wide <= b->size; d += wide) sum_tile(b, d, WIDTH, out, rows);
  if (d + 2 * LANES <= b->size) sum_tile(b, d, 2, out, rows), d += 2 * LANES;
  if (d < b->size) sum_tile(b, d, 1, out, rows);
}

/* Up to ROWS queries, rotated, in bfloat16; the others are zeros and stand at the last position. */
BF16 static void pack_queries(const struct cached_attention *call, struct block *b, const float *q,
                              size_t position, size_t rows, float *turned) {
  memset(b->q, 0, ROWS * b->size * sizeof(uint16_t));
  for (size_t r = 0; r < ROWS; r++) {
    b->last[r] = position + (r < rows ? r : rows - 1);
    if (r >= rows) continue;
    rotate(call, q + r * b->stride, position + r, turned);
    for (size_t d = 0; d < b->size; d += LANES)
      _mm256_storeu_si256((__m256i *)(b->q + r * b->size + d), in_bfloat16(turned + d));
  }
}

BF16 int attend_many(const struct cached_attention *call, const void *memory, size_t batch,
                     size_t head, size_t first) {
  size_t size = call->size, kv_head = head / (call->heads / call->kv_heads);
  size_t begin = known(call, batch) - call->queries, last = first + QUERIES_AT_A_TIME;
  struct block b = {.size = size, .stride = call->heads * size, .padded = padded_keys(call)};
  b.k = packed(call, memory, batch, kv_head);
  b.v = b.k + b.padded * size * sizeof(uint16_t);
  size_t bytes = ROWS * b.padded * 6 + (2 * ROWS + 4) * size;
  b.scores = aligned_alloc(64, rounded_up(bytes, 64));
  if (b.scores == NULL) return -1;
  b.weights = (uint16_t *)(b.scores + ROWS * b.padded);
  b.q = b.weights + ROWS * b.padded;
  float *turned = (float *)(b.q + ROWS * size);
  if (last > call->queries) last = call->queries;
  for (size_t row = first; row < last; row += ROWS) {
    __m512 most[ROWS];
    size_t rows = last - row < ROWS ? last - row : ROWS;
    size_t at = (batch * call->queries + row) * b.stride + head * size;
    pack_queries(call, &b, call->q + at, begin + row, rows, turned);
    b.keys = rounded_up(begin + row + rows, LANES);
    all_scores(&b, call->scale * 1.44269504f, most);
    all_weights(&b, most);
    all_sums(&b, call->out + at, rows);
  }
  free(b.scores);
  return 0;
}

#else

void *reserve_keys(const struct cached_attention *call) { return (void)call, (void *)0; }

void pack_keys(const struct cached_attention *call, void *memory, size_t batch, size_t kv_head,
               size_t first) {
  (void)call, (void)memory, (void)batch, (void)kv_head, (void)first;
}

int attend_many(const struct cached_attention *call, const void *memory, size_t batch, size_t head,
                size_t first) {
  return (void)call, (void)memory, (void)batch, (void)head, (void)first, -1;
}

#endif
