/* Attention with products of 16-bit integers: VPMADDWD of AVX2, or VPDPWSSD where VNNI is.
 *
 * AVX2's products of bytes add pairs in 16 bits, where they saturate. Those of 16-bit integers are
 * exact in 32 bits, twice as many at a time as products of floats, and leave room for finer steps
 * than bytes: rows of q and k have 12 bits and a step of their own, v has 10 and a step for each
 * channel, weights have 15. Nothing overflows: MOST_CHANNELS * 2047 * 2047, and AT_A_TIME keys *
 * 32767 * 511, are below 2^31.
 *
 * Both products are sums over pairs: of channels for scores, of keys for weighted sums. All scores
 * of ROWS queries lie in the cache at once, so there is no rescaling on the way.
 */

#include "attention.h"

#if defined(__x86_64__)

#include <math.h>
#include <stdlib.h>

#include "vector_avx2.h"

#define ROWS 6  /* queries at a time: with WIDTH vectors of 8 lanes, 12 of 16 registers */
#define WIDTH 2
#define MOST_CHANNELS 512
#define AHEAD 8
#define AT_A_TIME 128 /* keys whose weighted values are summed as integers */
#define MOST_QK 2047.0f
#define MOST_V 511.0f
#define TINY 1e-30f   /* what is smaller is 0 */
#define LARGEST 1e12f /* beyond it, and for NaN and infinity, the plain form answers */
#define NEVER -1e30f  /* the score of keys that pad the last vector */

/* A test gives another prefix, for the same instruction in the encoding of AVX-512. */
#ifndef EDGEVLM_VEX
#define EDGEVLM_VEX "%{vex%} "
#endif

struct work {
  size_t size, keys, padded_size, padded_keys, stride;
  const float *q, *k, *v;
  int16_t *k16;          /* [keys / 8][size / 2][8][2] */
  int16_t *v16;          /* [size / 8][keys / 2][8][2] */
  float *step_k, *never; /* for each key; softmax's scale and log2(e) are in the step */
  float *step_v, *inverse_v;
  int16_t *q16;          /* [ROWS][size] */
  float *scores;         /* [ROWS][keys] */
  int16_t *weights;      /* [ROWS][keys] */
  float *sums;           /* [ROWS][WIDTH][8] */
  float step_q[ROWS], total[ROWS];
};

/* In assembly, as compilers compute products ahead and then move sums to the stack and back. */
OF_AVX2 INLINE void add_products(__m256i *sums, __m256i a, __m256i b, const int vnni) {
#ifndef EDGEVLM_WITHOUT_AVX_VNNI
  if (vnni) {
    __asm__(EDGEVLM_VEX "vpdpwssd %2, %1, %0" : "+x"(*sums) : "x"(a), "x"(b));
    return;
  }
#endif
  (void)vnni;
  __m256i products;
  __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
          : "+x"(*sums), "=&x"(products)
          : "x"(a), "x"(b));
}

/* sums[r][v] = products of pairs of row r of `left` and of `right`'s groups of 8 lanes. */
OF_AVX2 INLINE void multiply(const int16_t *left, size_t row, const int16_t *right, size_t group,
                             size_t pairs, const int width, __m256i sums[ROWS][WIDTH],
                             const int vnni) {
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
    for (int v = 0; v < width; v++) sums[r][v] = _mm256_setzero_si256();
  for (size_t pair = 0; pair < pairs; pair++) {
    __m256i values[WIDTH];
#pragma GCC unroll 2
    for (int v = 0; v < width; v++)
      values[v] = _mm256_loadu_si256((const __m256i *)(right + (size_t)v * group + pair * 16));
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      int32_t two;
      memcpy(&two, left + (size_t)r * row + 2 * pair, 4);
      __m256i both = _mm256_set1_epi32(two);
#pragma GCC unroll 2
      for (int v = 0; v < width; v++) add_products(&sums[r][v], both, values[v], vnni);
    }
  }
}

OF_AVX2 INLINE __m256i in_16_bits(__m256i first, __m256i second) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(first, second), 0xd8);
}

/* Rows of one head lie pages apart, where no processor looks for the next by itself. */
OF_AVX2 INLINE void fetch_ahead(const struct work *w, const float *x, size_t row, size_t rows) {
  if (row + AHEAD >= rows) return;
  for (size_t d = 0; d < w->size; d += 16)
    _mm_prefetch((const char *)(x + (row + AHEAD) * w->stride + d), _MM_HINT_T0);
}

/* Codes of a row in 12 bits; their step, or -1 where a value is not of usual size. */
OF_AVX2 static float round_row(const float *x, size_t size, int16_t *codes) {
  integers most = no_bits();
  for (size_t d = 0; d < size; d += LANES) most = larger_bits(most, load_some(x + d, size - d));
  float largest = largest_of_bits(most), step = largest / MOST_QK;
  if (!(largest <= LARGEST)) return -1.0f;
  vector inverse = all(step > TINY ? 1.0f / step : 0.0f);
  for (size_t d = 0; d < size; d += 2 * LANES) {
    vector next = d + LANES < size ? load_some(x + d + LANES, size - d - LANES) : all(0.0f);
    __m256i first = _mm256_cvtps_epi32(times(load_some(x + d, size - d), inverse));
    __m256i second = _mm256_cvtps_epi32(times(next, inverse));
    _mm256_storeu_si256((__m256i *)(codes + d), in_16_bits(first, second));
  }
  return step;
}

/* 0, or -1 for a key that is not of usual size. `q16` holds a row meanwhile. */
OF_AVX2 static int pack_keys(struct work *w) {
  size_t pairs = w->size / 2;
  float scale = 1.44269504f / sqrtf((float)w->size);
  for (size_t key = 0; key < w->padded_keys; key++) {
    int16_t *lane = w->k16 + (key / LANES * pairs * LANES + key % LANES) * 2;
    float step = 0.0f;
    fetch_ahead(w, w->k, key, w->keys);
    if (key < w->keys)
      step = round_row(w->k + key * w->stride, w->size, w->q16);
    else
      memset(w->q16, 0, w->size * sizeof *w->q16);
    if (step < 0.0f) return -1;
    for (size_t pair = 0; pair < pairs; pair++)
      memcpy(lane + pair * 2 * LANES, w->q16 + 2 * pair, 2 * sizeof *w->q16);
    w->step_k[key] = step * scale;
    w->never[key] = key < w->keys ? 0.0f : NEVER;
  }
  return 0;
}

/* The same for values; `step_v` holds the largest magnitude of each channel first. */
OF_AVX2 static int pack_values(struct work *w) {
  integers most = no_bits();
  for (size_t d = 0; d < w->padded_size; d++) w->step_v[d] = 0.0f;
  for (size_t t = 0; t < w->keys; t++) {
    fetch_ahead(w, w->v, t, w->keys);
    for (size_t d = 0; d < w->size; d += LANES) {
      vector x = load_some(w->v + t * w->stride + d, w->size - d);
      most = larger_bits(most, x);
      store(w->step_v + d, larger(load(w->step_v + d), magnitude(x)));
    }
  }
  if (!(largest_of_bits(most) <= LARGEST)) return -1;
  for (size_t d = 0; d < w->size; d += LANES) {
    vector step = times(load(w->step_v + d), all(1.0f / MOST_V));
    vector some = _mm256_cmp_ps(step, all(TINY), _CMP_GT_OQ);
    store(w->step_v + d, step);
    store(w->inverse_v + d, _mm256_and_ps(some, reciprocal(step)));
  }
  for (size_t t = 0; t < w->padded_keys; t += 2) {
    fetch_ahead(w, w->v, t, w->keys);
    fetch_ahead(w, w->v, t + 1, w->keys);
    for (size_t d = 0; d < w->size; d += LANES) {
      const float *x = w->v + t * w->stride + d;
      vector inverse = load(w->inverse_v + d);
      size_t left = w->size - d;
      vector first = t < w->keys ? load_some(x, left) : all(0.0f);
      vector second = t + 1 < w->keys ? load_some(x + w->stride, left) : all(0.0f);
      __m256i low = _mm256_cvtps_epi32(times(first, inverse));
      __m256i high = _mm256_slli_epi32(_mm256_cvtps_epi32(times(second, inverse)), 16);
      __m256i codes = _mm256_blend_epi16(low, high, 0xaa);
      _mm256_storeu_si256((__m256i *)(w->v16 + d * w->padded_keys + t * LANES), codes);
    }
  }
  return 0;
}

/* Scores of ROWS queries and 16 keys, and the largest so far of each query. */
OF_AVX2 INLINE void scores_of(const struct work *w, size_t first, vector *most, const int vnni) {
  __m256i products[ROWS][WIDTH];
  size_t group = LANES * w->size;
  multiply(w->q16, w->padded_size, w->k16 + first * w->size, group, w->size / 2, WIDTH, products,
           vnni);
#pragma GCC unroll 2
  for (int v = 0; v < WIDTH; v++) {
    size_t at = first + LANES * (size_t)v;
    vector step = load(w->step_k + at), never = load(w->never + at);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++) {
      vector score = times(_mm256_cvtepi32_ps(products[r][v]), step);
      score = times_plus(score, all(w->step_q[r]), never);
      store(w->scores + (size_t)r * w->padded_keys + at, score);
      most[r] = larger(most[r], score);
    }
  }
}

/* round(32767 * 2^x) for x up to 0: a polynomial for the part behind the point, right to 3e-6. */
OF_AVX2 INLINE __m256i weight_of(vector x) {
  x = larger(x, all(-30.0f));
  __m256i whole = _mm256_cvtps_epi32(x);
  vector part = minus(x, _mm256_cvtepi32_ps(whole));
  vector y = times_plus(all(313.583521f), part, all(1832.26059f));
  y = times_plus(y, part, all(7872.18814f));
  y = times_plus(y, part, all(22711.5225f));
  y = times_plus(y, part, all(32766.9758f));
  __m256i power = _mm256_slli_epi32(whole, 23);
  return _mm256_cvtps_epi32(_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power)));
}

/* e^score over the largest of a query, in 15 bits, and their sum. */
OF_AVX2 static void weigh(struct work *w, size_t rows, const vector *most) {
  for (size_t r = 0; r < rows; r++) {
    const float *scores = w->scores + r * w->padded_keys;
    int16_t *weights = w->weights + r * w->padded_keys;
    vector top = all(largest_of(most[r])), total = all(0.0f);
    for (size_t t = 0; t < w->padded_keys; t += 2 * LANES) {
      __m256i low = weight_of(minus(load(scores + t), top));
      __m256i high = weight_of(minus(load(scores + t + LANES), top));
      total = plus(total, _mm256_cvtepi32_ps(_mm256_add_epi32(low, high)));
      _mm256_storeu_si256((__m256i *)(weights + t), in_16_bits(low, high));
    }
    w->total[r] = sum_of(total);
  }
}

/* Weighted sums of ROWS queries in `width` vectors of channels. */
OF_AVX2 INLINE void sums_of(const struct work *w, size_t first, const int width, float *out,
                            size_t rows, const int vnni) {
  __m256i products[ROWS][WIDTH];
  for (size_t key = 0; key < w->padded_keys; key += AT_A_TIME) {
    size_t left = w->padded_keys - key, pairs = (left < AT_A_TIME ? left : AT_A_TIME) / 2;
    multiply(w->weights + key, w->padded_keys, w->v16 + first * w->padded_keys + key * LANES,
             LANES * w->padded_keys, pairs, width, products, vnni);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int v = 0; v < width; v++) {
        float *sum = w->sums + (r * WIDTH + v) * LANES;
        vector more = _mm256_cvtepi32_ps(products[r][v]);
        store(sum, key > 0 ? plus(load(sum), more) : more);
      }
  }
  for (size_t r = 0; r < rows; r++)
    for (size_t v = 0; v < (size_t)width; v++) {
      size_t d = first + LANES * v;
      vector step = times(load(w->step_v + d), all(1.0f / w->total[r]));
      vector sum = times(load(w->sums + (r * WIDTH + v) * LANES), step);
      store_some(out + r * w->stride + d, sum, w->size - d);
    }
}

/* Rounds ROWS queries, those behind `rows` to zeros; -1 if one is not of usual size. */
OF_AVX2 static int pack_queries(struct work *w, const float *x, size_t rows) {
  memset(w->q16, 0, ROWS * w->padded_size * sizeof *w->q16);
  for (size_t r = 0; r < ROWS; r++) {
    w->step_q[r] = r < rows ? round_row(x + r * w->stride, w->size, w->q16 + r * w->padded_size) : 0;
    if (w->step_q[r] < 0.0f) return -1;
  }
  return 0;
}

OF_AVX2 INLINE void attend(struct work *w, float *out, size_t rows, const int vnni) {
  vector most[ROWS];
  size_t d = 0;
  for (int r = 0; r < ROWS; r++) most[r] = all(NEVER);
  for (size_t t = 0; t < w->padded_keys; t += WIDTH * LANES) scores_of(w, t, most, vnni);
  weigh(w, rows, most);
  for (; d + LANES < w->size; d += WIDTH * LANES) sums_of(w, d, WIDTH, out, rows, vnni);
  if (d < w->size) sums_of(w, d, 1, out, rows, vnni);
}

OF_AVX2 static void attend_avx2(struct work *w, float *out, size_t rows) { attend(w, out, rows, 0); }
OF_AVX2 static void attend_vnni(struct work *w, float *out, size_t rows) { attend(w, out, rows, 1); }

/* Memory for everything in `w`, to be freed by who asks; NULL where there is none. */
static void *reserve(struct work *w) {
  size_t keys = w->padded_keys, size = w->padded_size, line = 64, total = 0;
  struct { void **where; size_t bytes; } parts[] = {
      {(void **)&w->k16, keys * size * 2},     {(void **)&w->v16, keys * size * 2},
      {(void **)&w->step_k, keys * 4},         {(void **)&w->never, keys * 4},
      {(void **)&w->step_v, size * 4},         {(void **)&w->q16, ROWS * size * 2},
      {(void **)&w->scores, ROWS * keys * 4},  {(void **)&w->weights, ROWS * keys * 2},
      {(void **)&w->inverse_v, size * 4},      {(void **)&w->sums, ROWS * WIDTH * LANES * 4},
  };
  size_t count = sizeof parts / sizeof *parts;
  for (size_t i = 0; i < count; i++) total += rounded_up(parts[i].bytes, line);
  uint8_t *memory = aligned_alloc(line, total), *next = memory;
  for (size_t i = 0; memory != NULL && i < count; i++) {
    *parts[i].where = next;
    next += rounded_up(parts[i].bytes, line);
  }
  if (memory != NULL) memset(w->weights, 0, ROWS * keys * 2);
  return memory;
}

int attention_avx2(const struct attention *call, size_t batch, size_t head, size_t first,
                   size_t last, int vnni) {
  struct work w = {.size = call->size, .keys = call->keys, .stride = call->heads * call->size};
  size_t row = batch * call->queries, lane = head * w.size;
  if (w.size > MOST_CHANNELS) return attention_plain(call, batch, head, first, last);
  w.padded_keys = rounded_up(w.keys, WIDTH * LANES);
  w.padded_size = rounded_up(w.size, WIDTH * LANES);
  w.q = call->q + row * w.stride + lane;
  w.k = call->k + batch * w.keys * w.stride + lane;
  w.v = call->v + batch * w.keys * w.stride + lane;
  void *memory = reserve(&w);
  if (memory == NULL) return -1;
  int failed = 0, usual = pack_keys(&w) == 0 && pack_values(&w) == 0;
  for (size_t at = first; at < last && failed == 0; at += ROWS) {
    size_t rows = last - at < ROWS ? last - at : ROWS;
    float *out = call->out + (row + at) * w.stride + lane;
    if (!usual || pack_queries(&w, w.q + at * w.stride, rows) != 0)
      failed = attention_plain(call, batch, head, at, at + rows);
    else if (vnni)
      attend_vnni(&w, out, rows);
    else
      attend_avx2(&w, out, rows);
  }
  free(memory);
  return failed;
}

#endif
