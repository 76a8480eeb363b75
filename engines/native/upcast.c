/* UpcastMatMul: x, w [, bias [, other]] -> y; transposed, alpha, joined: see halves.h. A product with
 * weights in 16 bits, fp16 or bf16, that are read where the file of weights is mapped: nothing is
 * copied when it is opened.
 */

#include <stdlib.h>

#include "halves.h"
#include "ops.h"

struct kernel {
  const entry *api;
  int64_t transposed, joined;
  float alpha;
};

struct job {
  struct halves call;
  enum halves_form form;
  int failed;
};

static void part_of(void *job, size_t part) {
  struct job *j = job;
  if (halves_part(&j->call, j->form, part) != 0) fail(&j->failed);
}

/* How the weights are stored: an element type of ONNX. */
static status *kind_of(const entry *api, kernel_context *context, int *kind) {
  const value *tensor = NULL;
  shape_info *info = NULL;
  TRY(INPUT(api)(context, 1, &tensor));
  TRY(TENSOR_SHAPE(api)(tensor, &info));
  status *failed = ELEMENT_TYPE(api)(info, kind);
  RELEASE_SHAPE(api)(info);
  return failed;
}

/* The data of an input that may not be there, NULL then, and its shape. */
static status *added(const entry *api, kernel_context *context, size_t i, struct tensor *x) {
  size_t inputs = 0;
  const value *tensor = NULL;
  x->data = NULL;
  TRY(INPUT_COUNT(api)(context, &inputs));
  if (i < inputs) TRY(INPUT(api)(context, i, &tensor));
  return tensor == NULL ? NULL : input(api, context, i, x);
}

/* The product without what is added; INVALID_ARGUMENT where shapes do not go together. */
static status *product(const struct kernel *self, kernel_context *context, struct halves *call,
                       struct tensor *y) {
  const entry *api = self->api;
  struct tensor w;
  int kind = 0;
  TRY(input(api, context, 0, y));
  TRY(input(api, context, 1, &w));
  TRY(kind_of(api, context, &kind));
  call->transposed = self->transposed != 0;
  int fits = w.rank == 2 && (kind == FLOAT16 || kind == BFLOAT16) && elements(&w) > 0 &&
             y->sizes[y->rank - 1] == w.sizes[call->transposed ? 1 : 0];
  if (!fits) return CREATE_STATUS(api)(INVALID_ARGUMENT, "rows and weights do not go together");
  call->kind = kind == FLOAT16 ? HALF_FP16 : HALF_BF16;
  call->inputs = (size_t)y->sizes[y->rank - 1];
  call->outputs = (size_t)w.sizes[call->transposed ? 0 : 1];
  call->rows = elements(y) / call->inputs;
  call->x = y->data, call->w = w.data;
  y->sizes[y->rank - 1] = (int64_t)call->outputs;
  return NULL;
}

static status *multiply(void *kernel, kernel_context *context) {
  const struct kernel *self = kernel;
  const entry *api = self->api;
  struct job job = {.call = {.alpha = self->alpha}, .form = halves_form_in_use()};
  struct halves *call = &job.call;
  struct tensor y, bias, other;
  TRY(product(self, context, call, &y));
  TRY(added(api, context, 2, &bias));
  TRY(added(api, context, 3, &other));
  call->bias = bias.data, call->other = other.data;
  if (other.data != NULL) call->joined = (enum joined)self->joined, call->others = others_of(&y, &other);
  if ((bias.data != NULL && elements(&bias) != call->outputs) ||
      (call->joined && call->others == 0 && call->rows > 0))
    return CREATE_STATUS(api)(INVALID_ARGUMENT, "rows and what is added do not go together");
  TRY(output(api, context, 0, &y));
  call->y = y.data;
  size_t parts = halves_parts(call);
  if (parts > 0) TRY(PARALLEL_FOR(api)(context, part_of, parts, 0, &job));
  return job.failed ? CREATE_STATUS(api)(FAILED, "no memory for weights") : NULL;
}

static status *create(const struct custom_op *op, const entry *api, const kernel_info *info,
                      void **kernel) {
  int64_t transposed = 0, joined = 0;
  float alpha = 0.0f;
  (void)op;
  TRY(INT_ATTRIBUTE(api)(info, "transposed", &transposed));
  TRY(INT_ATTRIBUTE(api)(info, "joined", &joined));
  TRY(FLOAT_ATTRIBUTE(api)(info, "alpha", &alpha));
  if (joined < JOINED_NOTHING || joined > JOINED_PRODUCT)
    return CREATE_STATUS(api)(INVALID_ARGUMENT, "there is no such way to join");
  struct kernel *self = malloc(sizeof *self);
  if (self == NULL) return CREATE_STATUS(api)(FAILED, "no memory for a kernel");
  *self = (struct kernel){api, transposed, joined, alpha};
  *kernel = self;
  return NULL;
}

static status *sizes_before(shape_context *context, size_t i, struct tensor *x) {
  shape_info *info = NULL;
  TRY(INFERRED_INPUT(used_api)(context, i, &info));
  return sizes_of(used_api, info, x);
}

/* The weights have inputs times outputs elements, whichever comes first. */
static status *infer_product(const struct custom_op *op, shape_context *context) {
  struct tensor x, w;
  (void)op;
  status *odd = sizes_before(context, 0, &x);
  if (odd == NULL) odd = sizes_before(context, 1, &w);
  if (odd != NULL) { /* nothing is known then */
    RELEASE_STATUS(used_api)(odd);
    return NULL;
  }
  int64_t inputs = x.sizes[x.rank - 1];
  if (w.rank != 2 || inputs <= 0 || w.sizes[0] <= 0 || w.sizes[1] <= 0) return NULL;
  return infer_as(context, 0, 0, w.sizes[0] * w.sizes[1] / inputs);
}

static const char *name(const struct custom_op *op) { return (void)op, "UpcastMatMul"; }
static const char *provider(const struct custom_op *op) { return (void)op, "CPUExecutionProvider"; }
static int taken(const struct custom_op *op, size_t i) { return (void)op, i == 1 ? ANY_TYPE : FLOAT32; }
static int given(const struct custom_op *op, size_t i) { return (void)op, (void)i, FLOAT32; }
static size_t four(const struct custom_op *op) { return (void)op, (size_t)4; }
static size_t one(const struct custom_op *op) { return (void)op, (size_t)1; }
static int kind(const struct custom_op *op, size_t i) { return (void)op, i > 1 ? OPTIONAL : 0; }
static int required(const struct custom_op *op, size_t i) { return (void)op, (void)i, 0; }
static int none(const struct custom_op *op) { return (void)op, 0; }
static int first_version(const struct custom_op *op) { return (void)op, 1; }
static int last_version(const struct custom_op *op) { return (void)op, 0x7fffffff; }

const struct custom_op upcast_op = {
    .version = API_VERSION, .name = name, .provider = provider, .input_type = taken,
    .inputs = four, .output_type = given, .outputs = one, .destroy = free, .input_kind = kind,
    .output_kind = required, .input_memory = required, .least_variadic_inputs = none,
    .alike_variadic_inputs = none, .least_variadic_outputs = none,
    .alike_variadic_outputs = none, .create_or_fail = create, .compute_or_fail = multiply,
    .infer = infer_product, .since = first_version, .until = last_version};

/* -- for tests -- */

/* sizes: rows, inputs, outputs, others, kind, joined, transposed. */
__attribute__((visibility("default"))) int edgevlm_upcast(const float *x, const uint16_t *w,
                                                          const float *bias, const float *other,
                                                          float *y, const size_t *sizes,
                                                          float alpha, int form) {
  struct halves call = {x, bias, other, w, y, sizes[0], sizes[1], sizes[2], sizes[3],
                        (enum half)sizes[4], (enum joined)sizes[5], alpha, (int)sizes[6]};
  size_t parts = halves_parts(&call);
  for (size_t part = 0; part < parts; part++)
    if (halves_part(&call, (enum halves_form)form, part) != 0) return -1;
  return (int)halves_form_in_use();
}
