/* Norms and gates of a decoder, rounded in one pass over memory: a row lies in the first-level
 * cache meanwhile. */

#include "decoder.h"

#if defined(__x86_64__)

#include "vector_avx512.h"
#include "vector_functions.h"

#include <math.h>
#include <stdlib.h>

#define LARGEST 127.0f

int decoder_runs_here(int bfloat16) {
  return form_in_use() == FORM_AVX512_BF16 || (!bfloat16 && form_in_use() == FORM_AVX512_VNNI);
}

static float *row_of(size_t width) {
  return aligned_alloc(64, rounded_up(width, LANES) * sizeof(float));
}

/* The codes of a row and its step, of its largest magnitude. */
OF_AVX512 INLINE void round_row(const float *row, float most, float smallest, uint8_t *codes,
                             float *step, size_t width) {
  if (most < smallest) most = smallest;
  *step = most / LARGEST;
  __m512 inverse = _mm512_set1_ps(1.0f / *step);
  for (size_t i = 0; i < width; i += LANES) {
    __m512 code = _mm512_mul_ps(_mm512_load_ps(row + i), inverse);
    store_codes(codes + i, code, width - i);
  }
}

/* y of a row in `row` and, where it is a sum, in memory; the sum of its squares. */
OF_AVX512 INLINE float summed(const struct normed_rows *call, size_t r, float *row) {
  size_t width = call->width, at = r * width;
  const float *x = call->x + at, *other = call->other + at;
  __m512 squares = _mm512_setzero_ps();
  __m512 scale = _mm512_set1_ps(call->scales != NULL ? call->scales[r] : 1.0f);
  for (size_t i = 0; i < width; i += LANES) {
    __mmask16 mask = lanes_left(width - i);
    __m512 y = _mm512_maskz_loadu_ps(mask, x + i);
    if (call->scales != NULL) {
      y = _mm512_fmadd_ps(y, scale, _mm512_maskz_loadu_ps(mask, other + i));
      _mm512_mask_storeu_ps(call->y + at + i, mask, y);
    }
    _mm512_store_ps(row + i, y);
    squares = _mm512_fmadd_ps(y, y, squares);
  }
  return _mm512_reduce_add_ps(squares);
}

OF_AVX512 int norm_rows(const struct normed_rows *call, size_t first, size_t last) {
  size_t width = call->width;
  float *row = row_of(width);
  if (row == NULL) return -1;
  for (size_t r = first; r < last; r++) {
    float mean = summed(call, r, row) / (float)width;
    __m512 inverse = _mm512_set1_ps(1.0f / sqrtf(mean + call->epsilon));
    __m512i most = _mm512_setzero_si512();
    for (size_t i = 0; i < width; i += LANES) {
      __m512 weight = _mm512_maskz_loadu_ps(lanes_left(width - i), call->weight + i);
      __m512 z = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(row + i), inverse), weight);
      _mm512_store_ps(row + i, z);
      most = larger_bits(most, z);
    }
    round_row(row, largest_of_bits(most), call->smallest, call->codes + r * width, call->steps + r,
              width);
  }
  free(row);
  return 0;
}

OF_AVX512 int gate_rows(const struct gated_rows *call, size_t first, size_t last) {
  size_t width = call->width;
  float *row = row_of(width);
  if (row == NULL) return -1;
  for (size_t r = first; r < last; r++) {
    const float *gate = call->gate + r * width, *up = call->up + r * width;
    __m512 scale = _mm512_set1_ps(call->scales[r]);
    __m512i most = _mm512_setzero_si512();
    for (size_t i = 0; i < width; i += LANES) {
      __mmask16 mask = lanes_left(width - i);
      __m512 open = silu(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, gate + i), scale));
      __m512 z = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, up + i), scale);
      z = _mm512_mul_ps(open, z);
      _mm512_store_ps(row + i, z);
      most = larger_bits(most, z);
    }
    round_row(row, largest_of_bits(most), call->smallest, call->codes + r * width, call->steps + r,
              width);
  }
  free(row);
  return 0;
}

#else

int decoder_runs_here(int bfloat16) { return (void)bfloat16, 0; }

int norm_rows(const struct normed_rows *call, size_t first, size_t last) {
  return (void)call, (void)first, (void)last, -1;
}

int gate_rows(const struct gated_rows *call, size_t first, size_t last) {
  return (void)call, (void)first, (void)last, -1;
}

#endif
