/* The library that ONNX Runtime loads: our kernels as ops of the domain edgevlm.native.
 *
 * RoundedAttention: q, k, v -> y; num_heads.
 * RoundRows: x -> codes, steps.
 * ActivateAndRound: x, scales, bias -> codes, steps; activation, alpha.
 * NormAndRound: x, weight, bias -> codes, steps; epsilon.
 * ScaleRows: x, scales, bias -> y. ScaleRowsOnto: x, scales, bias, other -> y.
 * And those of decoder_ops.c, product_ops.c and upcast.c.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#include "forms.h"
#include "ops.h"
#include "rows.h"

struct kernel {
  const entry *api;
  int64_t number; /* heads, or the activation */
  float alpha;    /* or a norm's epsilon */
};

const entry *used_api;

/* -- attention -- */

struct attention_job {
  struct attention call;
  enum form form;
  int failed;
};

static void attend_part(void *job, size_t part) {
  struct attention_job *j = job;
  if (attention_part(&j->call, j->form, part) != 0) fail(&j->failed);
}

static status *attend(void *kernel, kernel_context *context) {
  const struct kernel *self = kernel;
  const entry *api = self->api;
  struct tensor q, k, v;
  TRY(input(api, context, 0, &q));
  TRY(input(api, context, 1, &k));
  TRY(input(api, context, 2, &v));
  int fits = q.rank == 3 && k.rank == 3 && v.rank == 3 &&
             memcmp(k.sizes, v.sizes, 3 * sizeof *k.sizes) == 0 && q.sizes[0] == k.sizes[0] &&
             q.sizes[2] == k.sizes[2] && q.sizes[2] % self->number == 0;
  if (!fits) return CREATE_STATUS(api)(INVALID_ARGUMENT, "q, k and v do not go together");
  struct tensor y = q;
  TRY(output(api, context, 0, &y));
  struct attention_job job = {
      .call = {q.data, k.data, v.data, y.data, (size_t)q.sizes[0], (size_t)q.sizes[1],
               (size_t)k.sizes[1], (size_t)self->number, (size_t)(q.sizes[2] / self->number)},
      .form = form_in_use()};
  TRY(PARALLEL_FOR(api)(context, attend_part, attention_parts(&job.call), 0, &job));
  return job.failed ? CREATE_STATUS(api)(FAILED, "no memory for attention") : NULL;
}

/* -- rows -- */

struct rows_job {
  struct rows call;
  int failed;
};

static void round_part(void *job, size_t part) {
  struct rows_job *j = job;
  size_t first = part * ROWS_AT_A_TIME, last = first + ROWS_AT_A_TIME;
  if (last > j->call.count) last = j->call.count;
  if (round_rows(&j->call, first, last) != 0) fail(&j->failed);
}

static status *rounded(const struct kernel *self, kernel_context *context, const struct tensor *x,
                       const float *scales, const float *bias, const float *weight) {
  const entry *api = self->api;
  struct tensor codes = *x, steps = *x;
  steps.sizes[x->rank - 1] = 1;
  TRY(output(api, context, 0, &codes));
  TRY(output(api, context, 1, &steps));
  size_t width = (size_t)x->sizes[x->rank - 1], count = elements(&steps);
  struct rows_job job = {.call = {x->data, scales, bias, weight, codes.data, steps.data, count,
                                  width, (enum activation)self->number, self->alpha, self->alpha,
                                  SMALLEST}};
  size_t parts = (count + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
  if (parts > 0) TRY(PARALLEL_FOR(api)(context, round_part, parts, 0, &job));
  return job.failed ? CREATE_STATUS(api)(FAILED, "no memory for rows") : NULL;
}

static status *round_only(void *kernel, kernel_context *context) {
  const struct kernel *self = kernel;
  struct tensor x;
  TRY(input(self->api, context, 0, &x));
  return rounded(self, context, &x, NULL, NULL, NULL);
}

static status *norm(void *kernel, kernel_context *context) {
  const struct kernel *self = kernel;
  struct tensor x, weight, bias;
  TRY(input(self->api, context, 0, &x));
  TRY(input(self->api, context, 1, &weight));
  TRY(input(self->api, context, 2, &bias));
  size_t width = (size_t)x.sizes[x.rank - 1];
  if (elements(&weight) != width || elements(&bias) != width)
    return CREATE_STATUS(self->api)(INVALID_ARGUMENT, "rows, weight and bias do not go together");
  return rounded(self, context, &x, NULL, bias.data, weight.data);
}

static status *activate(void *kernel, kernel_context *context) {
  const struct kernel *self = kernel;
  struct tensor x, scales, bias;
  TRY(input(self->api, context, 0, &x));
  TRY(input(self->api, context, 1, &scales));
  TRY(input(self->api, context, 2, &bias));
  size_t width = (size_t)x.sizes[x.rank - 1];
  if (elements(&bias) != width || elements(&scales) * width != elements(&x))
    return CREATE_STATUS(self->api)(INVALID_ARGUMENT, "rows, scales and bias do not go together");
  return rounded(self, context, &x, scales.data, bias.data, NULL);
}

static void scale_part(void *call, size_t part) {
  const struct scaling *c = call;
  size_t first = part * ROWS_AT_A_TIME, last = first + ROWS_AT_A_TIME;
  scale_rows(c, first, last < c->count ? last : c->count);
}

size_t others_of(const struct tensor *x, const struct tensor *other) {
  size_t in_front = 0;
  if (other->rank > x->rank) return 0;
  in_front = x->rank - other->rank;
  for (size_t i = 0, same = 0; i < other->rank; i++) {
    same |= other->sizes[i] == x->sizes[in_front + i];
    if (other->sizes[i] != (same ? x->sizes[in_front + i] : 1)) return 0;
  }
  return elements(other) / (size_t)other->sizes[other->rank - 1];
}

static status *scale(const entry *api, kernel_context *context, const struct tensor *other) {
  struct tensor x, scales, bias;
  TRY(input(api, context, 0, &x));
  TRY(input(api, context, 1, &scales));
  TRY(input(api, context, 2, &bias));
  size_t width = (size_t)x.sizes[x.rank - 1], others = 1;
  if (elements(&x) > 0 && other != NULL) others = others_of(&x, other);
  if (elements(&bias) != width || elements(&scales) * width != elements(&x) || others == 0)
    return CREATE_STATUS(api)(INVALID_ARGUMENT, "rows and what scales them do not go together");
  struct tensor y = x;
  TRY(output(api, context, 0, &y));
  struct scaling call = {x.data, scales.data, bias.data, other != NULL ? other->data : NULL,
                         y.data, elements(&scales), width, others};
  size_t parts = (call.count + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
  return parts > 0 ? PARALLEL_FOR(api)(context, scale_part, parts, 0, &call) : NULL;
}

static status *scale_alone(void *kernel, kernel_context *context) {
  return scale(((const struct kernel *)kernel)->api, context, NULL);
}

static status *scale_onto(void *kernel, kernel_context *context) {
  const entry *api = ((const struct kernel *)kernel)->api;
  struct tensor other;
  TRY(input(api, context, 3, &other));
  return scale(api, context, &other);
}

/* -- kernels -- */

static status *made(const entry *api, int64_t number, float alpha, void **kernel) {
  struct kernel *self = malloc(sizeof *self);
  if (self == NULL) return CREATE_STATUS(api)(FAILED, "no memory for a kernel");
  *self = (struct kernel){api, number, alpha};
  *kernel = self;
  return NULL;
}

static status *create_attention(const struct custom_op *op, const entry *api,
                                const kernel_info *info, void **kernel) {
  int64_t heads = 0;
  (void)op;
  TRY(INT_ATTRIBUTE(api)(info, "num_heads", &heads));
  if (heads < 1) return CREATE_STATUS(api)(INVALID_ARGUMENT, "num_heads is below 1");
  return made(api, heads, 0.0f, kernel);
}

static status *create_norm(const struct custom_op *op, const entry *api, const kernel_info *info,
                           void **kernel) {
  float epsilon = 0.0f;
  (void)op;
  TRY(FLOAT_ATTRIBUTE(api)(info, "epsilon", &epsilon));
  return made(api, NO_ACTIVATION, epsilon, kernel);
}

static status *create_rounding(const struct custom_op *op, const entry *api,
                               const kernel_info *info, void **kernel) {
  (void)op, (void)info;
  return made(api, NO_ACTIVATION, 0.0f, kernel);
}

static status *create_activation(const struct custom_op *op, const entry *api,
                                 const kernel_info *info, void **kernel) {
  int64_t activation = 0;
  float alpha = 0.0f;
  (void)op;
  TRY(INT_ATTRIBUTE(api)(info, "activation", &activation));
  TRY(FLOAT_ATTRIBUTE(api)(info, "alpha", &alpha));
  if (activation < NO_ACTIVATION || activation > QUICK_GELU)
    return CREATE_STATUS(api)(INVALID_ARGUMENT, "there is no such activation");
  return made(api, activation, alpha, kernel);
}

/* -- shapes, before anything runs -- */

static status *fill(const struct tensor *x, const char **names, shape_info *shape) {
  TRY(SET_DIMENSIONS(used_api)(shape, x->sizes, x->rank));
  return SET_NAMES(used_api)(shape, names, x->rank);
}

/* Sizes that are not known have names; one without gets a new one, as ONNX Runtime would read -1 as
 * a size. */
status *infer_as(shape_context *context, size_t from, size_t index, int64_t last) {
  static unsigned count;
  shape_info *x = NULL, *shape = NULL;
  const char *names[MOST_AXES] = {0};
  char made[MOST_AXES][32];
  struct tensor sizes;
  TRY(INFERRED_INPUT(used_api)(context, from, &x));
  status *odd = sizes_of(used_api, x, &sizes);
  if (odd != NULL) { /* nothing is known of it */
    RELEASE_STATUS(used_api)(odd);
    return NULL;
  }
  TRY(NAMES(used_api)(x, names, sizes.rank));
  if (last != 0) sizes.sizes[sizes.rank - 1] = last;
  for (size_t i = 0; i < sizes.rank; i++) {
    int named = names[i] != NULL && names[i][0] != 0;
    if (sizes.sizes[i] >= 0) {
      names[i] = "";
    } else if (!named) {
      unsigned number = __atomic_add_fetch(&count, 1, __ATOMIC_RELAXED);
      snprintf(made[i], sizeof made[i], "edgevlm.native.%u", number);
      names[i] = made[i];
    }
  }
  TRY(NEW_SHAPE(used_api)(&shape));
  status *failed = fill(&sizes, names, shape);
  if (failed == NULL) failed = INFER_OUTPUT(used_api)(context, index, shape);
  RELEASE_SHAPE(used_api)(shape);
  return failed;
}

status *inferred_last(shape_context *context, size_t from, int64_t *last) {
  shape_info *x = NULL;
  struct tensor sizes;
  TRY(INFERRED_INPUT(used_api)(context, from, &x));
  TRY(sizes_of(used_api, x, &sizes));
  *last = sizes.sizes[sizes.rank - 1];
  return NULL;
}

static status *infer_same(const struct custom_op *op, shape_context *context) {
  (void)op;
  return infer_as(context, 0, 0, 0);
}

static status *infer_rows(const struct custom_op *op, shape_context *context) {
  (void)op;
  TRY(infer_as(context, 0, 0, 0));
  return infer_as(context, 0, 1, 1);
}

/* -- ops -- */

NAMED(attention_name, "RoundedAttention")
NAMED(rounding_name, "RoundRows")
NAMED(norm_name, "NormAndRound")
NAMED(scale_name, "ScaleRows")
NAMED(onto_name, "ScaleRowsOnto")
NAMED(activation_name, "ActivateAndRound")
NAMED(provider, "CPUExecutionProvider")
COUNT(one, 1)
COUNT(two, 2)
COUNT(three, 3)
COUNT(four, 4)
TYPES(floats, FLOAT32)
TYPES(codes_first, (i == 0 ? UINT8 : FLOAT32))
TYPES(required, 0)
NUMBER(none, 0)
NUMBER(first_version, 1)
NUMBER(last_version, 0x7fffffff)

static const struct custom_op ops[] = {
    OP(attention_name, three, floats, one, floats, create_attention, free, attend, infer_same),
    OP(rounding_name, one, floats, two, codes_first, create_rounding, free, round_only, infer_rows),
    OP(activation_name, three, floats, two, codes_first, create_activation, free, activate,
       infer_rows),
    OP(norm_name, three, floats, two, codes_first, create_norm, free, norm, infer_rows),
    OP(scale_name, three, floats, one, floats, create_rounding, free, scale_alone, infer_same),
    OP(onto_name, four, floats, one, floats, create_rounding, free, scale_onto, infer_same),
};

/* What ONNX Runtime calls for each session; the domain outlives them all. */
EXPORTED status *RegisterCustomOps(options *session, const struct api_base *base) {
  static domain *known;
  const entry *api = base->get_api(API_VERSION);
  if (api == NULL) return CREATE_STATUS(base->get_api(1))(FAILED, "ONNX Runtime is before 1.17");
  domain *found = __atomic_load_n(&known, __ATOMIC_ACQUIRE);
  if (found == NULL) {
    __atomic_store_n(&used_api, api, __ATOMIC_RELEASE);
    TRY(CREATE_DOMAIN(api)("edgevlm.native", &found));
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) TRY(ADD_OP(api)(found, &ops[i]));
    for (size_t i = 0; i < decoder_op_count; i++) TRY(ADD_OP(api)(found, &decoder_ops[i]));
    for (size_t i = 0; i < product_op_count; i++) TRY(ADD_OP(api)(found, &product_ops[i]));
    TRY(ADD_OP(api)(found, &upcast_op));
    __atomic_store_n(&known, found, __ATOMIC_RELEASE); /* two at once: each uses its own */
  }
  return ADD_DOMAIN(api)(session, found);
}

/* -- for tests -- */

EXPORTED int edgevlm_attend(const float *q, const float *k, const float *v, float *out,
                            const size_t *sizes, int form) {
  struct attention call = {q, k, v, out, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  size_t parts = attention_parts(&call);
  for (size_t part = 0; part < parts; part++)
    if (attention_part(&call, (enum form)form, part) != 0) return -1;
  return 0;
}
