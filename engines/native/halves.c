/* Which form of a product with weights in 16 bits runs, and how a call is divided. */

#include "halves.h"

#include "forms.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define FEW 8 /* rows for which weights are used as they are read; of more, from a block of floats */
#define DEEP 256 /* inputs whose weights are in a block at a time */
#define PANEL 32 /* outputs that are computed together */
#define MOST_PANELS 14 /* of a block, which is to lie in the second-level cache: 448 KB */
#define PARTS 8
#define LEAST_COLUMNS 256 /* of a part of few rows, so that memory is read in pieces of 512 bytes */
#define LEAST_ROWS 256 /* of a part of many: each converts its weights for itself */
#define ROWS_OF_PARTS 12 /* a multiple of every form's rows of a tile */
#define OUTPUTS_AT_A_TIME 512 /* of transposed weights */

struct span {
  size_t first, last;
};

static size_t least(size_t a, size_t b) { return a < b ? a : b; }
static size_t ceiling(size_t a, size_t b) { return (a + b - 1) / b; }

/* The share of part `i` of `parts` in `count` values, which are dealt by the `unit`. */
static struct span share(size_t i, size_t parts, size_t count, size_t unit) {
  size_t units = ceiling(count, unit);
  return (struct span){least(i * units / parts * unit, count),
                       least((i + 1) * units / parts * unit, count)};
}

/* -- in no vectors -- */

static float upcast(uint16_t half, enum half kind) {
  union { uint32_t bits; float value; } to = {(uint32_t)half << 16};
  if (kind == HALF_BF16) return to.value;
  uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, rest = half & 1023;
  if (exponent == 0) { /* 0, or below the smallest normal number */
    to.value = (float)rest * 0x1p-24f;
    to.bits |= sign;
    return to.value;
  }
  to.bits = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | rest << 13;
  return to.value;
}

static void plain(const struct halves *call, struct span of, struct span rows) {
  size_t stride = call->transposed ? 1 : call->outputs;
  for (size_t r = rows.first; r < rows.last; r++)
    for (size_t c = of.first; c < of.last; c++) {
      const float *x = call->x + r * call->inputs;
      const uint16_t *w = call->w + c * (call->transposed ? call->inputs : 1);
      float sum = 0.0f;
      for (size_t k = 0; k < call->inputs; k++) sum = fmaf(x[k], upcast(w[k * stride], call->kind), sum);
      if (call->bias != NULL) sum += call->bias[c];
      if (call->alpha != 0.0f) sum /= 1.0f + expf(-call->alpha * sum);
      float other = call->joined ? call->other[r % call->others * call->outputs + c] : 0.0f;
      if (call->joined == JOINED_SUM) sum += other;
      if (call->joined == JOINED_PRODUCT) sum *= other;
      call->y[r * call->outputs + c] = sum;
    }
}

#if defined(__x86_64__)

#include <immintrin.h>

/* -- AVX-512 -- */

#define TARGET OF_AVX512
#define NAME(name) name##_512
#define TILE 12 /* rows that are computed together: with two vectors of outputs 24 registers */
#define LANES 16
#define VECTOR __m512
#define ZERO _mm512_setzero_ps()
#define LOAD(p) _mm512_loadu_ps(p)
#define STORE(p, v) _mm512_storeu_ps(p, v)
#define SAME(value) _mm512_set1_ps(value)
#define ADD(a, b) _mm512_add_ps(a, b)
#define FMA(a, b, c) _mm512_fmadd_ps(a, b, c)
#define FROM_FP16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define FROM_BF16(p)      \
  _mm512_castsi512_ps(    \
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p))), 16))
#define SUM(v) _mm512_reduce_add_ps(v)
#define MULTIPLY(a, b) _mm512_mul_ps(a, b)
#define DIVIDE(a, b) _mm512_div_ps(a, b)
#define LEAST(a, b) _mm512_min_ps(a, b)
#define MOST(a, b) _mm512_max_ps(a, b)
#define WHOLE(v) _mm512_roundscale_ps(v, 0)
#define TWO_TO(v) \
  _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtps_epi32(_mm512_add_ps(v, SAME(127.0f))), 23))
#include "halves_tiles.h"
#undef TARGET
#undef NAME
#undef TILE
#undef LANES
#undef VECTOR
#undef ZERO
#undef LOAD
#undef STORE
#undef SAME
#undef ADD
#undef FMA
#undef FROM_FP16
#undef FROM_BF16
#undef SUM
#undef MULTIPLY
#undef DIVIDE
#undef LEAST
#undef MOST
#undef WHOLE
#undef TWO_TO

/* -- AVX2 -- */

#define TARGET OF_AVX2
#define NAME(name) name##_256
#define TILE 3 /* with four vectors of outputs 12 registers */
#define LANES 8
#define VECTOR __m256
#define ZERO _mm256_setzero_ps()
#define LOAD(p) _mm256_loadu_ps(p)
#define STORE(p, v) _mm256_storeu_ps(p, v)
#define SAME(value) _mm256_set1_ps(value)
#define ADD(a, b) _mm256_add_ps(a, b)
#define FMA(a, b, c) _mm256_fmadd_ps(a, b, c)
#define FROM_FP16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define FROM_BF16(p)      \
  _mm256_castsi256_ps(    \
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define SUM(v) sum_of_eight(v)
#define MULTIPLY(a, b) _mm256_mul_ps(a, b)
#define DIVIDE(a, b) _mm256_div_ps(a, b)
#define LEAST(a, b) _mm256_min_ps(a, b)
#define MOST(a, b) _mm256_max_ps(a, b)
#define WHOLE(v) _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define TWO_TO(v) \
  _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_add_ps(v, SAME(127.0f))), 23))

OF_AVX2 static inline float sum_of_eight(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

#include "halves_tiles.h"

#endif

/* -- which form, and parts -- */

enum halves_form halves_form_in_use(void) {
  switch (form_in_use()) {
    case FORM_AVX512_BF16: case FORM_AVX512_VNNI: return HALVES_AVX512;
    case FORM_AVX_VNNI: case FORM_AVX2: return HALVES_AVX2;
    default: return HALVES_PLAIN;
  }
}

/* Parts by outputs, and of each by rows. */
struct division {
  size_t columns, rows;
};

static struct division division_of(const struct halves *call) {
  size_t panels = ceiling(call->outputs, PANEL), most = ceiling(call->outputs, LEAST_COLUMNS);
  if (call->transposed) return (struct division){ceiling(call->outputs, OUTPUTS_AT_A_TIME), 1};
  if (call->rows <= FEW) return (struct division){least(most, PARTS), 1};
  size_t columns = ceiling(panels, MOST_PANELS);
  if (columns > 1) columns = ceiling(columns, 2) * 2;
  size_t rows = columns < PARTS ? least(PARTS / columns, call->rows / LEAST_ROWS) : 1;
  if (rows == 0) rows = 1;
  return (struct division){columns, rows};
}

size_t halves_parts(const struct halves *call) {
  struct division parts = division_of(call);
  return call->rows == 0 || call->outputs == 0 ? 0 : parts.columns * parts.rows;
}

int halves_part(const struct halves *call, enum halves_form form, size_t part) {
  struct division parts = division_of(call);
  size_t column = part / parts.rows, row = part % parts.rows, unit = call->rows <= FEW ? 16 : PANEL;
  struct span of = share(column, parts.columns, call->outputs, unit);
  struct span rows = share(row, parts.rows, call->rows, ROWS_OF_PARTS);
#if defined(__x86_64__)
  int wide = form == HALVES_AVX512;
  if (form != HALVES_PLAIN && call->transposed)
    return wide ? dots_512(call, of) : dots_256(call, of);
  if (form != HALVES_PLAIN && call->rows <= FEW)
    return wide ? few_512(call, of) : few_256(call, of);
  if (form != HALVES_PLAIN)
    return wide ? many_512(call, of, rows) : many_256(call, of, rows);
#endif
  (void)form;
  plain(call, of, rows);
  return 0;
}
