/* Every form that the processor has against the plain one, on random inputs: a program, so that it
 * can be made for another architecture and run by an emulator. Says what it compared; 1 if anything
 * is beyond its limit. */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "rows.h"

enum kind { RANDOM, OFFSETS, SINKS, TINY_ONES, BAD_KEY, BAD_QUERY, KINDS };

static const char *const names[FORM_COUNT] = {
    "plain", "avx2", "avx-vnni", "avx512-vnni", "avx512-bf16", "dotprod"};
static const double within[FORM_COUNT] = {0.0, 0.006, 0.006, 0.03, 0.03, 0.03};

static int failures;

static void expect(int holds, const char *form, const char *what, double error) {
  if (holds) return;
  printf("FAILED %s %s: %g\n", form, what, error);
  failures++;
}

static unsigned long long state;

static void begin_randoms(void) { state = 88172645463325252ull; }

static double uniform(void) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return (double)(state >> 11) / 9007199254740992.0;
}

static float normal(void) {
  return (float)(sqrt(-2.0 * log(uniform() + 1e-300)) * cos(6.28318530717958648 * uniform()));
}

static float *randoms(size_t count) {
  float *x = malloc((count + 1) * sizeof *x);
  if (x == NULL) exit(2);
  for (size_t i = 0; i < count; i++) x[i] = normal();
  return x;
}

/* Channels with offsets and loud ones, keys that take all weight, tiny numbers, and no numbers. */
static void make(enum kind kind, float *q, float *k, float *v, const size_t *n) {
  size_t width = n[3] * n[4], queries = n[0] * n[1] * width, keys = n[0] * n[2] * width;
  float *offset = randoms(3 * width);
  for (size_t i = 0; i < queries && (kind == OFFSETS || kind == SINKS); i++)
    q[i] += offset[i % width];
  for (size_t i = 0; i < keys && (kind == OFFSETS || kind == SINKS); i++) {
    size_t c = i % width, token = i / width % n[2];
    k[i] = (k[i] + 4 * offset[width + c]) * (c % 16 == 0 ? 3 : 1);
    v[i] += offset[2 * width + c];
    if (kind == SINKS && token % 40 == 0) k[i] *= 3, v[i] *= 0.05f;
  }
  for (size_t i = 0; i < queries && kind == TINY_ONES; i++) q[i] *= 1e-20f;
  for (size_t i = 0; i < keys && kind == TINY_ONES; i++) k[i] *= 1e-20f, v[i] *= 1e-20f;
  if (kind == BAD_KEY) k[keys / 2] = NAN;
  if (kind == BAD_QUERY) q[queries / 2] = INFINITY;
  free(offset);
}

static void attend(const struct attention *call, enum form form) {
  for (size_t part = 0; part < attention_parts(call); part++)
    if (attention_part(call, form, part) != 0) exit(2);
}

static double try_attention(enum form form, enum kind kind, const size_t *n) {
  size_t width = n[3] * n[4], queries = n[0] * n[1] * width, keys = n[0] * n[2] * width;
  float *q = randoms(queries), *k = randoms(keys), *v = randoms(keys);
  float *wanted = randoms(queries), *found = randoms(queries);
  double error = 0.0, size = 1e-300;
  make(kind, q, k, v, n);
  struct attention call = {q, k, v, wanted, n[0], n[1], n[2], n[3], n[4]};
  attend(&call, FORM_PLAIN);
  call.out = found;
  attend(&call, form);
  for (size_t i = 0; i < queries; i++) {
    if (isnan(wanted[i]) != isnan(found[i])) error = INFINITY;
    if (isnan(wanted[i]) || isnan(found[i])) continue;
    error += ((double)wanted[i] - found[i]) * ((double)wanted[i] - found[i]);
    size += (double)wanted[i] * wanted[i];
  }
  free(q), free(k), free(v), free(wanted), free(found);
  return sqrt(error / size);
}

static void try_attentions(enum form form) {
  static const size_t shapes[][5] = {
      {1, 1, 1, 1, 32}, {2, 7, 7, 3, 64},    {1, 33, 33, 2, 72},   {1, 50, 17, 1, 128},
      {3, 6, 65, 2, 104}, {1, 7, 577, 1, 64}, {1, 5, 1100, 1, 20}, {1, 3, 9, 1, 4},
      {1, 4, 20, 1, 600}, {1, 5, 12, 2, 6}};
  for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
    for (enum kind kind = RANDOM; kind < KINDS; kind++) {
      char what[80];
      const size_t *n = shapes[s];
      double error = try_attention(form, kind, n);
      snprintf(what, sizeof what, "attention %zux%zux%zux%zux%zu kind %d", n[0], n[1], n[2], n[3],
               n[4], (int)kind);
      expect(error <= within[form], names[form], what, error);
    }
}

static void try_rounding(const char *name, struct rows *call, const char *what) {
  size_t count = call->count, width = call->width, differ = 0;
  uint8_t *codes = malloc(2 * count * width + 1);
  float *steps = randoms(2 * count);
  if (codes == NULL) exit(2);
  call->codes = codes, call->steps = steps;
  if (round_rows_plain(call, 0, count) != 0) exit(2);
  call->codes = codes + count * width, call->steps = steps + count;
  if (round_rows(call, 0, count) != 0) exit(2);
  for (size_t r = 0; r < count; r++) {
    double wanted = steps[r], found = steps[count + r];
    int alike = isfinite(wanted) ? fabs(found - wanted) <= 1e-4 * wanted : !isfinite(found);
    expect(alike, name, what, found / wanted);
    for (size_t i = r * width; isfinite(wanted) && i < (r + 1) * width; i++) {
      int apart = abs((int)codes[i] - (int)codes[count * width + i]);
      expect(apart <= 1, name, what, apart);
      differ += apart != 0;
    }
  }
  expect(differ <= 2 + count * width / 100, name, what, (double)differ);
  free(codes), free(steps);
}

static void try_rows(enum form form, size_t count, size_t width) {
  char what[80];
  float *x = randoms(count * width), *other = randoms(count * width), *y = randoms(count * width);
  float *scales = randoms(count), *bias = randoms(width), *weight = randoms(width);
  for (size_t i = 0; i < width; i++) x[i] = 0.0f;
  for (size_t i = 0; i < count * width; i += 7) x[i] *= 40.0f;
  for (int activation = NO_ACTIVATION; activation <= QUICK_GELU; activation++) {
    struct rows call = {x, scales, bias, NULL, NULL, NULL, count, width,
                        (enum activation)activation, 1.702f, 0.0f, 1e-30f};
    snprintf(what, sizeof what, "activation %d of %zux%zu", activation, count, width);
    try_rounding(names[form], &call, what);
  }
  struct rows norm = {x, NULL, bias, weight, NULL, NULL, count, width, NO_ACTIVATION, 0.0f, 1e-5f,
                      1e-30f};
  snprintf(what, sizeof what, "norm of %zux%zu", count, width);
  try_rounding(names[form], &norm, what);
  struct rows alone = {x, NULL, NULL, NULL, NULL, NULL, count, width, NO_ACTIVATION, 0.0f, 0.0f,
                       1e-30f};
  if (count > 2) x[width] = NAN, x[3 * width - 1] = -INFINITY;
  snprintf(what, sizeof what, "rounding of %zux%zu", count, width);
  try_rounding(names[form], &alone, what);
  struct scaling scaling = {x, scales, bias, other, y, count, width, count};
  if (count > 2) x[width] = x[3 * width - 1] = 1.0f;
  scale_rows(&scaling, 0, count);
  scaling.y = x; /* in place, as an entry is read before it is written */
  scale_rows_plain(&scaling, 0, count);
  for (size_t i = 0; i < count * width; i++)
    expect(fabsf(x[i] - y[i]) <= 1e-5f * (1.0f + fabsf(x[i])), names[form], "scaling", x[i] - y[i]);
  free(x), free(other), free(y), free(scales), free(bias), free(weight);
}

int main(void) {
  for (int form = 0; form < FORM_COUNT; form++) {
    if (edgevlm_use_form(form) != 0) continue;
    begin_randoms(); /* each form has the same numbers */
    try_attentions((enum form)form);
    try_rows((enum form)form, 1, 1);
    try_rows((enum form)form, 3, 16);
    try_rows((enum form)form, 5, 37);
    try_rows((enum form)form, 19, 200);
    printf("compared %s\n", names[form]);
  }
  return failures != 0;
}
