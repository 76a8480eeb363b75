/* Which form runs where, how a call is divided, and the plain form. */

#include "attention.h"

#include <math.h>
#include <stdlib.h>

/* Fewer heads than this are divided by rows too; each part prepares the keys for itself. */
#define FEWEST_PARTS 16

enum attention_form attention_best_form(void) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni"))
    return __builtin_cpu_supports("avx512bf16") ? FORM_VNNI_BF16 : FORM_VNNI;
#endif
  return FORM_PLAIN;
}

static size_t pieces_of_a_head(const struct attention *call) {
  size_t heads = call->batch * call->heads;
  if (heads == 0 || heads >= FEWEST_PARTS) return 1;
  return (FEWEST_PARTS + heads - 1) / heads;
}

size_t attention_parts(const struct attention *call) {
  return call->batch * call->heads * pieces_of_a_head(call);
}

int attention_part(const struct attention *call, enum attention_form form, size_t part) {
  size_t pieces = pieces_of_a_head(call), piece = part % pieces, one = part / pieces;
  size_t first = call->queries * piece / pieces, last = call->queries * (piece + 1) / pieces;
  size_t batch = one / call->heads, head = one % call->heads;
  if (first == last) return 0;
#if defined(__x86_64__)
  if (form != FORM_PLAIN && call->size % 4 == 0)
    return attention_vnni(call, batch, head, first, last, form == FORM_VNNI_BF16);
#endif
  return attention_plain(call, batch, head, first, last);
}

int attention_plain(const struct attention *call, size_t batch, size_t head, size_t first,
                    size_t last) {
  size_t size = call->size, keys = call->keys, stride = call->heads * size;
  const float *k = call->k + batch * keys * stride + head * size;
  const float *v = call->v + batch * keys * stride + head * size;
  float scale = 1.0f / sqrtf((float)size);
  float *scores = malloc((keys + size) * sizeof(float)), *sums = scores + keys;
  if (scores == NULL) return -1;
  for (size_t row = first; row < last; row++) {
    size_t at = (batch * call->queries + row) * stride + head * size;
    const float *q = call->q + at;
    float most = -INFINITY, total = 0.0f;
    for (size_t t = 0; t < keys; t++) {
      float dot = 0.0f;
      for (size_t d = 0; d < size; d++) dot += q[d] * k[t * stride + d];
      scores[t] = dot * scale;
      if (!(scores[t] <= most)) most = scores[t]; /* takes a NaN too */
    }
    for (size_t d = 0; d < size; d++) sums[d] = 0.0f;
    for (size_t t = 0; t < keys; t++) {
      float p = expf(scores[t] - most);
      total += p;
      for (size_t d = 0; d < size; d++) sums[d] += p * v[t * stride + d];
    }
    for (size_t d = 0; d < size; d++) call->out[at + d] = sums[d] / total;
  }
  free(scores);
  return 0;
}
