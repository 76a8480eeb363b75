/* Products of float32 rows and weights in 16 bits, which become float32 while they are read. */

#ifndef EDGEVLM_HALVES_H
#define EDGEVLM_HALVES_H

#include <stddef.h>
#include <stdint.h>

enum half { HALF_FP16, HALF_BF16 };

enum joined { JOINED_NOTHING, JOINED_SUM, JOINED_PRODUCT };

/* y [rows, outputs] = a(x [rows, inputs] * w [inputs, outputs] + bias), then joined with row
 * r % others of `other` as a sum or a product. transposed: w is [outputs, inputs]. bias may be
 * NULL. a(z) = z * sigmoid(alpha * z), or z where alpha is 0. Every value of w is exact in float32,
 * and all sums are of float32; the bits of a row depend on no other row, nor on how many there are.
 */
struct halves {
  const float *x, *bias, *other;
  const uint16_t *w;
  float *y;
  size_t rows, inputs, outputs, others;
  enum half kind;
  enum joined joined;
  float alpha;
  int transposed;
};

/* Parts of a call that may run at the same time; the answer does not depend on how they do. */
size_t halves_parts(const struct halves *call);

/* In which vectors: without any, AVX2 with FMA and F16C, AVX-512. */
enum halves_form { HALVES_PLAIN, HALVES_AVX2, HALVES_AVX512 };

/* That of the library's form in use. */
enum halves_form halves_form_in_use(void);

/* Computes one part; 0, or -1 where there is no memory for it. */
int halves_part(const struct halves *call, enum halves_form form, size_t part);

#endif
