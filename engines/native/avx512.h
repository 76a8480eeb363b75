/* What the kernels of a decoder share: vectors of 16 floats, and functions of them. */

#ifndef EDGEVLM_AVX512_H
#define EDGEVLM_AVX512_H

#if defined(__x86_64__)

#include "forms.h"

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define LANES 16

INLINE size_t rounded_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

AVX512 INLINE __mmask16 lanes_left(size_t n) {
  return n >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1);
}

AVX512 INLINE __m512i magnitude_bits(__m512 x) {
  return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

/* The largest of magnitudes that are given by their bits: a NaN counts as the largest. */
AVX512 INLINE float largest_of(__m512i bits) {
  union { int32_t bits; float value; } largest = {_mm512_reduce_max_epi32(bits)};
  return largest.value;
}

/* 2^x for x up to 0, right to 2e-7. */
AVX512 INLINE __m512 power_of_two(__m512 x) {
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

/* x * sigmoid(x), of e^-|x|, which cannot overflow. */
AVX512 INLINE __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 e = power_of_two(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-1.44269504f)));
  __mmask16 negative = _mm512_movepi32_mask(_mm512_castps_si512(x));
  __m512 above = _mm512_mask_mov_ps(one, negative, e);
  return _mm512_mul_ps(x, _mm512_mul_ps(above, reciprocal(_mm512_add_ps(one, e))));
}

#endif
#endif
