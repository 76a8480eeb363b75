/* The rounding of rows in one pass over memory: a row lies in the first-level cache meanwhile.
 *
 * Included by the file of each form, behind its vector_*.h, with FORM_OF(name) for its functions.
 */

#include <math.h>
#include <stdlib.h>

#include "rows.h"
#include "vector_functions.h"

/* A row less its mean, over its standard deviation, by weight and bias; otherwise as below. */
OF_FORM static float normed(const struct rows *call, size_t r, float *row) {
  const float *x = call->x + r * call->width;
  size_t width = call->width;
  float share = 1.0f / (float)width;
  vector sum = all(0.0f), squares = all(0.0f);
  integers most = no_bits();
  for (size_t i = 0; i < width; i += LANES) sum = plus(sum, load_some(x + i, width - i));
  vector mean = all(sum_of(sum) * share);
  for (size_t i = 0; i < width; i += LANES) {
    vector y = only_some(minus(load_some(x + i, width - i), mean), width - i);
    squares = times_plus(y, y, squares);
    store(row + i, y);
  }
  vector inverse = all(1.0f / sqrtf(sum_of(squares) * share + call->epsilon));
  for (size_t i = 0; i < width; i += LANES) {
    vector y = times(load(row + i), inverse);
    y = times_plus(y, load_some(call->weight + i, width - i), load_some(call->bias + i, width - i));
    store(row + i, y);
    most = larger_bits(most, y);
  }
  return largest_of_bits(most);
}

/* y of a row in `row`, and its largest magnitude; a NaN counts as the largest. */
OF_FORM INLINE float activated(const struct rows *call, size_t r, float *row,
                               const enum activation activation) {
  const float *x = call->x + r * call->width;
  vector scale = all(call->scales != NULL ? call->scales[r] : 1.0f), alpha = all(call->alpha);
  integers most = no_bits();
  for (size_t i = 0; i < call->width; i += LANES) {
    size_t left = call->width - i;
    vector bias = call->bias != NULL ? load_some(call->bias + i, left) : all(0.0f);
    vector y = only_some(times_plus(load_some(x + i, left), scale, bias), left);
    if (activation == GELU) y = gelu(y);
    if (activation == GELU_TANH) y = gelu_tanh(y);
    if (activation == QUICK_GELU) y = gated(y, times(y, alpha));
    store(row + i, y);
    most = larger_bits(most, y);
  }
  return largest_of_bits(most);
}

OF_FORM static void codes_of(const float *row, float step, uint8_t *codes, size_t width) {
  vector inverse = all(1.0f / step);
  for (size_t i = 0; i < width; i += LANES)
    store_codes(codes + i, times(load(row + i), inverse), width - i);
}

OF_FORM int FORM_OF(round_rows)(const struct rows *call, size_t first, size_t last) {
  size_t padded = (call->width + LANES - 1) / LANES * LANES * sizeof(float);
  float *row = aligned_alloc(64, (padded + 63) / 64 * 64);
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
    call->steps[r] = step_of(call, most);
    codes_of(row, call->steps[r], call->codes + r * call->width, call->width);
  }
  free(row);
  return 0;
}

OF_FORM void FORM_OF(scale_rows)(const struct scaling *call, size_t first, size_t last) {
  size_t width = call->width;
  for (size_t r = first; r < last; r++) {
    const float *x = call->x + r * width;
    const float *other = call->other != NULL ? call->other + r % call->others * width : NULL;
    float *y = call->y + r * width;
    vector scale = all(call->scales[r]);
    for (size_t i = 0; i < width; i += LANES) {
      size_t left = width - i;
      vector sum = times_plus(load_some(x + i, left), scale, load_some(call->bias + i, left));
      if (other != NULL) sum = plus(sum, load_some(other + i, left));
      store_some(y + i, sum, left);
    }
  }
}
