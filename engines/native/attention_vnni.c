/* Attention with the 8-bit products of AVX-512 VNNI.
 *
 * Scores: rows of q and k less their means over all tokens, each with a step of its own, q in signed
 * and k in unsigned bytes. A softmax does not see what all scores of a row have in common, so
 *   q . k = (q - mean q) . (k - mean k) + mean q . (k - mean k) + what is the same for all keys:
 * the first part is of integers, the second a float for each key. (Subtracting means: as
 * SageAttention does for k, arXiv 2410.02367.)
 *
 * Weighted sums: in bfloat16 pairs of keys; or, where the processor lacks them, weights in 16 bits
 * as two bytes, v in 8 bits with a step for each channel, less its mean, which weights that sum to
 * one give back.
 *
 * All scores of ROWS queries lie in the cache at once, so there is no rescaling on the way.
 */

#include "attention.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vector_avx512.h"

#define VNNI OF_AVX512_VNNI
#define BF16 OF_AVX512_BF16

#define ROWS 6     /* queries at a time: with WIDTH vectors of 16, 24 of 32 registers */
#define WIDTH 4    /* vectors of 16 keys, or of 16 channels */
#define LARGEST 1e12f /* beyond it, and for NaN and infinity, the plain form answers */
#define NEVER -1e30f  /* the score of keys that pad the last vector */

struct work {
  size_t size, keys, padded_keys, padded_size, stride;
  const float *q, *k, *v;
  float *mean_q, *mean_k, *mean_v, *step_v;
  uint8_t *k8;            /* [keys / 16][size / 4][16][4] */
  float *step_k, *extra;  /* for each key, softmax's scale and log2(e) inside */
  uint8_t *v_packed;      /* [keys / 2][size][2] bfloat16, or [keys / 4][size][4] bytes */
  float *scores;          /* [ROWS][keys] */
  uint8_t *weights;       /* [ROWS][keys] bfloat16, or high bytes and behind all of them low ones */
  int8_t *q8;             /* [ROWS][size] */
  float step_q[ROWS], total[ROWS];
  int32_t offset[ROWS];
};

/* As the intrinsic, around which compilers have moved accumulators to the stack and back. */
VNNI INLINE void add_products(__m512i *sums, __m512i bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(bytes), "v"(signed_bytes));
}

/* Whether all values are of usual size; their sum over rows divided by the count in `mean`. */
VNNI static int means(const float *x, size_t rows, const struct work *w, float *mean) {
  __m512i largest = _mm512_setzero_si512();
  __m512 share = _mm512_set1_ps(1.0f / (float)rows);
  memset(mean, 0, w->padded_size * sizeof(float));
  for (size_t t = 0; t < rows; t++, x += w->stride)
    for (size_t d = 0; d < w->size; d += LANES) {
      __m512 value = _mm512_maskz_loadu_ps(lanes_left(w->size - d), x + d);
      _mm512_storeu_ps(mean + d, _mm512_add_ps(_mm512_loadu_ps(mean + d), value));
      largest = larger_bits(largest, value);
    }
  for (size_t d = 0; d < w->size; d += LANES)
    _mm512_storeu_ps(mean + d, _mm512_mul_ps(_mm512_loadu_ps(mean + d), share));
  union { float value; int32_t bits; } limit = {LARGEST};
  return _mm512_reduce_max_epi32(largest) <= limit.bits;
}

/* The step of (x - mean) in 7 bits and a sign. */
VNNI INLINE float row_step(const float *x, const float *mean, size_t size) {
  __m512 most = _mm512_setzero_ps();
  for (size_t d = 0; d < size; d += LANES) {
    __mmask16 mask = lanes_left(size - d);
    __m512 value = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + d), _mm512_loadu_ps(mean + d));
    most = _mm512_max_ps(most, _mm512_maskz_mov_ps(mask, _mm512_abs_ps(value)));
  }
  return _mm512_reduce_max_ps(most) * (1.0f / 127.0f);
}

/* (x - mean) / step as 16 integers. */
VNNI INLINE __m512i row_codes(const float *x, const float *mean, __m512 inverse, __mmask16 mask) {
  __m512 value = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x), _mm512_loadu_ps(mean));
  return _mm512_maskz_cvtps_epi32(mask, _mm512_mul_ps(value, inverse));
}

VNNI static void pack_keys(struct work *w) {
  size_t size = w->size, words = size / 4;
  float scale = 1.44269504f / sqrtf((float)size);
  for (size_t first = 0; first < w->padded_keys; first += LANES) {
    uint8_t *group = w->k8 + first * size;
    for (size_t lane = 0; lane < LANES; lane++) {
      size_t key = first + lane;
      if (key >= w->keys) {
        for (size_t word = 0; word < words; word++) memset(group + (word * LANES + lane) * 4, 0, 4);
        w->step_k[key] = 0.0f;
        w->extra[key] = NEVER;
        continue;
      }
      const float *x = w->k + key * w->stride;
      float step = row_step(x, w->mean_k, size);
      __m512 inverse = _mm512_set1_ps(step > 0.0f ? 1.0f / step : 0.0f);
      __m512 extra = _mm512_setzero_ps();
      for (size_t d = 0; d < size; d += LANES) {
        __mmask16 mask = lanes_left(size - d);
        uint8_t codes[LANES];
        __m512i code = row_codes(x + d, w->mean_k + d, inverse, mask);
        code = _mm512_add_epi32(code, _mm512_set1_epi32(128));
        _mm_storeu_si128((__m128i *)codes, _mm512_cvtepi32_epi8(code));
        __m512 value = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + d),
                                     _mm512_loadu_ps(w->mean_k + d));
        extra = _mm512_mask3_fmadd_ps(value, _mm512_loadu_ps(w->mean_q + d), extra, mask);
        size_t here = size - d < LANES ? size - d : LANES;
        for (size_t i = 0; i < here; i += 4)
          memcpy(group + ((d + i) / 4 * LANES + lane) * 4, codes + i, 4);
      }
      w->step_k[key] = step * scale;
      w->extra[key] = _mm512_reduce_add_ps(extra) * scale;
    }
  }
}

BF16 static void pack_values_bf16(struct work *w) {
  for (size_t t = 0; t < w->padded_keys; t += 2)
    for (size_t d = 0; d < w->padded_size; d += LANES) {
      __mmask16 mask = d < w->size ? lanes_left(w->size - d) : 0;
      __m512i pair[2];
      for (size_t i = 0; i < 2; i++) {
        __m512 x = _mm512_maskz_loadu_ps(t + i < w->keys ? mask : 0, w->v + (t + i) * w->stride + d);
        pair[i] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
      }
      __m512i both = _mm512_or_si512(pair[0], _mm512_slli_epi32(pair[1], 16));
      _mm512_storeu_si512(w->v_packed + (t / 2 * w->padded_size + d) * 4, both);
    }
}

VNNI static void pack_values_int8(struct work *w) {
  for (size_t d = 0; d < w->padded_size; d += LANES) {
    __mmask16 mask = d < w->size ? lanes_left(w->size - d) : 0;
    __m512 mean = _mm512_maskz_loadu_ps(mask, w->mean_v + d), most = _mm512_setzero_ps();
    for (size_t t = 0; t < w->keys; t++) {
      __m512 x = _mm512_maskz_loadu_ps(mask, w->v + t * w->stride + d);
      most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_sub_ps(x, mean)));
    }
    __m512 step = _mm512_mul_ps(most, _mm512_set1_ps(1.0f / 127.0f));
    __mmask16 some = _mm512_cmp_ps_mask(step, _mm512_setzero_ps(), _CMP_GT_OQ);
    __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), step);
    _mm512_storeu_ps(w->step_v + d, step);
    for (size_t t = 0; t < w->padded_keys; t += 4) {
      __m512i four = _mm512_setzero_si512();
      for (size_t i = 0; i < 4 && t + i < w->keys; i++) {
        __m512 x = _mm512_maskz_loadu_ps(mask, w->v + (t + i) * w->stride + d);
        __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_sub_ps(x, mean), inverse));
        code = _mm512_and_si512(code, _mm512_set1_epi32(255));
        four = _mm512_or_si512(four, _mm512_slli_epi32(code, (unsigned)(8 * i)));
      }
      _mm512_storeu_si512(w->v_packed + (t / 4 * w->padded_size + d) * 4, four);
    }
  }
}

/* Codes of up to ROWS queries; the others of the block are zeros. */
VNNI static void pack_queries(struct work *w, const float *x, size_t rows) {
  memset(w->q8, 0, ROWS * w->size);
  for (size_t r = 0; r < ROWS; r++) w->step_q[r] = 0.0f, w->offset[r] = 0;
  for (size_t r = 0; r < rows; r++, x += w->stride) {
    float step = row_step(x, w->mean_q, w->size);
    __m512 inverse = _mm512_set1_ps(step > 0.0f ? 1.0f / step : 0.0f);
    __m512i sum = _mm512_setzero_si512();
    for (size_t d = 0; d < w->size; d += LANES) {
      __mmask16 mask = lanes_left(w->size - d);
      __m512i code = row_codes(x + d, w->mean_q + d, inverse, mask);
      sum = _mm512_add_epi32(sum, code);
      _mm512_mask_cvtepi32_storeu_epi8(w->q8 + r * w->size + d, mask, code);
    }
    w->step_q[r] = step;
    w->offset[r] = -128 * _mm512_reduce_add_epi32(sum); /* of the keys' zero point */
  }
}

/* Scores of ROWS queries and `width` vectors of keys, and the largest so far of each query. */
VNNI INLINE void scores_tile(const struct work *w, size_t first, const int width, __m512 *most) {
  __m512i acc[ROWS][WIDTH];
  size_t words = w->size / 4, group = LANES * w->size;
  const uint8_t *k = w->k8 + first * w->size;
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < width; v++) acc[r][v] = _mm512_set1_epi32(w->offset[r]);
  for (size_t word = 0; word < words; word++) {
    __m512i keys[WIDTH];
#pragma GCC unroll 4
    for (int v = 0; v < width; v++)
      keys[v] = _mm512_loadu_si512(k + (size_t)v * group + word * 4 * LANES);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int32_t four;
      memcpy(&four, w->q8 + (size_t)r * w->size + word * 4, 4);
      __m512i query = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < width; v++) add_products(&acc[r][v], keys[v], query);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < width; v++) {
    size_t at = first + LANES * (size_t)v;
    __m512 step = _mm512_loadu_ps(w->step_k + at), extra = _mm512_loadu_ps(w->extra + at);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      __m512 score = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][v]), step);
      score = _mm512_fmadd_ps(score, _mm512_set1_ps(w->step_q[r]), extra);
      _mm512_storeu_ps(w->scores + (size_t)r * w->padded_keys + at, score);
      most[r] = _mm512_max_ps(most[r], score);
    }
  }
}

/* 2^x for x up to 0: a polynomial for the part behind the point, right to 3e-6. */
VNNI INLINE __m512 power_of_two(__m512 x) {
  __m512 part = _mm512_reduce_ps(x, 1); /* x - floor(x) */
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(0.013534167f), part, _mm512_set1_ps(0.052011464f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.24144275f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.69300383f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0000026f));
  return _mm512_scalef_ps(y, x);
}

BF16 static void weights_bf16(struct work *w, const __m512 *most) {
  for (size_t r = 0; r < ROWS; r++) {
    const float *scores = w->scores + r * w->padded_keys;
    uint8_t *weights = w->weights + r * w->padded_keys * 2;
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most[r])), total = _mm512_setzero_ps();
    for (size_t t = 0; t < w->padded_keys; t += LANES) {
      __m512 p = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + t), top));
      total = _mm512_add_ps(total, p);
      _mm256_storeu_si256((__m256i *)(weights + t * 2), (__m256i)_mm512_cvtneps_pbh(p));
    }
    w->total[r] = _mm512_reduce_add_ps(total);
  }
}

VNNI static void weights_int16(struct work *w, const __m512 *most) {
  for (size_t r = 0; r < ROWS; r++) {
    const float *scores = w->scores + r * w->padded_keys;
    uint8_t *high = w->weights + r * w->padded_keys, *low = high + ROWS * w->padded_keys;
    __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most[r]));
    __m512 total = _mm512_setzero_ps();
    for (size_t t = 0; t < w->padded_keys; t += LANES) {
      __m512 p = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(scores + t), top));
      __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(p, _mm512_set1_ps(65534.0f)));
      total = _mm512_add_ps(total, _mm512_cvtepi32_ps(code));
      _mm_storeu_si128((__m128i *)(high + t), _mm512_cvtepi32_epi8(_mm512_srli_epi32(code, 8)));
      _mm_storeu_si128((__m128i *)(low + t), _mm512_cvtepi32_epi8(code));
    }
    w->total[r] = _mm512_reduce_add_ps(total);
  }
}

/* Sums of ROWS queries in `width` vectors of channels. */
BF16 INLINE void sums_bf16(const struct work *w, size_t first, const int width, float *out,
                           size_t rows) {
  __m512 acc[ROWS][WIDTH];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < width; v++) acc[r][v] = _mm512_setzero_ps();
  for (size_t t = 0; t < w->padded_keys; t += 2) {
    __m512i values[WIDTH];
#pragma GCC unroll 4
    for (int v = 0; v < width; v++)
      values[v] = _mm512_loadu_si512(w->v_packed +
                                     (t / 2 * w->padded_size + first + LANES * (size_t)v) * 4);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int32_t two;
      memcpy(&two, w->weights + ((size_t)r * w->padded_keys + t) * 2, 4);
      __m512bh weight = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int v = 0; v < width; v++)
        acc[r][v] = _mm512_dpbf16_ps(acc[r][v], weight, (__m512bh)values[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++) {
    if ((size_t)r >= rows) continue;
    __m512 share = _mm512_set1_ps(1.0f / w->total[r]);
#pragma GCC unroll 4
    for (int v = 0; v < width; v++) {
      size_t d = first + LANES * (size_t)v;
      _mm512_mask_storeu_ps(out + (size_t)r * w->stride + d, lanes_left(w->size - d),
                            _mm512_mul_ps(acc[r][v], share));
    }
  }
}

/* The same of bytes; half: 3 queries at a time, as each has two accumulators. */
VNNI INLINE void sums_int8(const struct work *w, size_t first, const int width, float *out,
                           size_t rows, const int begin) {
  __m512i high[ROWS / 2][WIDTH], low[ROWS / 2][WIDTH];
  size_t plane = ROWS * w->padded_keys;
#pragma GCC unroll 3
  for (int r = 0; r < ROWS / 2; r++)
#pragma GCC unroll 4
    for (int v = 0; v < width; v++) high[r][v] = low[r][v] = _mm512_setzero_si512();
  for (size_t t = 0; t < w->padded_keys; t += 4) {
    __m512i values[WIDTH];
#pragma GCC unroll 4
    for (int v = 0; v < width; v++)
      values[v] = _mm512_loadu_si512(w->v_packed +
                                     (t / 4 * w->padded_size + first + LANES * (size_t)v) * 4);
#pragma GCC unroll 3
    for (int r = 0; r < ROWS / 2; r++) {
      const uint8_t *weights = w->weights + (size_t)(begin + r) * w->padded_keys + t;
      int32_t four[2];
      memcpy(&four[0], weights, 4);
      memcpy(&four[1], weights + plane, 4);
      __m512i upper = _mm512_set1_epi32(four[0]), lower = _mm512_set1_epi32(four[1]);
#pragma GCC unroll 4
      for (int v = 0; v < width; v++) {
        add_products(&high[r][v], upper, values[v]);
        add_products(&low[r][v], lower, values[v]);
      }
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < ROWS / 2; r++) {
    size_t row = (size_t)(begin + r);
    if (row >= rows) continue;
    __m512 share = _mm512_set1_ps(1.0f / w->total[row]);
#pragma GCC unroll 4
    for (int v = 0; v < width; v++) {
      size_t d = first + LANES * (size_t)v;
      __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[r][v]), _mm512_set1_ps(256.0f),
                                   _mm512_cvtepi32_ps(low[r][v]));
      sum = _mm512_mul_ps(sum, _mm512_mul_ps(share, _mm512_loadu_ps(w->step_v + d)));
      __mmask16 mask = lanes_left(w->size - d);
      _mm512_mask_storeu_ps(out + row * w->stride + d, mask,
                            _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, w->mean_v + d)));
    }
  }
}

VNNI static void all_scores(struct work *w, __m512 *most) {
  size_t at = 0, wide = LANES * WIDTH;
  for (int r = 0; r < ROWS; r++) most[r] = _mm512_set1_ps(NEVER);
  for (; at + wide <= w->padded_keys; at += wide) scores_tile(w, at, WIDTH, most);
  if (at + 2 * LANES <= w->padded_keys) scores_tile(w, at, 2, most), at += 2 * LANES;
  if (at < w->padded_keys) scores_tile(w, at, 1, most);
}

BF16 static void block_bf16(struct work *w, float *out, size_t rows) {
  __m512 most[ROWS];
  size_t at = 0, wide = LANES * WIDTH;
  all_scores(w, most);
  weights_bf16(w, most);
  for (; at + wide <= w->padded_size; at += wide) sums_bf16(w, at, WIDTH, out, rows);
  if (at + 2 * LANES <= w->padded_size) sums_bf16(w, at, 2, out, rows), at += 2 * LANES;
  if (at < w->padded_size) sums_bf16(w, at, 1, out, rows);
}

VNNI static void block_int8(struct work *w, float *out, size_t rows) {
  __m512 most[ROWS];
  size_t wide = LANES * WIDTH;
  all_scores(w, most);
  weights_int16(w, most);
  for (int half = 0; half < ROWS; half += ROWS / 2) {
    size_t at = 0;
    for (; at + wide <= w->padded_size; at += wide) sums_int8(w, at, WIDTH, out, rows, half);
    if (at + 2 * LANES <= w->padded_size) sums_int8(w, at, 2, out, rows, half), at += 2 * LANES;
    if (at < w->padded_size) sums_int8(w, at, 1, out, rows, half);
  }
}

/* Memory for everything in `w`, to be freed by who asks; NULL where there is none. */
static void *reserve(struct work *w) {
  size_t keys = w->padded_keys, size = w->padded_size, line = 64, total = 0;
  struct { void **where; size_t bytes; } parts[] = {
      {(void **)&w->mean_q, size * 4},   {(void **)&w->mean_k, size * 4},
      {(void **)&w->mean_v, size * 4},   {(void **)&w->step_v, size * 4},
      {(void **)&w->step_k, keys * 4},   {(void **)&w->extra, keys * 4},
      {(void **)&w->k8, keys * w->size}, {(void **)&w->v_packed, keys * size * 2},
      {(void **)&w->scores, ROWS * keys * 4},
      {(void **)&w->weights, ROWS * keys * 2},
      {(void **)&w->q8, ROWS * w->size},
  };
  size_t count = sizeof parts / sizeof *parts;
  for (size_t i = 0; i < count; i++) total += rounded_up(parts[i].bytes, line);
  uint8_t *memory = aligned_alloc(line, total), *next = memory;
  for (size_t i = 0; memory != NULL && i < count; i++) {
    *parts[i].where = next;
    next += rounded_up(parts[i].bytes, line);
  }
  return memory;
}

VNNI int attention_vnni(const struct attention *call, size_t batch, size_t head, size_t first,
                        size_t last, int bf16) {
  struct work w = {.size = call->size, .keys = call->keys, .stride = call->heads * call->size};
  size_t row = batch * call->queries, lane = head * w.size;
  w.padded_keys = rounded_up(w.keys, LANES);
  w.padded_size = rounded_up(w.size, LANES);
  w.q = call->q + row * w.stride + lane;
  w.k = call->k + batch * w.keys * w.stride + lane;
  w.v = call->v + batch * w.keys * w.stride + lane;
  void *memory = reserve(&w);
  if (memory == NULL) return -1;
  int usual = means(w.q, call->queries, &w, w.mean_q);
  usual &= means(w.k, w.keys, &w, w.mean_k);
  usual &= means(w.v, w.keys, &w, w.mean_v);
  if (!usual) {
    free(memory);
    return attention_plain(call, batch, head, first, last);
  }
  pack_keys(&w);
  if (bf16)
    pack_values_bf16(&w);
  else
    pack_values_int8(&w);
  for (size_t at = first; at < last; at += ROWS) {
    size_t rows = last - at < ROWS ? last - at : ROWS;
    float *out = call->out + (row + at) * w.stride + lane;
    pack_queries(&w, w.q + at * w.stride, rows);
    if (bf16)
      block_bf16(&w, out, rows);
    else
      block_int8(&w, out, rows);
  }
  free(memory);
  return 0;
}

#endif
