/* What ops of ours need to read their inputs and make their outputs. */

#ifndef EDGEVLM_OPS_H
#define EDGEVLM_OPS_H

#include <stddef.h>
#include <stdint.h>

#include "onnxruntime.h"

#define MOST_AXES 8
#define ROWS_AT_A_TIME 16
#define SMALLEST 1e-30f
#define TRY(call)                      \
  do {                                 \
    status *failed = (call);           \
    if (failed != NULL) return failed; \
  } while (0)

struct tensor {
  void *data;
  int64_t sizes[MOST_AXES];
  size_t rank;
};

static inline size_t elements(const struct tensor *x) {
  size_t count = 1;
  for (size_t i = 0; i < x->rank; i++) count *= (size_t)x->sizes[i];
  return count;
}

static inline status *sizes_of(const entry *api, const shape_info *info, struct tensor *x) {
  TRY(RANK(api)(info, &x->rank));
  if (x->rank == 0 || x->rank > MOST_AXES) return CREATE_STATUS(api)(INVALID_ARGUMENT, "odd rank");
  return DIMENSIONS(api)(info, x->sizes, x->rank);
}

static inline status *input(const entry *api, kernel_context *context, size_t i,
                            struct tensor *x) {
  const value *tensor = NULL;
  shape_info *info = NULL;
  TRY(INPUT(api)(context, i, &tensor));
  TRY(TENSOR_SHAPE(api)(tensor, &info));
  status *failed = sizes_of(api, info, x);
  RELEASE_SHAPE(api)(info);
  return failed != NULL ? failed : TENSOR_DATA(api)(tensor, &x->data);
}

static inline status *output(const entry *api, kernel_context *context, size_t i,
                             struct tensor *x) {
  value *tensor = NULL;
  TRY(OUTPUT(api)(context, i, x->sizes, x->rank, &tensor));
  return TENSOR_DATA(api)(tensor, &x->data);
}

static inline void fail(int *failed) { __atomic_store_n(failed, 1, __ATOMIC_RELAXED); }

/* Output `index` has the shape of input `from`; `last`, unless 0, is its last size. */
status *infer_as(shape_context *context, size_t from, size_t index, int64_t last);

/* The last size of input `from`. */
status *inferred_last(shape_context *context, size_t from, int64_t *last);

extern const entry *used_api; /* of what infers shapes, which is given none */

/* Rows of `other` before they are taken again: 0 unless it has x's shape but for axes in front. */
size_t others_of(const struct tensor *x, const struct tensor *other);

/* The ops of decoder_ops.c, product_ops.c and upcast.c. */
extern const struct custom_op upcast_op;
extern const struct custom_op decoder_ops[], product_ops[];
extern const size_t decoder_op_count, product_op_count;

/* What all ops say of themselves. */
#define NAMED(function, text) \
  static const char *function(const struct custom_op *op) { return (void)op, text; }
#define COUNT(function, number) \
  static size_t function(const struct custom_op *op) { return (void)op, (size_t)number; }
#define TYPES(function, type) \
  static int function(const struct custom_op *op, size_t i) { return (void)op, (void)i, type; }
#define NUMBER(function, number) \
  static int function(const struct custom_op *op) { return (void)op, number; }

#define OP(called, in, takes, out, gives, creates, destroys, computes, infers)                     \
  {                                                                                                \
    .version = API_VERSION, .name = called, .provider = provider, .inputs = in,                   \
    .input_type = takes, .outputs = out, .output_type = gives, .destroy = destroys,               \
    .input_kind = required, .output_kind = required, .input_memory = required,                    \
    .least_variadic_inputs = none, .alike_variadic_inputs = none, .least_variadic_outputs = none, \
    .alike_variadic_outputs = none, .create_or_fail = creates, .compute_or_fail = computes,       \
    .infer = infers, .since = first_version, .until = last_version                                \
  }

#endif
