/* Attention of encoders: softmax(q k^T / sqrt(d)) v without mask, float32 in and out. */

#ifndef EDGEVLM_ATTENTION_H
#define EDGEVLM_ATTENTION_H

#include <stddef.h>

#include "forms.h"

/* One call: q [batch, queries, heads * size], k and v [batch, keys, heads * size], out as q. */
struct attention {
  const float *q, *k, *v;
  float *out;
  size_t batch, queries, keys, heads, size;
};

/* Parts of a call that may run at the same time; the answer does not depend on how they do. */
size_t attention_parts(const struct attention *call);

/* Computes one part; 0, or -1 where there is no memory for it. */
int attention_part(const struct attention *call, enum form form, size_t part);

/* Rows first..last of one head in float32, as the definition says. */
int attention_plain(const struct attention *call, size_t batch, size_t head, size_t first,
                    size_t last);

/* The same with 8-bit products for the scores; bf16: weighted sums in bfloat16, else in 16 bits by
 * 8. Needs AVX-512 with VNNI, and BF16 for bf16. -1 where there is no memory. */
int attention_vnni(const struct attention *call, size_t batch, size_t head, size_t first,
                   size_t last, int bf16);

/* The same with products of 16-bit integers; vnni: added up in one instruction. Needs AVX2 and FMA,
 * and for vnni AVX-VNNI. */
int attention_avx2(const struct attention *call, size_t batch, size_t head, size_t first,
                   size_t last, int vnni);

/* The same with 8-bit products, of weights in 14 bits as two bytes. Needs ARM's dot products. */
int attention_neon(const struct attention *call, size_t batch, size_t head, size_t first,
                   size_t last);

#endif
