/* The few entries of ONNX Runtime's C API that a custom op needs.
 *
 * Its packages bring no headers. The API is a table of functions to which releases only append, so
 * an entry is its number; those below are of release 1.17 and newer. onnxruntime_c_api.h states the
 * order, and asserts the numbers of the last entry of each release. Structures of ours that ONNX
 * Runtime reads say which release's they are.
 */

#ifndef EDGEVLM_ONNXRUNTIME_H
#define EDGEVLM_ONNXRUNTIME_H

#include <stddef.h>
#include <stdint.h>

#define API_VERSION 17
#define FLOAT32 1 /* ONNX's number of the type */
#define UINT8 2
#define INT8 3
#define INT32 6
#define FLOAT16 10
#define BFLOAT16 16
#define ANY_TYPE 0
#define OPTIONAL 1
#define FAILED 1
#define INVALID_ARGUMENT 2

typedef void (*entry)(void);
typedef void status, options, domain, kernel_info, kernel_context, value, shape_info, shape_context;

struct api_base {
  const entry *(*get_api)(uint32_t version);
  const char *(*version)(void);
};

#define CALL(api, number, result, ...) ((result(*)(__VA_ARGS__))(api)[number])

#define CREATE_STATUS(api) CALL(api, 0, status *, int, const char *)
#define CREATE_DOMAIN(api) CALL(api, 26, status *, const char *, domain **)
#define ADD_OP(api) CALL(api, 27, status *, domain *, const struct custom_op *)
#define ADD_DOMAIN(api) CALL(api, 28, status *, options *, domain *)
#define TENSOR_DATA(api) CALL(api, 51, status *, const value *, void **)
#define NEW_SHAPE(api) CALL(api, 57, status *, shape_info **)
#define SET_DIMENSIONS(api) CALL(api, 59, status *, shape_info *, const int64_t *, size_t)
#define ELEMENT_TYPE(api) CALL(api, 60, status *, const shape_info *, int *)
#define RANK(api) CALL(api, 61, status *, const shape_info *, size_t *)
#define DIMENSIONS(api) CALL(api, 62, status *, const shape_info *, int64_t *, size_t)
#define NAMES(api) CALL(api, 63, status *, const shape_info *, const char **, size_t)
#define TENSOR_SHAPE(api) CALL(api, 65, status *, const value *, shape_info **)
#define FLOAT_ATTRIBUTE(api) CALL(api, 85, status *, const kernel_info *, const char *, float *)
#define INT_ATTRIBUTE(api) CALL(api, 86, status *, const kernel_info *, const char *, int64_t *)
#define INPUT_COUNT(api) CALL(api, 88, status *, const kernel_context *, size_t *)
#define INPUT(api) CALL(api, 90, status *, const kernel_context *, size_t, const value **)
#define OUTPUT(api) \
  CALL(api, 91, status *, kernel_context *, size_t, const int64_t *, size_t, value **)
#define RELEASE_STATUS(api) CALL(api, 93, void, status *)
#define RELEASE_SHAPE(api) CALL(api, 99, void, shape_info *)
#define CONSTANT_INPUT(api) \
  CALL(api, 249, status *, const kernel_info *, size_t, int *, const value **)
#define INFERRED_INPUT(api) CALL(api, 268, status *, const shape_context *, size_t, shape_info **)
#define INFER_OUTPUT(api) CALL(api, 270, status *, const shape_context *, size_t, const shape_info *)
#define SET_NAMES(api) CALL(api, 271, status *, shape_info *, const char **, size_t)
#define PARALLEL_FOR(api) \
  CALL(api, 274, status *, const kernel_context *, void (*)(void *, size_t), size_t, size_t, void *)

/* What ONNX Runtime asks of an op, in its order. */
struct custom_op {
  uint32_t version;
  void *(*create)(const struct custom_op *, const entry *, const kernel_info *);
  const char *(*name)(const struct custom_op *);
  const char *(*provider)(const struct custom_op *);
  int (*input_type)(const struct custom_op *, size_t);
  size_t (*inputs)(const struct custom_op *);
  int (*output_type)(const struct custom_op *, size_t);
  size_t (*outputs)(const struct custom_op *);
  void (*compute)(void *, kernel_context *);
  void (*destroy)(void *);
  int (*input_kind)(const struct custom_op *, size_t);
  int (*output_kind)(const struct custom_op *, size_t);
  int (*input_memory)(const struct custom_op *, size_t);
  int (*least_variadic_inputs)(const struct custom_op *);
  int (*alike_variadic_inputs)(const struct custom_op *);
  int (*least_variadic_outputs)(const struct custom_op *);
  int (*alike_variadic_outputs)(const struct custom_op *);
  status *(*create_or_fail)(const struct custom_op *, const entry *, const kernel_info *, void **);
  status *(*compute_or_fail)(void *, kernel_context *);
  status *(*infer)(const struct custom_op *, shape_context *);
  int (*since)(const struct custom_op *);
  int (*until)(const struct custom_op *);
  entry newer[4]; /* of release 1.18: none is offered */
};

#endif
