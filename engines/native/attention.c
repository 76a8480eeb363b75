/* How a call is divided, which form computes a part, and the plain form. */

#include "attention.h"

#include <math.h>
#include <stdlib.h>

/* Fewer heads than this are divided by rows too; each part prepares the keys for itself. */
#define FEWEST_PARTS 16

static size_t pieces_of_a_head(const struct attention *call) {
  size_t heads = call->batch * call->heads;
  if (heads == 0 || heads >= FEWEST_PARTS) return 1;
  return (FEWEST_PARTS + heads - 1) / heads;
}

size_t attention_parts(const struct attention *call) {
  return call->batch * call->heads * pieces_of_a_head(call);
}

int attention_part(const struct attention *call, enum form form, size_t part) {
  size_t pieces = pieces_of_a_head(call), piece = part % pieces, one = part / pieces;
  size_t first = call->queries * piece / pieces, last = call->queries * (piece + 1) / pieces;
  size_t batch = one / call->heads, head = one % call->heads;
  if (first == last) return 0;
  switch (call->size % 4 == 0 ? form : FORM_PLAIN) {
#if defined(__x86_64__)
    case FORM_AVX512_BF16: return attention_vnni(call, batch, head, first, last, 1);
    case FORM_AVX512_VNNI: return attention_vnni(call, batch, head, first, last, 0);
    case FORM_AVX_VNNI: return attention_avx2(call, batch, head, first, last, 1);
    case FORM_AVX2: return attention_avx2(call, batch, head, first, last, 0);
#elif defined(__aarch64__)
    case FORM_DOTPROD: return attention_neon(call, batch, head, first, last);
#endif
    default: return attention_plain(call, batch, head, first, last);
  }
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
