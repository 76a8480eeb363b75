/* Products of rounded rows as ops of the domain edgevlm.native. Their weights are constants, which
 * are packed when a session is made.
 *
 * RoundedProduct: codes, steps, weight, scales, bias -> y. RoundedProductOnto: the same, other -> y.
 * ActivatedProduct: codes, steps, weight, scales, bias -> codes, steps; activation, alpha.
 * GatedProduct: codes, steps, gate's weight and scales, up's weight and scales -> codes, steps.
 *
 * Where the form in use lacks what they need, no session with them can be made.
 */

#define _DEFAULT_SOURCE

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ops.h"
#include "product.h"
#include "rows.h"

#define MISFIT "rows and weights do not go together"
#define ROWS_OF_A_PART 256 /* of one panel, which stays in the second-level cache meanwhile */
#define ACTIVATED_ROWS 64  /* of all panels, before they are rounded */

struct product_kernel {
  const entry *api;
  struct packed_weight weights[2]; /* of gate and up; or one */
  int64_t activation;
  float alpha;
};

static size_t blocks(size_t count, size_t size) { return (count + size - 1) / size; }

/* -- making -- */

/* The weight as it was given is read no more: its pages need not stay in memory. */
static void let_go(const void *data, size_t bytes) {
#ifdef MADV_PAGEOUT
  uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)data, end = begin + bytes;
  begin = (begin + page - 1) / page * page, end = end / page * page;
  if (begin < end) madvise((void *)begin, end - begin, MADV_PAGEOUT);
#else
  (void)data, (void)bytes;
#endif
}

static status *packed(const entry *api, const kernel_info *info, size_t i,
                      struct packed_weight *weight) {
  int constant = 0;
  const value *given = NULL;
  shape_info *shape = NULL;
  struct tensor x;
  TRY(CONSTANT_INPUT(api)(info, i, &constant, &given));
  if (!constant) return CREATE_STATUS(api)(INVALID_ARGUMENT, "a weight is no constant");
  TRY(TENSOR_SHAPE(api)(given, &shape));
  status *failed = sizes_of(api, shape, &x);
  RELEASE_SHAPE(api)(shape);
  if (failed != NULL) return failed;
  TRY(TENSOR_DATA(api)(given, &x.data));
  if (x.rank != 2 || x.sizes[0] % 4 != 0)
    return CREATE_STATUS(api)(INVALID_ARGUMENT, "a weight is no [4n, outputs]");
  if (pack_weight(x.data, (size_t)x.sizes[0], (size_t)x.sizes[1], weight) != 0)
    return CREATE_STATUS(api)(FAILED, "no memory for a weight");
  let_go(x.data, elements(&x));
  return NULL;
}

static void destroy(void *kernel) {
  struct product_kernel *self = kernel;
  for (size_t i = 0; i < 2; i++) free_weight(&self->weights[i]);
  free(self);
}

static status *made(const entry *api, const kernel_info *info, size_t count, void **kernel) {
  status *failed = NULL;
  if (!products_run_here()) return CREATE_STATUS(api)(FAILED, "the form in use has no AVX-512 VNNI");
  struct product_kernel *self = calloc(1, sizeof *self);
  if (self == NULL) return CREATE_STATUS(api)(FAILED, "no memory for a kernel");
  self->api = api;
  for (size_t i = 0; failed == NULL && i < count; i++)
    failed = packed(api, info, 2 + 2 * i, &self->weights[i]);
  if (failed != NULL)
    destroy(self);
  else
    *kernel = self;
  return failed;
}

static status *create_product(const struct custom_op *op, const entry *api,
                              const kernel_info *info, void **kernel) {
  (void)op;
  return made(api, info, 1, kernel);
}

static status *create_activated(const struct custom_op *op, const entry *api,
                                const kernel_info *info, void **kernel) {
  int64_t activation = 0;
  float alpha = 0.0f;
  TRY(INT_ATTRIBUTE(api)(info, "activation", &activation));
  TRY(FLOAT_ATTRIBUTE(api)(info, "alpha", &alpha));
  if (activation < NO_ACTIVATION || activation > QUICK_GELU)
    return CREATE_STATUS(api)(INVALID_ARGUMENT, "there is no such activation");
  TRY(create_product(op, api, info, kernel));
  struct product_kernel *self = *kernel;
  self->activation = activation, self->alpha = alpha;
  return NULL;
}

static status *create_gated(const struct custom_op *op, const entry *api, const kernel_info *info,
                            void **kernel) {
  (void)op;
  return made(api, info, 2, kernel);
}

/* -- running -- */

/* Codes and steps of rows, as inputs of a product. */
static status *rows_of(const struct product_kernel *self, kernel_context *context,
                       struct tensor *codes, struct product *call) {
  const entry *api = self->api;
  struct tensor steps;
  TRY(input(api, context, 0, codes));
  TRY(input(api, context, 1, &steps));
  size_t inputs = self->weights[0].inputs;
  *call = (struct product){.weight = &self->weights[0], .codes = codes->data, .steps = steps.data,
                           .count = elements(&steps)};
  int fits = (size_t)codes->sizes[codes->rank - 1] == inputs &&
             call->count * inputs == elements(codes);
  return fits ? NULL : CREATE_STATUS(api)(INVALID_ARGUMENT, MISFIT);
}

static status *vector(const entry *api, kernel_context *context, size_t i, size_t width,
                      const float **data) {
  struct tensor x;
  TRY(input(api, context, i, &x));
  *data = x.data;
  return elements(&x) == width ? NULL : CREATE_STATUS(api)(INVALID_ARGUMENT, MISFIT);
}

/* All panels for some rows, then for others: a panel is read anew each time, codes are not. */
static void product_part(void *job, size_t part) {
  const struct product *c = job;
  size_t panels = c->weight->panels, first = part / panels * ROWS_OF_A_PART;
  size_t last = first + ROWS_OF_A_PART;
  multiply(c, part % panels, first, last < c->count ? last : c->count);
}

static status *run_product(const struct product_kernel *self, kernel_context *context, int onto) {
  const entry *api = self->api;
  struct tensor codes, other;
  struct product call;
  TRY(rows_of(self, context, &codes, &call));
  size_t outputs = call.weight->outputs;
  TRY(vector(api, context, 3, outputs, &call.scales));
  TRY(vector(api, context, 4, outputs, &call.bias));
  if (onto) {
    TRY(input(api, context, 5, &other));
    if (elements(&other) != call.count * outputs)
      return CREATE_STATUS(api)(INVALID_ARGUMENT, MISFIT);
    call.other = other.data;
  }
  struct tensor y = codes;
  y.sizes[y.rank - 1] = (int64_t)outputs;
  TRY(output(api, context, 0, &y));
  call.y = y.data;
  size_t parts = call.weight->panels * blocks(call.count, ROWS_OF_A_PART);
  return parts > 0 ? PARALLEL_FOR(api)(context, product_part, parts, 0, &call) : NULL;
}

static status *product(void *kernel, kernel_context *context) {
  return run_product(kernel, context, 0);
}

static status *product_onto(void *kernel, kernel_context *context) {
  return run_product(kernel, context, 1);
}

/* Codes and steps of rows with the product's outputs. */
static status *rounded_outputs(const entry *api, kernel_context *context, const struct tensor *rows,
                               size_t outputs, uint8_t **codes, float **steps) {
  struct tensor y = *rows, last = *rows;
  y.sizes[y.rank - 1] = (int64_t)outputs, last.sizes[y.rank - 1] = 1;
  TRY(output(api, context, 0, &y));
  TRY(output(api, context, 1, &last));
  *codes = y.data, *steps = last.data;
  return NULL;
}

struct activated_job {
  struct product product;
  struct rows rows;
  int failed;
};

static void activated_part(void *job, size_t part) {
  struct activated_job *j = job;
  struct product p = j->product;
  struct rows r = j->rows;
  size_t first = part * ACTIVATED_ROWS, outputs = p.weight->outputs;
  p.count = p.count - first < ACTIVATED_ROWS ? p.count - first : ACTIVATED_ROWS;
  p.codes += first * p.weight->inputs, p.steps += first;
  r.codes += first * outputs, r.steps += first;
  r.x = p.y = malloc(p.count * outputs * sizeof(float));
  if (p.y != NULL) {
    for (size_t panel = 0; panel < p.weight->panels; panel++) multiply(&p, panel, 0, p.count);
    if (round_rows(&r, 0, p.count) != 0) fail(&j->failed);
  } else {
    fail(&j->failed);
  }
  free(p.y);
}

static status *activated(void *kernel, kernel_context *context) {
  const struct product_kernel *self = kernel;
  const entry *api = self->api;
  struct tensor codes;
  struct activated_job job = {.failed = 0};
  struct product *call = &job.product;
  TRY(rows_of(self, context, &codes, call));
  size_t outputs = call->weight->outputs;
  TRY(vector(api, context, 3, outputs, &call->scales));
  TRY(vector(api, context, 4, outputs, &call->bias));
  job.rows = (struct rows){.count = call->count, .width = outputs, .alpha = self->alpha,
                           .activation = (enum activation)self->activation, .smallest = SMALLEST};
  TRY(rounded_outputs(api, context, &codes, outputs, &job.rows.codes, &job.rows.steps));
  size_t parts = blocks(call->count, ACTIVATED_ROWS);
  if (parts > 0) TRY(PARALLEL_FOR(api)(context, activated_part, parts, 0, &job));
  return job.failed ? CREATE_STATUS(api)(FAILED, "no memory for rows") : NULL;
}

static void gated_part(void *job, size_t part) {
  const struct gated_product *c = job;
  size_t panels = c->up.weight->panels, first = part / panels * ROWS_OF_A_PART;
  size_t last = first + ROWS_OF_A_PART;
  multiply_gated(c, part % panels, first, last < c->up.count ? last : c->up.count);
}

static void rounded_part(void *job, size_t part) {
  const struct gated_product *c = job;
  size_t first = part * ROWS_AT_A_TIME, last = first + ROWS_AT_A_TIME;
  round_gated(c, first, last < c->up.count ? last : c->up.count);
}

static status *run_gated(const entry *api, kernel_context *context, struct gated_product *call) {
  size_t count = call->up.count, panels = call->up.weight->panels;
  if (count == 0) return NULL;
  call->values = aligned_alloc(64, count * panels * PANEL * sizeof(float));
  if (call->values == NULL) return CREATE_STATUS(api)(FAILED, "no memory for rows");
  size_t parts = panels * blocks(count, ROWS_OF_A_PART);
  status *failed = PARALLEL_FOR(api)(context, gated_part, parts, 0, call);
  if (failed == NULL)
    failed = PARALLEL_FOR(api)(context, rounded_part, blocks(count, ROWS_AT_A_TIME), 0, call);
  free(call->values);
  return failed;
}

static status *gated(void *kernel, kernel_context *context) {
  const struct product_kernel *self = kernel;
  const entry *api = self->api;
  struct tensor codes;
  struct gated_product call = {.smallest = SMALLEST};
  struct product *gate = &call.gate, *up = &call.up;
  TRY(rows_of(self, context, &codes, gate));
  *up = *gate;
  up->weight = &self->weights[1];
  size_t outputs = gate->weight->outputs;
  if (up->weight->outputs != outputs || up->weight->inputs != gate->weight->inputs)
    return CREATE_STATUS(api)(INVALID_ARGUMENT, MISFIT);
  TRY(vector(api, context, 3, outputs, &gate->scales));
  TRY(vector(api, context, 5, outputs, &up->scales));
  TRY(rounded_outputs(api, context, &codes, outputs, &call.codes, &call.rounded_steps));
  return run_gated(api, context, &call);
}

/* -- ops -- */

static status *infer_product(const struct custom_op *op, shape_context *context) {
  int64_t outputs = 0;
  (void)op;
  TRY(inferred_last(context, 2, &outputs));
  return infer_as(context, 0, 0, outputs);
}

static status *infer_rounded(const struct custom_op *op, shape_context *context) {
  TRY(infer_product(op, context));
  return infer_as(context, 0, 1, 1);
}

NAMED(product_name, "RoundedProduct")
NAMED(onto_name, "RoundedProductOnto")
NAMED(activated_name, "ActivatedProduct")
NAMED(gated_name, "GatedProduct")
NAMED(provider, "CPUExecutionProvider")
COUNT(one, 1)
COUNT(two, 2)
COUNT(five, 5)
COUNT(six, 6)
TYPES(taken, (i == 0 ? UINT8 : i == 2 ? INT8 : FLOAT32))
TYPES(taken_gated, (i == 0 ? UINT8 : i == 2 || i == 4 ? INT8 : FLOAT32))
TYPES(floats, FLOAT32)
TYPES(codes_first, (i == 0 ? UINT8 : FLOAT32))
TYPES(required, 0)
NUMBER(none, 0)
NUMBER(first_version, 1)
NUMBER(last_version, 0x7fffffff)

const struct custom_op product_ops[] = {
    OP(product_name, five, taken, one, floats, create_product, destroy, product, infer_product),
    OP(onto_name, six, taken, one, floats, create_product, destroy, product_onto, infer_product),
    OP(activated_name, five, taken, two, codes_first, create_activated, destroy, activated,
       infer_rounded),
    OP(gated_name, six, taken_gated, two, codes_first, create_gated, destroy, gated, infer_rounded),
};
const size_t product_op_count = sizeof product_ops / sizeof *product_ops;
