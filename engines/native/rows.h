/* Rows of activations made of what a product of integers gives, and rounded to 8 bits. */

#ifndef EDGEVLM_ROWS_H
#define EDGEVLM_ROWS_H

#include <stddef.h>
#include <stdint.h>

#include "forms.h"

/* gelu's two forms; x * sigmoid(alpha * x) */
enum activation { NO_ACTIVATION, GELU, GELU_TANH, QUICK_GELU };

/* codes[r] = round(y / steps[r]) + 128 of y = activation(x[r] * scales[r] + bias), and
 * steps[r] = max(|y|, smallest) / 127. scales and bias may be NULL. With a norm's weight, y is
 * (x[r] - mean) / sqrt(variance + epsilon) * weight + bias. A row that holds a NaN or an infinity
 * gets such a step. */
struct rows {
  const float *x, *scales, *bias, *weight;
  uint8_t *codes;
  float *steps;
  size_t count, width;
  enum activation activation;
  float alpha, epsilon, smallest;
};

/* Rows first..last, in the form in use. -1 where there is no memory. */
int round_rows(const struct rows *call, size_t first, size_t last);
int round_rows_plain(const struct rows *call, size_t first, size_t last);
int round_rows_avx2(const struct rows *call, size_t first, size_t last);
int round_rows_avx512(const struct rows *call, size_t first, size_t last);
int round_rows_neon(const struct rows *call, size_t first, size_t last);

/* The step of a row whose largest magnitude this is. */
INLINE float step_of(const struct rows *call, float most) {
  return (most < call->smallest ? call->smallest : most) / 127.0f;
}

/* y[r] = x[r] * scales[r] + bias, and of another tensor, unless NULL, row r % others. */
struct scaling {
  const float *x, *scales, *bias, *other;
  float *y;
  size_t count, width, others;
};

/* Rows first..last, in the form in use. */
void scale_rows(const struct scaling *call, size_t first, size_t last);
void scale_rows_plain(const struct scaling *call, size_t first, size_t last);
void scale_rows_avx2(const struct scaling *call, size_t first, size_t last);
void scale_rows_avx512(const struct scaling *call, size_t first, size_t last);
void scale_rows_neon(const struct scaling *call, size_t first, size_t last);

#endif
