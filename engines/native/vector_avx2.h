/* Eight floats at a time, with AVX2 and FMA: see vector_avx512.h. */

#ifndef EDGEVLM_VECTOR_AVX2_H
#define EDGEVLM_VECTOR_AVX2_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "forms.h"

#define OF_FORM OF_AVX2
#define LANES 8

typedef __m256 vector;
typedef __m256i integers;

OF_FORM INLINE __m256i lanes_left(size_t n) {
  __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), lane);
}

OF_FORM INLINE vector all(float x) { return _mm256_set1_ps(x); }
OF_FORM INLINE vector load(const float *x) { return _mm256_loadu_ps(x); }
OF_FORM INLINE void store(float *y, vector x) { _mm256_storeu_ps(y, x); }

OF_FORM INLINE vector load_some(const float *x, size_t n) {
  return n >= LANES ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, lanes_left(n));
}

OF_FORM INLINE void store_some(float *y, vector x, size_t n) {
  if (n >= LANES)
    _mm256_storeu_ps(y, x);
  else
    _mm256_maskstore_ps(y, lanes_left(n), x);
}

OF_FORM INLINE vector only_some(vector x, size_t n) {
  return n >= LANES ? x : _mm256_and_ps(x, _mm256_castsi256_ps(lanes_left(n)));
}

OF_FORM INLINE vector plus(vector a, vector b) { return _mm256_add_ps(a, b); }
OF_FORM INLINE vector minus(vector a, vector b) { return _mm256_sub_ps(a, b); }
OF_FORM INLINE vector times(vector a, vector b) { return _mm256_mul_ps(a, b); }
OF_FORM INLINE vector times_plus(vector a, vector b, vector c) { return _mm256_fmadd_ps(a, b, c); }
OF_FORM INLINE vector larger(vector a, vector b) { return _mm256_max_ps(a, b); }

OF_FORM INLINE vector magnitude(vector x) {
  return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}

/* By division: what RCPPS gives differs between processors. */
OF_FORM INLINE vector reciprocal(vector x) { return _mm256_div_ps(_mm256_set1_ps(1.0f), x); }

OF_FORM INLINE vector by_sign(vector x, vector below, vector above) {
  return _mm256_blendv_ps(above, below, x);
}

OF_FORM INLINE vector split(vector x, vector *whole) {
  *whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_sub_ps(x, *whole);
}

/* For y near 1. The operands of MAXPS are in the order that lets a NaN through. */
OF_FORM INLINE vector shifted(vector y, vector whole) {
  __m256 within = _mm256_max_ps(_mm256_set1_ps(-150.0f), whole);
  __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(within), 23);
  __m256 made = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), power));
  return _mm256_and_ps(made, _mm256_cmp_ps(whole, _mm256_set1_ps(-125.0f), _CMP_NLT_UQ));
}

OF_FORM INLINE __m128 halves_added(vector x) {
  return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}

OF_FORM INLINE float sum_of(vector x) {
  __m128 four = halves_added(x);
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

OF_FORM INLINE float largest_of(vector x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

OF_FORM INLINE integers no_bits(void) { return _mm256_setzero_si256(); }

OF_FORM INLINE integers larger_bits(integers most, vector x) {
  return _mm256_max_epi32(most, _mm256_castps_si256(magnitude(x)));
}

OF_FORM INLINE float largest_of_bits(integers most) {
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  __m128i two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
  union { int32_t bits; float value; } largest = {
      _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 1)))};
  return largest.value;
}

OF_FORM INLINE void store_codes(uint8_t *codes, vector x, size_t n) {
  __m256i code = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(128));
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
  __m128i bytes = _mm_packus_epi16(words, words);
  if (n >= LANES) {
    _mm_storel_epi64((__m128i *)codes, bytes);
    return;
  }
  uint8_t some[16];
  _mm_storeu_si128((__m128i *)some, bytes);
  memcpy(codes, some, n);
}

#endif
