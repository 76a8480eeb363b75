/* Products of rows in 8 bits, as round_rows makes them, with weights in signed 8 bits. */

#ifndef EDGEVLM_PRODUCT_H
#define EDGEVLM_PRODUCT_H

#include <stddef.h>
#include <stdint.h>

/* A weight [inputs, outputs] in the order in which products read it: panels of PANEL outputs, of
 * each the bytes of four inputs together; and what the codes' zero point of 128 adds to a sum. */
#define PANEL 64

struct packed_weight {
  int8_t *bytes;     /* [panels][inputs / 4][PANEL][4] */
  int32_t *offsets;  /* [panels][PANEL] */
  size_t inputs, outputs, panels;
};

/* Whether the form in use has AVX-512 VNNI. */
int products_run_here(void);

/* Packs a weight, inputs of which must be a multiple of 4; -1 where there is no memory. */
int pack_weight(const int8_t *weight, size_t inputs, size_t outputs, struct packed_weight *packed);

void free_weight(struct packed_weight *packed);

/* y[r] = (codes[r] - 128) weight * scales * steps[r] + bias, and other[r], unless NULL. */
struct product {
  const struct packed_weight *weight;
  const uint8_t *codes;
  const float *steps, *scales, *bias, *other;
  float *y;
  size_t count;
};

/* Rows first..last of one panel of outputs. */
void multiply(const struct product *call, size_t panel, size_t first, size_t last);

/* codes, rounded_steps: rows of silu(gate) * up rounded to 8 bits as by round_rows; gate and up:
 * products of the same rows. values: memory for them before, [count][panels * PANEL], at a multiple
 * of 64 bytes. */
struct gated_product {
  struct product gate, up; /* without y, bias and other */
  float *values;
  uint8_t *codes;
  float *rounded_steps;
  float smallest;
};

/* Values of rows first..last of one panel; then, of all panels, codes and steps of rows. */
void multiply_gated(const struct gated_product *call, size_t panel, size_t first, size_t last);
void round_gated(const struct gated_product *call, size_t first, size_t last);

#endif
