/* The rounding of rows in one pass over memory: a row lies in the first-level cache meanwhile. */

#include "rows.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <stdlib.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define INLINE static inline __attribute__((always_inline))
#define LANES 16
#define LARGEST 127.0f

/* e^x for x up to 0. */
AVX512 INLINE __m512 exponential(__m512 x) {
  x = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  __m512 part = _mm512_reduce_ps(x, 0); /* x - round(x) */
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(1.3333558e-3f), part, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, _mm512_sub_ps(x, part));
}

AVX512 INLINE __m512 reciprocal(__m512 x) {
  __m512 y = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.0f)));
}

/* x * sigmoid(z), z of x's sign: of e^-|z|, which cannot overflow. */
AVX512 INLINE __m512 gated(__m512 x, __m512 z) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(z)));
  __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(z));
  __m512 above = _mm512_mask_mov_ps(one, negative, e);
  return _mm512_mul_ps(x, _mm512_mul_ps(above, reciprocal(_mm512_add_ps(one, e))));
}

/* x * Phi(x), with Abramowitz and Stegun's 7.1.26 for erf, right to 1.5e-7. */
AVX512 INLINE __m512 gelu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
  __m512 t = reciprocal(_mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one));
  __m512 y = _mm512_fmadd_ps(_mm512_set1_ps(1.061405429f), t, _mm512_set1_ps(-1.453152027f));
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(1.421413741f));
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(-0.284496736f));
  y = _mm512_fmadd_ps(y, t, _mm512_set1_ps(0.254829592f));
  __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z)));
  y = _mm512_mul_ps(_mm512_mul_ps(y, t), e); /* 1 - erf(z) */
  __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  __m512 twice = _mm512_mask_mov_ps(_mm512_sub_ps(_mm512_set1_ps(2.0f), y), negative, y);
  return _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(0.5f)), twice);
}

AVX512 INLINE __m512 gelu_tanh(__m512 x) {
  __m512 cubed = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f));
  __m512 inner = _mm512_fmadd_ps(cubed, x, x);
  return gated(x, _mm512_mul_ps(inner, _mm512_set1_ps(1.59576912f)));
}

AVX512 INLINE __mmask16 lanes_left(size_t n) {
  return n >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1);
}

AVX512 INLINE __m512i magnitude_bits(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

AVX512 INLINE float largest_of(__m512i bits) {
  union { int32_t bits; float value; } largest = {_mm512_reduce_max_epi32(bits)};
  return largest.value;
}

/* A row less its mean, over its standard deviation, by weight and bias; otherwise as below. */
AVX512 static float normed(const struct rows *call, size_t r, float *row) {
  const float *x = call->x + r * call->width;
  size_t width = call->width;
  float share = 1.0f / (float)width;
  __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  __m512i most = _mm512_setzero_si512();
  for (size_t i = 0; i < width; i += LANES)
    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes_left(width - i), x + i));
  __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) * share);
  for (size_t i = 0; i < width; i += LANES) {
    __mmask16 mask = lanes_left(width - i);
    __m512 y = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i), mean);
    squares = _mm512_fmadd_ps(y, y, squares);
    _mm512_storeu_ps(row + i, y);
  }
  __m512 inverse =
      _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) * share + call->epsilon));
  for (size_t i = 0; i < width; i += LANES) {
    __mmask16 mask = lanes_left(width - i);
    __m512 y = _mm512_mul_ps(_mm512_loadu_ps(row + i), inverse);
    y = _mm512_fmadd_ps(y, _mm512_maskz_loadu_ps(mask, call->weight + i),
                        _mm512_maskz_loadu_ps(mask, call->bias + i));
    _mm512_storeu_ps(row + i, y);
    most = _mm512_max_epi32(most, magnitude_bits(y));
  }
  return largest_of(most);
}

/* y of a row in `row`, and its largest magnitude; a NaN counts as the largest. */
AVX512 INLINE float activated(const struct rows *call, size_t r, float *row,
                              const enum activation activation) {
  const float *x = call->x + r * call->width;
  __m512 scale = _mm512_set1_ps(call->scales != NULL ? call->scales[r] : 1.0f);
  __m512 alpha = _mm512_set1_ps(call->alpha);
  __m512i most = _mm512_setzero_si512();
  for (size_t i = 0; i < call->width; i += LANES) {
    __mmask16 mask = lanes_left(call->width - i);
    __m512 y = _mm512_maskz_loadu_ps(mask, x + i);
    __m512 bias = call->bias != NULL ? _mm512_maskz_loadu_ps(mask, call->bias + i)
                                     : _mm512_setzero_ps();
    y = _mm512_maskz_fmadd_ps(mask, y, scale, bias);
    if (activation == GELU) y = gelu(y);
    if (activation == GELU_TANH) y = gelu_tanh(y);
    if (activation == QUICK_GELU) y = gated(y, _mm512_mul_ps(y, alpha));
    _mm512_storeu_ps(row + i, y);
    most = _mm512_max_epi32(most, magnitude_bits(y));
  }
  return largest_of(most);
}

AVX512 INLINE void codes_of(const float *row, float step, uint8_t *codes, size_t width) {
  __m512 inverse = _mm512_set1_ps(1.0f / step);
  for (size_t i = 0; i < width; i += LANES) {
    __mmask16 mask = lanes_left(width - i);
    __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(row + i), inverse));
    code = _mm512_add_epi32(code, _mm512_set1_epi32(128));
    code = _mm512_max_epi32(code, _mm512_setzero_si512());
    _mm512_mask_cvtusepi32_storeu_epi8(codes + i, mask, code);
  }
}

AVX512 int round_rows(const struct rows *call, size_t first, size_t last) {
  size_t padded = (call->width + LANES - 1) / LANES * LANES;
  float *row = aligned_alloc(64, padded * sizeof(float) + 64);
  if (row == NULL) return -1;
  for (size_t r = first; r < last; r++) {
    float most;
    switch (call->activation) {
      case GELU: most = activated(call, r, row, GELU); break;
      case GELU_TANH: most = activated(call, r, row, GELU_TANH); break;
      case QUICK_GELU: most = activated(call, r, row, QUICK_GELU); break;
      default:
        most = call->weight != NULL ? normed(call, r, row)
                                    : activated(call, r, row, NO_ACTIVATION);
    }
    if (most < call->smallest) most = call->smallest;
    call->steps[r] = most / LARGEST;
    codes_of(row, call->steps[r], call->codes + r * call->width, call->width);
  }
  free(row);
  return 0;
}

AVX512 void scale_rows(const struct scaling *call, size_t first, size_t last) {
  size_t width = call->width;
  for (size_t r = first; r < last; r++) {
    const float *x = call->x + r * width;
    const float *other = call->other != NULL ? call->other + r % call->others * width : NULL;
    float *y = call->y + r * width;
    __m512 scale = _mm512_set1_ps(call->scales[r]);
    for (size_t i = 0; i < width; i += LANES) {
      __mmask16 mask = lanes_left(width - i);
      __m512 sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + i), scale,
                                   _mm512_maskz_loadu_ps(mask, call->bias + i));
      if (other != NULL) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, other + i));
      _mm512_mask_storeu_ps(y + i, mask, sum);
    }
  }
}

#else

int round_rows(const struct rows *call, size_t first, size_t last) {
  return (void)call, (void)first, (void)last, -1;
}

void scale_rows(const struct scaling *call, size_t first, size_t last) {
  (void)call, (void)first, (void)last;
}

#endif
