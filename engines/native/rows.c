/* Which form computes rows, and the plain form. */

#include "rows.h"

#include <math.h>
#include <stdlib.h>

int round_rows(const struct rows *call, size_t first, size_t last) {
  switch (form_in_use()) {
#if defined(__x86_64__)
    case FORM_AVX512_BF16:
    case FORM_AVX512_VNNI: return round_rows_avx512(call, first, last);
    case FORM_AVX_VNNI:
    case FORM_AVX2: return round_rows_avx2(call, first, last);
#elif defined(__aarch64__)
    case FORM_DOTPROD: return round_rows_neon(call, first, last);
#endif
    default: return round_rows_plain(call, first, last);
  }
}

void scale_rows(const struct scaling *call, size_t first, size_t last) {
  switch (form_in_use()) {
#if defined(__x86_64__)
    case FORM_AVX512_BF16:
    case FORM_AVX512_VNNI: scale_rows_avx512(call, first, last); break;
    case FORM_AVX_VNNI:
    case FORM_AVX2: scale_rows_avx2(call, first, last); break;
#elif defined(__aarch64__)
    case FORM_DOTPROD: scale_rows_neon(call, first, last); break;
#endif
    default: scale_rows_plain(call, first, last);
  }
}

static float activated(enum activation activation, float x, float alpha) {
  switch (activation) {
    case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case QUICK_GELU: return x / (1.0f + expf(-alpha * x));
    default: return x;
  }
}

static void normed(const struct rows *call, const float *x, float *row) {
  double mean = 0.0, squares = 0.0, width = (double)call->width;
  for (size_t i = 0; i < call->width; i++) mean += x[i] / width;
  for (size_t i = 0; i < call->width; i++) squares += (x[i] - mean) * (x[i] - mean) / width;
  double inverse = 1.0 / sqrt(squares + call->epsilon);
  for (size_t i = 0; i < call->width; i++)
    row[i] = (float)((x[i] - mean) * inverse) * call->weight[i] + call->bias[i];
}

int round_rows_plain(const struct rows *call, size_t first, size_t last) {
  size_t width = call->width;
  float *row = malloc(width * sizeof(float) + 1);
  if (row == NULL) return -1;
  for (size_t r = first; r < last; r++) {
    const float *x = call->x + r * width;
    float scale = call->scales != NULL ? call->scales[r] : 1.0f, most = 0.0f;
    if (call->weight != NULL) normed(call, x, row);
    for (size_t i = 0; i < width; i++) {
      float bias = call->bias != NULL ? call->bias[i] : 0.0f;
      if (call->weight == NULL)
        row[i] = activated(call->activation, x[i] * scale + bias, call->alpha);
      if (!(fabsf(row[i]) <= most) && !isnan(most)) most = fabsf(row[i]); /* keeps a NaN */
    }
    call->steps[r] = step_of(call, most);
    for (size_t i = 0; i < width; i++) {
      float code = rintf(row[i] / call->steps[r]) + 128.0f;
      call->codes[r * width + i] = code >= 255.0f ? 255 : code >= 0.0f ? (uint8_t)code : 0;
    }
  }
  free(row);
  return 0;
}

void scale_rows_plain(const struct scaling *call, size_t first, size_t last) {
  size_t width = call->width;
  for (size_t r = first; r < last; r++)
    for (size_t i = 0; i < width; i++) {
      float sum = call->x[r * width + i] * call->scales[r] + call->bias[i];
      if (call->other != NULL) sum += call->other[r % call->others * width + i];
      call->y[r * width + i] = sum;
    }
}
