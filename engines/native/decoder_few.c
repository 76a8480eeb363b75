/* Attention over a cache for the few tokens that are decoded or were guessed, in float32.
 *
 * The cache is read once for HEADS heads at a time, which is what takes the time. Each token is
 * computed in the same order of operations however many there are. */

#include "decoder.h"

#if defined(__x86_64__)

#include "vector_avx512.h"
#include "vector_functions.h"

#include <stdlib.h>
#include <string.h>

#define HEADS 4 /* at a time: 16 registers of sums, 4 of values */
#define WIDE 4  /* vectors of channels at a time */
#define NEVER -1e30f

OF_AVX512 void rotate(const struct cached_attention *call, const float *x, size_t position, float *y) {
  size_t half = call->size / 2;
  const float *cos = call->cos + position * half, *sin = call->sin + position * half;
  for (size_t i = 0; i < half; i += LANES) {
    __mmask16 mask = lanes_left(half - i);
    __m512 c = _mm512_maskz_loadu_ps(mask, cos + i), s = _mm512_maskz_loadu_ps(mask, sin + i);
    __m512 low = _mm512_maskz_loadu_ps(mask, x + i);
    __m512 high = _mm512_maskz_loadu_ps(mask, x + half + i);
    __m512 turned = _mm512_fmsub_ps(low, c, _mm512_mul_ps(high, s));
    __m512 other = _mm512_fmadd_ps(high, c, _mm512_mul_ps(low, s));
    _mm512_mask_storeu_ps(y + i, mask, turned);
    _mm512_mask_storeu_ps(y + half + i, mask, other);
  }
}

/* The sums of 16 vectors, as one. */
OF_AVX512 INLINE __m512 sums_of(const __m512 *x) {
  __m512 pairs[8], fours[4], eights[2];
  for (int i = 0; i < 8; i++)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                             _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    __m512d low = _mm512_castps_pd(pairs[2 * i]), high = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  /* of four lanes each, those of vectors 0-3, 4-7, 8-11, 12-15 */
  for (int i = 0; i < 2; i++)
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                       _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

/* Scores of `heads` heads with 16 keys, `known` of which there are; in log2. */
OF_AVX512 INLINE void score_keys(const float *q, const float *k, size_t size, size_t known,
                              const int heads, float scale, float *scores, size_t stride,
                              __m512 *most) {
  __m512 parts[HEADS][LANES];
  for (size_t key = 0; key < LANES; key++, k += size)
    for (int h = 0; h < heads; h++) {
      __m512 part = _mm512_setzero_ps();
      if (key < known)
        for (size_t d = 0; d < size; d += LANES)
          part = _mm512_fmadd_ps(_mm512_load_ps(q + (size_t)h * size + d), _mm512_loadu_ps(k + d),
                                 part);
      parts[h][key] = part;
    }
  for (int h = 0; h < heads; h++) {
    __m512 score = _mm512_mul_ps(sums_of(parts[h]), _mm512_set1_ps(scale));
    score = _mm512_mask_mov_ps(_mm512_set1_ps(NEVER), lanes_left(known), score);
    _mm512_store_ps(scores + (size_t)h * stride, score);
    most[h] = _mm512_max_ps(most[h], score);
  }
}

/* Weighted sums of `width` vectors of channels. */
OF_AVX512 INLINE void sum_values(const float *weights, size_t stride, const float *v, size_t size,
                              size_t keys, const int heads, const int width, const float *shares,
                              float *out) {
  __m512 sums[HEADS][WIDE];
#pragma GCC unroll 4
  for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
    for (int i = 0; i < width; i++) sums[h][i] = _mm512_setzero_ps();
  for (size_t t = 0; t < keys; t++) {
#pragma GCC unroll 4
    for (int i = 0; i < width; i++) {
      __m512 value = _mm512_loadu_ps(v + t * size + LANES * (size_t)i);
#pragma GCC unroll 4
      for (int h = 0; h < heads; h++) {
        __m512 weight = _mm512_set1_ps(weights[(size_t)h * stride + t]);
        sums[h][i] = _mm512_fmadd_ps(weight, value, sums[h][i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
    for (int i = 0; i < width; i++)
      _mm512_storeu_ps(out + (size_t)h * size + LANES * (size_t)i,
                       _mm512_mul_ps(sums[h][i], _mm512_set1_ps(shares[h])));
}

/* `heads` heads of one token, q of which are rotated, over `keys` keys. */
OF_AVX512 INLINE void attend_heads(const struct cached_attention *call, const float *q, const float *k,
                                const float *v, size_t keys, const int heads, float *scores,
                                float *out) {
  size_t size = call->size, stride = rounded_up(keys, LANES);
  float scale = call->scale * 1.44269504f, shares[HEADS];
  __m512 most[HEADS];
  for (int h = 0; h < heads; h++) most[h] = _mm512_set1_ps(NEVER);
  for (size_t t = 0; t < keys; t += LANES)
    score_keys(q, k + t * size, size, keys - t < LANES ? keys - t : LANES, heads, scale, scores + t,
               stride, most);
  for (int h = 0; h < heads; h++) {
    float *row = scores + (size_t)h * stride;
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most[h])), total = _mm512_setzero_ps();
    for (size_t t = 0; t < keys; t += LANES) {
      __m512 p = power_of_two(_mm512_sub_ps(_mm512_load_ps(row + t), top));
      total = _mm512_add_ps(total, p);
      _mm512_store_ps(row + t, p);
    }
    shares[h] = 1.0f / _mm512_reduce_add_ps(total);
  }
  size_t d = 0;
  for (; d + WIDE * LANES <= size; d += WIDE * LANES)
    sum_values(scores, stride, v + d, size, keys, heads, WIDE, shares, out + d);
  for (; d < size; d += LANES)
    sum_values(scores, stride, v + d, size, keys, heads, 1, shares, out + d);
}

static void add_to_cache(const struct cached_attention *call, size_t batch, size_t kv_head,
                         size_t begin) {
  size_t size = call->size, cache = (batch * call->kv_heads + kv_head) * call->context;
  for (size_t row = 0; row < call->queries; row++) {
    size_t from = ((batch * call->queries + row) * call->kv_heads + kv_head) * size;
    size_t to = (cache + begin + row) * size;
    rotate(call, call->k + from, begin + row, call->key + to);
    memcpy(call->value + to, call->v + from, size * sizeof(float));
  }
}

OF_AVX512 int attend_few(const struct cached_attention *call, size_t batch, size_t kv_head) {
  size_t size = call->size, group = call->heads / call->kv_heads;
  size_t begin = (size_t)call->last[batch] + 1 - call->queries;
  size_t stride = rounded_up(begin + call->queries, LANES);
  size_t cache = (batch * call->kv_heads + kv_head) * call->context * size;
  float *q = aligned_alloc(64, HEADS * (rounded_up(size, LANES) + stride) * sizeof(float));
  float *scores = q + HEADS * rounded_up(size, LANES);
  if (q == NULL) return -1;
  add_to_cache(call, batch, kv_head, begin);
  const float *k = call->key + cache, *v = call->value + cache;
  for (size_t row = 0; row < call->queries; row++)
    for (size_t h = 0; h < group;) {
      size_t at = ((batch * call->queries + row) * call->heads + kv_head * group + h) * size;
      size_t heads = group - h < HEADS ? group - h : HEADS, keys = begin + row + 1;
      for (size_t i = 0; i < heads; i++)
        rotate(call, call->q + at + i * size, begin + row, q + i * size);
      switch (heads) {
        case 1: attend_heads(call, q, k, v, keys, 1, scores, call->out + at); break;
        case 2: attend_heads(call, q, k, v, keys, 2, scores, call->out + at); break;
        case 3: attend_heads(call, q, k, v, keys, 3, scores, call->out + at); break;
        default: attend_heads(call, q, k, v, keys, HEADS, scores, call->out + at);
      }
      h += heads;
    }
  free(q);
  return 0;
}

#else

void rotate(const struct cached_attention *call, const float *x, size_t position, float *y) {
  (void)call, (void)x, (void)position, (void)y;
}

int attend_few(const struct cached_attention *call, size_t batch, size_t kv_head) {
  return (void)call, (void)batch, (void)kv_head, -1;
}

#endif
