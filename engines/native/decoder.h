/* What a language model computes between its products: norms, gates, attention over a cache. */

#ifndef EDGEVLM_DECODER_H
#define EDGEVLM_DECODER_H

#include <stddef.h>
#include <stdint.h>

/* Whether the form in use has what rows need, AVX-512; with bfloat16, what attention needs, too. */
int decoder_runs_here(int bfloat16);

/* codes[r] = round(z / steps[r]) + 128 of z = y[r] / sqrt(mean(y[r]^2) + epsilon) * weight, and
 * steps[r] = max(|z|, smallest) / 127. y is x; or, with scales and other, x[r] * scales[r] +
 * other[r], which is written. A row that holds a NaN or an infinity gets such a step. */
struct normed_rows {
  const float *x, *scales, *other, *weight;
  float *y;
  uint8_t *codes;
  float *steps;
  size_t count, width;
  float epsilon, smallest;
};

/* Rows first..last. -1 where there is no memory. */
int norm_rows(const struct normed_rows *call, size_t first, size_t last);

/* The same codes and steps of silu(gate[r] * scales[r]) * (up[r] * scales[r]). */
struct gated_rows {
  const float *gate, *up, *scales;
  uint8_t *codes;
  float *steps;
  size_t count, width;
  float smallest;
};

int gate_rows(const struct gated_rows *call, size_t first, size_t last);

/* Causal attention of new tokens over a cache that they are put into: rotated as halves,
 * softmax(q k^T * scale) v, each group of heads with the keys of its own.
 *
 * q, out [batch, queries, heads * size]; k, v [batch, queries, kv_heads * size]; cos, sin
 * [positions, size / 2]; key, value [batch, kv_heads, context, size]; last [batch]: the position of
 * the last new token. size is a multiple of 16. */
struct cached_attention {
  const float *q, *k, *v, *cos, *sin;
  float *key, *value, *out;
  const int32_t *last;
  size_t batch, queries, heads, kv_heads, size, context;
  float scale;
};

/* Up to so many new tokens are computed in float32, as the definition says, each as if it were the
 * only one: those that are decoded, and those that were guessed. */
#define FEW_QUERIES 8

/* One head of the cache with all of its queries, for calls of few tokens. -1: no memory. */
int attend_few(const struct cached_attention *call, size_t batch, size_t kv_head);

/* The same for many tokens, with products in bfloat16 and sums in float32. First the keys are put
 * into the cache and packed, a block of KEYS_AT_A_TIME of one head at a time, then blocks of
 * QUERIES_AT_A_TIME tokens of one head attend. A token's answer depends on those before it alone. */
#define KEYS_AT_A_TIME 64
#define QUERIES_AT_A_TIME 48

/* Memory for the keys of a call, NULL where there is none; to be freed by who asks. */
void *reserve_keys(const struct cached_attention *call);

void pack_keys(const struct cached_attention *call, void *memory, size_t batch, size_t kv_head,
               size_t first);

int attend_many(const struct cached_attention *call, const void *memory, size_t batch, size_t head,
                size_t first);

/* y: x [size] rotated by the tables' row for a position. */
void rotate(const struct cached_attention *call, const float *x, size_t position, float *y);

#endif
