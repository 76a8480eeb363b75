/* Attention of encoders: softmax(q k^T / sqrt(d)) v without mask, float32 in and out. */

#ifndef EDGEVLM_ATTENTION_H
#define EDGEVLM_ATTENTION_H

#include <stddef.h>

/* One call: q [batch, queries, heads * size], k and v [batch, keys, heads * size], out as q. */
struct attention {
  const float *q, *k, *v;
  float *out;
  size_t batch, queries, keys, heads, size;
};

/* How products are computed on this processor. */
enum attention_form { FORM_PLAIN, FORM_VNNI, FORM_VNNI_BF16 };

enum attention_form attention_best_form(void);

/* Parts of a call that may run at the same time; the answer does not depend on how they do. */
size_t attention_parts(const struct attention *call);

/* Computes one part; 0, or -1 where there is no memory for it. */
int attention_part(const struct attention *call, enum attention_form form, size_t part);

/* Rows first..last of one head in float32, as the definition says. */
int attention_plain(const struct attention *call, size_t batch, size_t head, size_t first,
                    size_t last);

/* The same with 8-bit products for the scores; bf16: weighted sums in bfloat16, else in 16 bits by
 * 8. Needs AVX-512 with VNNI, and BF16 for bf16. -1 where there is no memory. */
int attention_vnni(const struct attention *call, size_t batch, size_t head, size_t first,
                   size_t last, int bf16);

#endif
