/* Four floats at a time, with what every 64-bit ARM has: see vector_avx512.h. */

#ifndef EDGEVLM_VECTOR_NEON_H
#define EDGEVLM_VECTOR_NEON_H

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "forms.h"

#define OF_FORM OF_DOTPROD
#define LANES 4

typedef float32x4_t vector;
typedef int32x4_t integers;

OF_FORM INLINE vector all(float x) { return vdupq_n_f32(x); }
OF_FORM INLINE vector load(const float *x) { return vld1q_f32(x); }
OF_FORM INLINE void store(float *y, vector x) { vst1q_f32(y, x); }

OF_FORM INLINE vector load_some(const float *x, size_t n) {
  float some[LANES] = {0};
  if (n >= LANES) return vld1q_f32(x);
  memcpy(some, x, n * sizeof *x);
  return vld1q_f32(some);
}

OF_FORM INLINE void store_some(float *y, vector x, size_t n) {
  float some[LANES];
  if (n >= LANES) {
    vst1q_f32(y, x);
    return;
  }
  vst1q_f32(some, x);
  memcpy(y, some, n * sizeof *y);
}

OF_FORM INLINE vector only_some(vector x, size_t n) {
  static const int32_t lanes[LANES] = {0, 1, 2, 3};
  if (n >= LANES) return x;
  uint32x4_t here = vcltq_s32(vld1q_s32(lanes), vdupq_n_s32((int32_t)n));
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(x), here));
}

OF_FORM INLINE vector plus(vector a, vector b) { return vaddq_f32(a, b); }
OF_FORM INLINE vector minus(vector a, vector b) { return vsubq_f32(a, b); }
OF_FORM INLINE vector times(vector a, vector b) { return vmulq_f32(a, b); }
OF_FORM INLINE vector times_plus(vector a, vector b, vector c) { return vfmaq_f32(c, a, b); }
OF_FORM INLINE vector larger(vector a, vector b) { return vmaxq_f32(a, b); }
OF_FORM INLINE vector magnitude(vector x) { return vabsq_f32(x); }
OF_FORM INLINE vector reciprocal(vector x) { return vdivq_f32(vdupq_n_f32(1.0f), x); }

OF_FORM INLINE vector by_sign(vector x, vector below, vector above) {
  uint32x4_t negative = vcltzq_s32(vreinterpretq_s32_f32(x));
  return vbslq_f32(negative, below, above);
}

OF_FORM INLINE vector split(vector x, vector *whole) {
  *whole = vrndnq_f32(x);
  return vsubq_f32(x, *whole);
}

/* For y near 1. */
OF_FORM INLINE vector shifted(vector y, vector whole) {
  int32x4_t power = vshlq_n_s32(vcvtq_s32_f32(vmaxq_f32(whole, vdupq_n_f32(-150.0f))), 23);
  int32x4_t made = vaddq_s32(vreinterpretq_s32_f32(y), power);
  uint32x4_t below = vcltq_f32(whole, vdupq_n_f32(-125.0f));
  return vreinterpretq_f32_s32(vbicq_s32(made, vreinterpretq_s32_u32(below)));
}

OF_FORM INLINE float sum_of(vector x) { return vaddvq_f32(x); }
OF_FORM INLINE float largest_of(vector x) { return vmaxvq_f32(x); }
OF_FORM INLINE integers no_bits(void) { return vdupq_n_s32(0); }

OF_FORM INLINE integers larger_bits(integers most, vector x) {
  return vmaxq_s32(most, vreinterpretq_s32_f32(vabsq_f32(x)));
}

OF_FORM INLINE float largest_of_bits(integers most) {
  union { int32_t bits; float value; } largest = {vmaxvq_s32(most)};
  return largest.value;
}

OF_FORM INLINE void store_codes(uint8_t *codes, vector x, size_t n) {
  int32x4_t code = vqaddq_s32(vcvtnq_s32_f32(x), vdupq_n_s32(128));
  uint16x4_t words = vqmovun_s32(code);
  uint8x8_t bytes = vqmovn_u16(vcombine_u16(words, words));
  uint8_t some[8];
  vst1_u8(some, bytes);
  memcpy(codes, some, n >= LANES ? LANES : n);
}

#endif
