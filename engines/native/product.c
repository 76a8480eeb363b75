/* Products of bytes with AVX-512 VNNI. Of ROWS rows and a panel of WIDTH vectors of 16 outputs, all
 * sums lie in registers, and are scaled while they are written. */

#include "product.h"

#if defined(__x86_64__)

#include "vector_avx512.h"
#include "vector_functions.h"

#include <stdlib.h>
#include <string.h>

#define VNNI OF_AVX512_VNNI
#define ROWS 6
#define WIDTH 4
#define LARGEST 127.0f

int products_run_here(void) {
  return form_in_use() == FORM_AVX512_VNNI || form_in_use() == FORM_AVX512_BF16;
}

int pack_weight(const int8_t *weight, size_t inputs, size_t outputs, struct packed_weight *packed) {
  size_t panels = rounded_up(outputs, PANEL) / PANEL, panel_bytes = inputs * PANEL;
  int8_t *bytes = aligned_alloc(64, panels * panel_bytes);
  int32_t *offsets = aligned_alloc(64, panels * PANEL * sizeof(int32_t));
  if (bytes == NULL || offsets == NULL) {
    free(bytes), free(offsets);
    return -1;
  }
  memset(offsets, 0, panels * PANEL * sizeof(int32_t));
  for (size_t panel = 0; panel < panels; panel++) {
    size_t here = outputs - panel * PANEL < PANEL ? outputs - panel * PANEL : PANEL;
    if (here < PANEL) memset(bytes + panel * panel_bytes, 0, panel_bytes);
    for (size_t i = 0; i < inputs; i++) {
      const int8_t *row = weight + i * outputs + panel * PANEL;
      int8_t *to = bytes + panel * panel_bytes + i / 4 * PANEL * 4 + i % 4;
      int32_t *offset = offsets + panel * PANEL;
      for (size_t n = 0; n < here; n++) to[n * 4] = row[n], offset[n] -= 128 * row[n];
    }
  }
  *packed = (struct packed_weight){bytes, offsets, inputs, outputs, panels};
  return 0;
}

void free_weight(struct packed_weight *packed) {
  free(packed->bytes), free(packed->offsets);
  packed->bytes = NULL, packed->offsets = NULL;
}

/* As the intrinsic, around which compilers have moved accumulators to the stack and back. */
VNNI INLINE void add_products(__m512i *sums, __m512i bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(*sums) : "v"(bytes), "v"(signed_bytes));
}

/* Sums of `rows` rows with a panel, in float but for the steps of the rows. */
VNNI INLINE void sum_tile(const struct product *call, size_t panel, size_t first, const int rows,
                          __m512 values[ROWS][WIDTH]) {
  const struct packed_weight *w = call->weight;
  const uint8_t *codes = call->codes + first * w->inputs;
  const int8_t *bytes = w->bytes + panel * w->inputs * PANEL;
  __m512i sums[ROWS][WIDTH];
#pragma GCC unroll 4
  for (int i = 0; i < WIDTH; i++) {
    __m512i offset = _mm512_load_si512(w->offsets + panel * PANEL + LANES * (size_t)i);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) sums[r][i] = offset;
  }
  for (size_t k = 0; k < w->inputs; k += 4, bytes += PANEL * 4) {
    __m512i weights[WIDTH];
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH; i++) weights[i] = _mm512_load_si512(bytes + 64 * i);
    _mm_prefetch((const char *)bytes + 2048, _MM_HINT_T0);
    _mm_prefetch((const char *)bytes + 2112, _MM_HINT_T0);
    _mm_prefetch((const char *)bytes + 2176, _MM_HINT_T0);
    _mm_prefetch((const char *)bytes + 2240, _MM_HINT_T0);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
      int32_t four;
      memcpy(&four, codes + (size_t)r * w->inputs + k, 4);
      __m512i code = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int i = 0; i < WIDTH; i++) add_products(&sums[r][i], code, weights[i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < WIDTH; i++) {
    size_t n = panel * PANEL + LANES * (size_t)i;
    __mmask16 mask = n < w->outputs ? lanes_left(w->outputs - n) : 0;
    __m512 scale = _mm512_maskz_loadu_ps(mask, call->scales + n);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
      values[r][i] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][i]), scale);
  }
}

VNNI INLINE void multiply_tile(const struct product *call, size_t panel, size_t first,
                               const int rows) {
  __m512 values[ROWS][WIDTH];
  size_t outputs = call->weight->outputs;
  sum_tile(call, panel, first, rows, values);
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
    size_t row = (first + (size_t)r) * outputs;
    __m512 step = _mm512_set1_ps(call->steps[first + (size_t)r]);
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH; i++) {
      size_t n = panel * PANEL + LANES * (size_t)i;
      __mmask16 mask = n < outputs ? lanes_left(outputs - n) : 0;
      __m512 y = _mm512_setzero_ps();
      if (call->bias != NULL) y = _mm512_maskz_loadu_ps(mask, call->bias + n);
      if (call->other != NULL)
        y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, call->other + row + n));
      _mm512_mask_storeu_ps(call->y + row + n, mask, _mm512_fmadd_ps(values[r][i], step, y));
    }
  }
}

VNNI void multiply(const struct product *call, size_t panel, size_t first, size_t last) {
  size_t row = first;
  for (; row + ROWS <= last; row += ROWS) multiply_tile(call, panel, row, ROWS);
  for (; row + 2 <= last; row += 2) multiply_tile(call, panel, row, 2);
  if (row < last) multiply_tile(call, panel, row, 1);
}

/* silu(gate) * up of `rows` rows and a panel, into rows of `width` floats. */
VNNI INLINE void gate_tile(const struct gated_product *call, size_t panel, size_t first,
                           const int rows, float *to, size_t width) {
  __m512 values[ROWS][WIDTH];
  float gates[ROWS][PANEL] __attribute__((aligned(64)));
  sum_tile(&call->gate, panel, first, rows, values);
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
    __m512 step = _mm512_set1_ps(call->gate.steps[first + (size_t)r]);
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH; i++)
      _mm512_store_ps(gates[r] + LANES * i, _mm512_mul_ps(values[r][i], step));
  }
  sum_tile(&call->up, panel, first, rows, values);
#pragma GCC unroll 6
  for (int r = 0; r < rows; r++) {
    __m512 step = _mm512_set1_ps(call->up.steps[first + (size_t)r]);
#pragma GCC unroll 4
    for (int i = 0; i < WIDTH; i++) {
      __m512 open = silu(_mm512_load_ps(gates[r] + LANES * i));
      _mm512_store_ps(to + (size_t)r * width + panel * PANEL + LANES * (size_t)i,
                      _mm512_mul_ps(open, _mm512_mul_ps(values[r][i], step)));
    }
  }
}

VNNI void multiply_gated(const struct gated_product *call, size_t panel, size_t first,
                         size_t last) {
  size_t row = first, width = call->up.weight->panels * PANEL;
  for (; row + ROWS <= last; row += ROWS)
    gate_tile(call, panel, row, ROWS, call->values + row * width, width);
  for (; row + 2 <= last; row += 2)
    gate_tile(call, panel, row, 2, call->values + row * width, width);
  if (row < last) gate_tile(call, panel, row, 1, call->values + row * width, width);
}

VNNI void round_gated(const struct gated_product *call, size_t first, size_t last) {
  size_t outputs = call->up.weight->outputs, width = call->up.weight->panels * PANEL;
  for (size_t r = first; r < last; r++) {
    const float *row = call->values + r * width;
    __m512i largest = _mm512_setzero_si512();
    for (size_t i = 0; i < width; i += LANES) /* behind the last output there are zeros */
      largest = larger_bits(largest, _mm512_load_ps(row + i));
    float most = largest_of_bits(largest);
    if (most < call->smallest) most = call->smallest;
    call->rounded_steps[r] = most / LARGEST;
    __m512 inverse = _mm512_set1_ps(1.0f / call->rounded_steps[r]);
    for (size_t i = 0; i < outputs; i += LANES) {
      __m512 code = _mm512_mul_ps(_mm512_load_ps(row + i), inverse);
      store_codes(call->codes + r * outputs + i, code, outputs - i);
    }
  }
}

#else

int products_run_here(void) { return 0; }

int pack_weight(const int8_t *weight, size_t inputs, size_t outputs, struct packed_weight *packed) {
  return (void)weight, (void)inputs, (void)outputs, (void)packed, -1;
}

void free_weight(struct packed_weight *packed) { (void)packed; }

void multiply(const struct product *call, size_t panel, size_t first, size_t last) {
  (void)call, (void)panel, (void)first, (void)last;
}

void multiply_gated(const struct gated_product *call, size_t panel, size_t first, size_t last) {
  (void)call, (void)panel, (void)first, (void)last;
}

void round_gated(const struct gated_product *call, size_t first, size_t last) {
  (void)call, (void)first, (void)last;
}

#endif
