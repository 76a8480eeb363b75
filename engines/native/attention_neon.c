/* Attention with the 8-bit dot products of 64-bit ARM.
 *
 * Scores are those of attention_vnni.c: rows of q and k less their means over all tokens, each with
 * a step of its own, q . k = (q - mean q) . (k - mean k) + mean q . (k - mean k) + what is the same
 * for all keys. Weights have 14 bits in two bytes of 7, as both sides of SDOT are signed; v has 8 with
 * a step for each channel, less its mean, which weights that sum to one give back.
 *
 * Both products are sums over words of four: channels for scores, keys for weighted sums. All scores
 * of ROWS queries lie in the cache at once, so there is no rescaling on the way.
 */

#include "attention.h"

#if defined(__aarch64__)

#include <math.h>
#include <stdlib.h>

#include "vector_neon.h"
#include "vector_functions.h"

#define ROWS 4 /* queries at a time: with WIDTH vectors of 4 lanes, 16 of 32 registers */
#define WIDTH 4
#define BLOCK (WIDTH * LANES)
#define MOST 127.0f
#define MOST_WEIGHT 16383.0f
#define MOST_CHANNELS 512
#define TINY 1e-30f   /* what is smaller is 0 */
#define LARGEST 1e12f /* beyond it, and for NaN and infinity, the plain form answers */
#define NEVER -1e30f  /* the score of keys that pad the last block */

/* Keys and channels are padded with zeros to whole blocks. */
struct work {
  size_t size, keys, padded_size, padded_keys, stride;
  const float *q, *k, *v;
  float *mean_q, *mean_k, *mean_v, *step_v, *row;
  int8_t *k8;              /* [keys / 4][size / 4][4][4] */
  int8_t *v8;              /* [size / 4][keys / 4][4][4] */
  float *step_k, *extra;   /* for each key, softmax's scale and log2(e) inside */
  int8_t *q8;              /* [ROWS][size] */
  float *scores;           /* [ROWS][keys] */
  int8_t *high, *low;      /* [ROWS][keys]: a weight is 128 * high + low */
  float step_q[ROWS], total[ROWS];
};

/* Adds the products of words of row r of `left` and of `right`'s groups of 4 lanes. */
OF_DOTPROD INLINE void multiply(const int8_t *left, size_t row, const int8_t *right, size_t group,
                                size_t words, int32x4_t sums[ROWS][WIDTH]) {
  for (size_t word = 0; word < words; word += 4) {
    int8x16_t rows[ROWS], values[WIDTH];
    for (int r = 0; r < ROWS; r++) rows[r] = vld1q_s8(left + (size_t)r * row + word * 4);
#define ADD_WORD(at)                                                                            \
  for (int v = 0; v < WIDTH; v++)                                                               \
    values[v] = vld1q_s8(right + (size_t)v * group + (word + at) * 16);                         \
  for (int r = 0; r < ROWS; r++)                                                                \
    for (int v = 0; v < WIDTH; v++)                                                             \
      sums[r][v] = vdotq_laneq_s32(sums[r][v], values[v], rows[r], at);
    ADD_WORD(0)
    ADD_WORD(1)
    ADD_WORD(2)
    ADD_WORD(3)
#undef ADD_WORD
  }
}

OF_DOTPROD INLINE void no_sums(int32x4_t sums[ROWS][WIDTH]) {
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < WIDTH; v++) sums[r][v] = vdupq_n_s32(0);
}

/* Whether all values are of usual size; their sum over rows divided by the count in `mean`. */
OF_DOTPROD static int means(const float *x, size_t rows, const struct work *w, float *mean) {
  integers most = no_bits();
  memset(mean, 0, w->padded_size * sizeof *mean);
  for (size_t t = 0; t < rows; t++, x += w->stride)
    for (size_t d = 0; d < w->size; d += LANES) {
      vector value = load_some(x + d, w->size - d);
      store(mean + d, times_plus(value, all(1.0f / (float)rows), load(mean + d)));
      most = larger_bits(most, value);
    }
  return largest_of_bits(most) <= LARGEST;
}

OF_DOTPROD INLINE integers code_of(vector x) { return vcvtnq_s32_f32(x); }

/* Codes of x - mean, which stays in w->row, and their step. */
OF_DOTPROD static float round_row(const struct work *w, const float *x, const float *mean,
                                  int8_t *codes) {
  vector most = all(0.0f);
  for (size_t d = 0; d < w->size; d += LANES) {
    vector y = minus(load_some(x + d, w->size - d), load(mean + d));
    store(w->row + d, y);
    most = larger(most, magnitude(y));
  }
  float step = largest_of(most) / MOST;
  vector inverse = all(step > TINY ? 1.0f / step : 0.0f);
  for (size_t d = 0; d < w->size; d += LANES) {
    int16x4_t words = vqmovn_s32(code_of(times(load(w->row + d), inverse)));
    int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    vst1_lane_s32((int32_t *)(void *)(codes + d), vreinterpret_s32_s8(bytes), 0);
  }
  return step;
}

/* `q8` holds a row meanwhile. */
OF_DOTPROD static void pack_keys(struct work *w) {
  size_t words = w->padded_size / 4;
  float scale = 1.44269504f / sqrtf((float)w->size);
  memset(w->q8, 0, w->padded_size);
  for (size_t key = 0; key < w->padded_keys; key++) {
    int8_t *lane = w->k8 + (key / LANES * words * LANES + key % LANES) * 4;
    vector extra = all(0.0f);
    float step = 0.0f;
    if (key < w->keys) {
      step = round_row(w, w->k + key * w->stride, w->mean_k, w->q8);
      for (size_t d = 0; d < w->size; d += LANES)
        extra = times_plus(load(w->row + d), load(w->mean_q + d), extra);
    } else {
      memset(w->q8, 0, w->padded_size);
    }
    for (size_t word = 0; word < words; word++) memcpy(lane + word * 4 * LANES, w->q8 + 4 * word, 4);
    w->step_k[key] = step * scale;
    w->extra[key] = key < w->keys ? sum_of(extra) * scale : NEVER;
  }
}

OF_DOTPROD static void pack_values(struct work *w) {
  for (size_t d = 0; d < w->padded_size; d += LANES) {
    size_t left = d < w->size ? w->size - d : 0;
    vector mean = load(w->mean_v + d), most = all(0.0f);
    for (size_t t = 0; t < w->keys; t++)
      most = larger(most, magnitude(minus(load_some(w->v + t * w->stride + d, left), mean)));
    vector step = times(most, all(1.0f / MOST));
    uint32x4_t some = vcgtq_f32(step, all(TINY));
    vector inverse = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(reciprocal(step)), some));
    int32_t *codes = (int32_t *)(void *)(w->v8 + d * w->padded_keys);
    store(w->step_v + d, step);
    for (size_t t = 0; t < w->padded_keys; t += 4, codes += LANES) {
      int32x4_t four = vdupq_n_s32(0), shift = vdupq_n_s32(0), byte = vdupq_n_s32(255);
      for (size_t i = 0; i < 4 && t + i < w->keys; i++) {
        vector y = minus(load_some(w->v + (t + i) * w->stride + d, left), mean);
        int32x4_t code = vandq_s32(code_of(times(y, inverse)), byte);
        four = vorrq_s32(four, vshlq_s32(code, shift));
        shift = vaddq_s32(shift, vdupq_n_s32(8));
      }
      vst1q_s32(codes, four);
    }
  }
}

/* Codes of up to ROWS queries; the others of the block are zeros. */
OF_DOTPROD static void pack_queries(struct work *w, const float *x, size_t rows) {
  memset(w->q8, 0, ROWS * w->padded_size);
  for (size_t r = 0; r < ROWS; r++)
    w->step_q[r] =
        r < rows ? round_row(w, x + r * w->stride, w->mean_q, w->q8 + r * w->padded_size) : 0.0f;
}

/* Scores of ROWS queries and a block of keys, and the largest so far of each query. */
OF_DOTPROD static void scores_of(const struct work *w, size_t first, vector *most) {
  int32x4_t products[ROWS][WIDTH];
  no_sums(products);
  multiply(w->q8, w->padded_size, w->k8 + first * w->padded_size, LANES * w->padded_size,
           w->padded_size / 4, products);
  for (int v = 0; v < WIDTH; v++) {
    size_t at = first + LANES * (size_t)v;
    vector step = load(w->step_k + at), extra = load(w->extra + at);
    for (int r = 0; r < ROWS; r++) {
      vector score = times(vcvtq_f32_s32(products[r][v]), step);
      score = times_plus(score, all(w->step_q[r]), extra);
      store(w->scores + (size_t)r * w->padded_keys + at, score);
      most[r] = larger(most[r], score);
    }
  }
}

/* e^score over the largest of a query, in 14 bits, and their sum. */
OF_DOTPROD static void weigh(struct work *w, size_t rows, const vector *most) {
  for (size_t r = 0; r < rows; r++) {
    const float *scores = w->scores + r * w->padded_keys;
    int8_t *high = w->high + r * w->padded_keys, *low = w->low + r * w->padded_keys;
    vector top = all(largest_of(most[r])), total = all(0.0f), scale = all(MOST_WEIGHT);
    for (size_t t = 0; t < w->padded_keys; t += 2 * LANES) {
      vector first = power_of_two(minus(load(scores + t), top));
      vector second = power_of_two(minus(load(scores + t + LANES), top));
      int32x4_t codes[2] = {code_of(times(first, scale)), code_of(times(second, scale))};
      int16x8_t eight = vcombine_s16(vmovn_s32(codes[0]), vmovn_s32(codes[1]));
      total = plus(total, vcvtq_f32_s32(vaddq_s32(codes[0], codes[1])));
      vst1_s8(high + t, vshrn_n_s16(eight, 7));
      vst1_s8(low + t, vmovn_s16(vandq_s16(eight, vdupq_n_s16(127))));
    }
    w->total[r] = sum_of(total);
  }
}

/* Weighted sums of ROWS queries in a block of channels. */
OF_DOTPROD static void sums_of(const struct work *w, size_t first, float *out, size_t rows) {
  int32x4_t products[ROWS][WIDTH];
  const int8_t *v8 = w->v8 + first * w->padded_keys;
  no_sums(products);
  multiply(w->high, w->padded_keys, v8, LANES * w->padded_keys, w->padded_keys / 4, products);
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < WIDTH; v++) products[r][v] = vshlq_n_s32(products[r][v], 7);
  multiply(w->low, w->padded_keys, v8, LANES * w->padded_keys, w->padded_keys / 4, products);
  for (size_t r = 0; r < rows; r++)
    for (size_t v = 0; v < WIDTH && first + LANES * v < w->size; v++) {
      size_t d = first + LANES * v;
      vector step = times(load(w->step_v + d), all(1.0f / w->total[r]));
      vector sum = times_plus(vcvtq_f32_s32(products[r][v]), step, load(w->mean_v + d));
      store_some(out + r * w->stride + d, sum, w->size - d);
    }
}

OF_DOTPROD static void attend(struct work *w, float *out, size_t rows) {
  vector most[ROWS];
  for (int r = 0; r < ROWS; r++) most[r] = all(NEVER);
  for (size_t t = 0; t < w->padded_keys; t += BLOCK) scores_of(w, t, most);
  weigh(w, rows, most);
  for (size_t d = 0; d < w->size; d += BLOCK) sums_of(w, d, out, rows);
}

/* Memory for everything in `w`, to be freed by who asks; NULL where there is none. */
static void *reserve(struct work *w) {
  size_t keys = w->padded_keys, size = w->padded_size, line = 64, total = 0;
  struct { void **where; size_t bytes; } parts[] = {
      {(void **)&w->mean_q, size * 4},        {(void **)&w->mean_k, size * 4},
      {(void **)&w->mean_v, size * 4},        {(void **)&w->step_v, size * 4},
      {(void **)&w->row, size * 4},           {(void **)&w->step_k, keys * 4},
      {(void **)&w->extra, keys * 4},         {(void **)&w->k8, keys * size},
      {(void **)&w->v8, keys * size},         {(void **)&w->q8, ROWS * size},
      {(void **)&w->scores, ROWS * keys * 4}, {(void **)&w->high, ROWS * keys},
      {(void **)&w->low, ROWS * keys},
  };
  size_t count = sizeof parts / sizeof *parts;
  for (size_t i = 0; i < count; i++) total += rounded_up(parts[i].bytes, line);
  uint8_t *memory = aligned_alloc(line, total), *next = memory;
  for (size_t i = 0; memory != NULL && i < count; i++) {
    *parts[i].where = next;
    next += rounded_up(parts[i].bytes, line);
  }
  if (memory != NULL) memset(w->high, 0, ROWS * keys), memset(w->low, 0, ROWS * keys);
  return memory;
}

int attention_neon(const struct attention *call, size_t batch, size_t head, size_t first,
                   size_t last) {
  struct work w = {.size = call->size, .keys = call->keys, .stride = call->heads * call->size};
  size_t row = batch * call->queries, lane = head * w.size;
  if (w.size > MOST_CHANNELS) return attention_plain(call, batch, head, first, last);
  w.padded_keys = rounded_up(w.keys, BLOCK);
  w.padded_size = rounded_up(w.size, BLOCK);
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
  pack_values(&w);
  for (size_t at = first; at < last; at += ROWS) {
    size_t rows = last - at < ROWS ? last - at : ROWS;
    pack_queries(&w, w.q + at * w.stride, rows);
    attend(&w, call->out + (row + at) * w.stride + lane, rows);
  }
  free(memory);
  return 0;
}

#endif
