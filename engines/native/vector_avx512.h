/* Sixteen floats at a time, with AVX-512; the other vector_*.h have the same names.
 *
 * What is written over them is compiled once for each form: a file includes one of these headers,
 * and then the code (rows_body.h). `some` stands for the first n lanes, all of them from LANES on.
 */

#ifndef EDGEVLM_VECTOR_AVX512_H
#define EDGEVLM_VECTOR_AVX512_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "forms.h"

#define OF_FORM OF_AVX512
#define LANES 16

typedef __m512 vector;
typedef __m512i integers; /* of 32 bits */

OF_FORM INLINE __mmask16 lanes_left(size_t n) {
  return n >= LANES ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1);
}

OF_FORM INLINE vector all(float x) { return _mm512_set1_ps(x); }
OF_FORM INLINE vector load(const float *x) { return _mm512_loadu_ps(x); }
OF_FORM INLINE void store(float *y, vector x) { _mm512_storeu_ps(y, x); }

/* The lanes behind are zeros, and their memory is not touched. */
OF_FORM INLINE vector load_some(const float *x, size_t n) {
  return _mm512_maskz_loadu_ps(lanes_left(n), x);
}

OF_FORM INLINE void store_some(float *y, vector x, size_t n) {
  _mm512_mask_storeu_ps(y, lanes_left(n), x);
}

/* Zeros in the lanes behind. */
OF_FORM INLINE vector only_some(vector x, size_t n) {
  return _mm512_maskz_mov_ps(lanes_left(n), x);
}

OF_FORM INLINE vector plus(vector a, vector b) { return _mm512_add_ps(a, b); }
OF_FORM INLINE vector minus(vector a, vector b) { return _mm512_sub_ps(a, b); }
OF_FORM INLINE vector times(vector a, vector b) { return _mm512_mul_ps(a, b); }
OF_FORM INLINE vector times_plus(vector a, vector b, vector c) { return _mm512_fmadd_ps(a, b, c); }
OF_FORM INLINE vector larger(vector a, vector b) { return _mm512_max_ps(a, b); }
OF_FORM INLINE vector magnitude(vector x) { return _mm512_abs_ps(x); }

OF_FORM INLINE vector reciprocal(vector x) {
  vector y = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.0f)));
}

/* `below` where the sign of x is set, otherwise `above`. */
OF_FORM INLINE vector by_sign(vector x, vector below, vector above) {
  return _mm512_mask_mov_ps(above, _mm512_movepi32_mask(_mm512_castps_si512(x)), below);
}

/* x less the whole number nearest to it, which goes to `whole`. */
OF_FORM INLINE vector split(vector x, vector *whole) {
  vector part = _mm512_reduce_ps(x, 0);
  *whole = _mm512_sub_ps(x, part);
  return part;
}

/* y * 2^whole, and 0 where that is below normal numbers by far. */
OF_FORM INLINE vector shifted(vector y, vector whole) { return _mm512_scalef_ps(y, whole); }

OF_FORM INLINE float sum_of(vector x) { return _mm512_reduce_add_ps(x); }
OF_FORM INLINE float largest_of(vector x) { return _mm512_reduce_max_ps(x); }

/* Of magnitudes as integers a NaN is the largest. */
OF_FORM INLINE integers no_bits(void) { return _mm512_setzero_si512(); }

OF_FORM INLINE integers larger_bits(integers most, vector x) {
  integers bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  return _mm512_max_epi32(most, bits);
}

OF_FORM INLINE float largest_of_bits(integers most) {
  union { int32_t bits; float value; } largest = {_mm512_reduce_max_epi32(most)};
  return largest.value;
}

/* round(x) + 128 within a byte. */
OF_FORM INLINE void store_codes(uint8_t *codes, vector x, size_t n) {
  integers code = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(128));
  code = _mm512_max_epi32(code, _mm512_setzero_si512());
  _mm512_mask_cvtusepi32_storeu_epi8(codes, lanes_left(n), code);
}

#endif
