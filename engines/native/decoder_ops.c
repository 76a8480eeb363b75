/* The kernels of a decoder as ops of the domain edgevlm.native.
 *
 * CachedAttention: q, k, v, past_key, past_value, last, cos, sin -> y, key, value; num_heads,
 *   kv_num_heads, scale. key and value are past_key and past_value where those are bound as outputs
 *   too, else copies. last: int32, the position of each row's last token.
 * RmsNormAndRound: x, weight -> codes, steps; epsilon.
 * AddNormAndRound: x, scales, other, weight -> y, codes, steps; epsilon.
 * GateAndRound: gate, up, scales -> codes, steps.
 *
 * Where the processor lacks what they need, no session with them can be made.
 */

#include <stdlib.h>
#include <string.h>

#include "decoder.h"
#include "ops.h"

#define MISFIT "tensors do not go together"

struct decoder_kernel {
  const entry *api;
  int64_t heads, kv_heads;
  float scale; /* or a norm's epsilon */
};

static size_t blocks(size_t count, size_t size) { return (count + size - 1) / size; }

/* -- rows -- */

struct norm_job {
  struct normed_rows call;
  int failed;
};

static void norm_part(void *job, size_t part) {
  struct norm_job *j = job;
  size_t first = part * ROWS_AT_A_TIME, last = first + ROWS_AT_A_TIME;
  if (last > j->call.count) last = j->call.count;
  if (norm_rows(&j->call, first, last) != 0) fail(&j->failed);
}

static status *run_norm(const entry *api, kernel_context *context, struct norm_job *job) {
  size_t parts = blocks(job->call.count, ROWS_AT_A_TIME);
  if (parts > 0) TRY(PARALLEL_FOR(api)(context, norm_part, parts, 0, job));
  return job->failed ? CREATE_STATUS(api)(FAILED, "no memory for rows") : NULL;
}

/* Codes and steps of rows of x as outputs `index` and the one behind it. */
static status *rounded_outputs(const entry *api, kernel_context *context, size_t index,
                               const struct tensor *x, struct tensor *codes, struct tensor *steps) {
  *codes = *steps = *x;
  steps->sizes[x->rank - 1] = 1;
  TRY(output(api, context, index, codes));
  return output(api, context, index + 1, steps);
}

static status *norm(void *kernel, kernel_context *context) {
  const struct decoder_kernel *self = kernel;
  const entry *api = self->api;
  struct tensor x, weight, codes, steps;
  TRY(input(api, context, 0, &x));
  TRY(input(api, context, 1, &weight));
  size_t width = (size_t)x.sizes[x.rank - 1];
  if (elements(&weight) != width) return CREATE_STATUS(api)(INVALID_ARGUMENT, MISFIT);
  TRY(rounded_outputs(api, context, 0, &x, &codes, &steps));
  struct norm_job job = {.call = {.x = x.data, .weight = weight.data, .codes = codes.data,
                                  .steps = steps.data, .count = elements(&steps), .width = width,
                                  .epsilon = self->scale, .smallest = SMALLEST}};
  return run_norm(api, context, &job);
}

static status *add_norm(void *kernel, kernel_context *context) {
  const struct decoder_kernel *self = kernel;
  const entry *api = self->api;
  struct tensor x, scales, other, weight, codes, steps;
  TRY(input(api, context, 0, &x));
  TRY(input(api, context, 1, &scales));
  TRY(input(api, context, 2, &other));
  TRY(input(api, context, 3, &weight));
  size_t width = (size_t)x.sizes[x.rank - 1];
  int same = x.rank == other.rank && memcmp(x.sizes, other.sizes, x.rank * sizeof *x.sizes) == 0;
  if (!same || elements(&weight) != width || elements(&scales) * width != elements(&x))
    return CREATE_STATUS(api)(INVALID_ARGUMENT, MISFIT);
  struct tensor y = x;
  TRY(output(api, context, 0, &y));
  TRY(rounded_outputs(api, context, 1, &x, &codes, &steps));
  struct norm_job job = {.call = {x.data, scales.data, other.data, weight.data, y.data, codes.data,
                                  steps.data, elements(&steps), width, self->scale, SMALLEST}};
  return run_norm(api, context, &job);
}

struct gate_job {
  struct gated_rows call;
  int failed;
};

static void gate_part(void *job, size_t part) {
  struct gate_job *j = job;
  size_t first = part * ROWS_AT_A_TIME, last = first + ROWS_AT_A_TIME;
  if (last > j->call.count) last = j->call.count;
  if (gate_rows(&j->call, first, last) != 0) fail(&j->failed);
}

static status *gate(void *kernel, kernel_context *context) {
  const entry *api = ((const struct decoder_kernel *)kernel)->api;
  struct tensor x, up, scales, codes, steps;
  TRY(input(api, context, 0, &x));
  TRY(input(api, context, 1, &up));
  TRY(input(api, context, 2, &scales));
  size_t width = (size_t)x.sizes[x.rank - 1];
  int same = x.rank == up.rank && memcmp(x.sizes, up.sizes, x.rank * sizeof *x.sizes) == 0;
  if (!same || elements(&scales) * width != elements(&x))
    return CREATE_STATUS(api)(INVALID_ARGUMENT, MISFIT);
  TRY(rounded_outputs(api, context, 0, &x, &codes, &steps));
  struct gate_job job = {.call = {x.data, up.data, scales.data, codes.data, steps.data,
                                  elements(&steps), width, SMALLEST}};
  size_t parts = blocks(job.call.count, ROWS_AT_A_TIME);
  if (parts > 0) TRY(PARALLEL_FOR(api)(context, gate_part, parts, 0, &job));
  return job.failed ? CREATE_STATUS(api)(FAILED, "no memory for rows") : NULL;
}

/* -- attention -- */

struct attention_job {
  struct cached_attention call;
  void *memory;
  size_t blocks; /* of one head: of keys, then of queries */
  int failed;
};

static void few_part(void *job, size_t part) {
  struct attention_job *j = job;
  size_t heads = j->call.kv_heads;
  if (attend_few(&j->call, part / heads, part % heads) != 0) fail(&j->failed);
}

static void pack_part(void *job, size_t part) {
  struct attention_job *j = job;
  size_t head = part / j->blocks, heads = j->call.kv_heads;
  pack_keys(&j->call, j->memory, head / heads, head % heads, part % j->blocks * KEYS_AT_A_TIME);
}

/* The blocks with the most keys first, so that none of them is left for the end. */
static void many_part(void *job, size_t part) {
  struct attention_job *j = job;
  size_t all = j->call.batch * j->call.heads, head = part % all, heads = j->call.heads;
  size_t first = (j->blocks - 1 - part / all) * QUERIES_AT_A_TIME;
  if (attend_many(&j->call, j->memory, head / heads, head % heads, first) != 0) fail(&j->failed);
}

static status *run_attention(const entry *api, kernel_context *context,
                             struct attention_job *job) {
  struct cached_attention *c = &job->call;
  size_t longest = 0;
  for (size_t b = 0; b < c->batch; b++)
    if ((size_t)c->last[b] >= longest) longest = (size_t)c->last[b] + 1;
  if (c->batch == 0 || c->queries == 0) return NULL;
  if (c->queries <= FEW_QUERIES)
    return PARALLEL_FOR(api)(context, few_part, c->batch * c->kv_heads, 0, job);
  job->memory = reserve_keys(c);
  if (job->memory == NULL) return CREATE_STATUS(api)(FAILED, "no memory for attention");
  job->blocks = blocks(longest, KEYS_AT_A_TIME);
  size_t parts = c->batch * c->kv_heads * job->blocks;
  status *failed = PARALLEL_FOR(api)(context, pack_part, parts, 0, job);
  if (failed == NULL) {
    job->blocks = blocks(c->queries, QUERIES_AT_A_TIME);
    parts = c->batch * c->heads * job->blocks;
    failed = PARALLEL_FOR(api)(context, many_part, parts, 0, job);
  }
  free(job->memory);
  return failed;
}

/* The cache that was given, as an output. */
static status *updated(const entry *api, kernel_context *context, size_t index,
                       const struct tensor *past, float **data) {
  struct tensor present = *past;
  TRY(output(api, context, index, &present));
  if (present.data != past->data)
    memcpy(present.data, past->data, elements(past) * sizeof(float));
  *data = present.data;
  return NULL;
}

static int fits(const struct tensor *x, const struct cached_attention *c) {
  int64_t batch = (int64_t)c->batch, queries = (int64_t)c->queries, size = (int64_t)c->size;
  int64_t kv = (int64_t)c->kv_heads, context = (int64_t)c->context;
  int64_t news[] = {batch, queries, kv * size}, cache[] = {batch, kv, context, size};
  int together = x[0].sizes[2] == size * (int64_t)c->heads && size % 16 == 0 && size > 0;
  for (size_t i = 1; i < 3; i++)
    together &= x[i].rank == 3 && memcmp(x[i].sizes, news, sizeof news) == 0;
  for (size_t i = 3; i < 5; i++)
    together &= x[i].rank == 4 && memcmp(x[i].sizes, cache, sizeof cache) == 0;
  together &= elements(&x[5]) == c->batch;
  for (size_t i = 6; i < 8; i++) together &= x[i].rank == 2 && x[i].sizes[1] == size / 2;
  for (size_t b = 0; together && b < c->batch; b++) {
    int64_t count = (int64_t)c->last[b] + 1;
    together &= count >= queries && count <= context && count <= x[6].sizes[0] &&
                count <= x[7].sizes[0];
  }
  return together;
}

static status *attend(void *kernel, kernel_context *context) {
  const struct decoder_kernel *self = kernel;
  const entry *api = self->api;
  struct tensor x[8];
  for (size_t i = 0; i < 8; i++) TRY(input(api, context, i, &x[i]));
  if (x[0].rank != 3 || x[3].rank != 4) return CREATE_STATUS(api)(INVALID_ARGUMENT, MISFIT);
  struct attention_job job = {.call = {
      .q = x[0].data, .k = x[1].data, .v = x[2].data, .last = x[5].data, .cos = x[6].data,
      .sin = x[7].data, .batch = (size_t)x[0].sizes[0], .queries = (size_t)x[0].sizes[1],
      .heads = (size_t)self->heads, .kv_heads = (size_t)self->kv_heads,
      .size = (size_t)x[3].sizes[3], .context = (size_t)x[3].sizes[2], .scale = self->scale}};
  if (!fits(x, &job.call)) return CREATE_STATUS(api)(INVALID_ARGUMENT, MISFIT);
  struct tensor y = x[0];
  TRY(output(api, context, 0, &y));
  job.call.out = y.data;
  TRY(updated(api, context, 1, &x[3], &job.call.key));
  TRY(updated(api, context, 2, &x[4], &job.call.value));
  TRY(run_attention(api, context, &job));
  return job.failed ? CREATE_STATUS(api)(FAILED, "no memory for attention") : NULL;
}

/* -- kernels -- */

static status *made(const entry *api, struct decoder_kernel kernel, void **made_kernel) {
  if (!decoder_runs_here(kernel.heads > 0)) /* attention has heads */
    return CREATE_STATUS(api)(FAILED, "the form in use has no AVX-512, or none with BF16");
  struct decoder_kernel *self = malloc(sizeof *self);
  if (self == NULL) return CREATE_STATUS(api)(FAILED, "no memory for a kernel");
  *self = kernel;
  *made_kernel = self;
  return NULL;
}

static status *create_attention(const struct custom_op *op, const entry *api,
                                const kernel_info *info, void **kernel) {
  struct decoder_kernel self = {.api = api};
  (void)op;
  TRY(INT_ATTRIBUTE(api)(info, "num_heads", &self.heads));
  TRY(INT_ATTRIBUTE(api)(info, "kv_num_heads", &self.kv_heads));
  TRY(FLOAT_ATTRIBUTE(api)(info, "scale", &self.scale));
  if (self.kv_heads < 1 || self.heads < self.kv_heads || self.heads % self.kv_heads)
    return CREATE_STATUS(api)(INVALID_ARGUMENT, "num_heads is no multiple of kv_num_heads");
  return made(api, self, kernel);
}

static status *create_norm(const struct custom_op *op, const entry *api, const kernel_info *info,
                           void **kernel) {
  struct decoder_kernel self = {.api = api};
  (void)op;
  TRY(FLOAT_ATTRIBUTE(api)(info, "epsilon", &self.scale));
  return made(api, self, kernel);
}

static status *create_plain(const struct custom_op *op, const entry *api, const kernel_info *info,
                            void **kernel) {
  (void)op, (void)info;
  return made(api, (struct decoder_kernel){.api = api}, kernel);
}

/* -- ops -- */

static status *infer_rows(const struct custom_op *op, shape_context *context) {
  (void)op;
  TRY(infer_as(context, 0, 0, 0));
  return infer_as(context, 0, 1, 1);
}

static status *infer_sum(const struct custom_op *op, shape_context *context) {
  (void)op;
  TRY(infer_as(context, 0, 0, 0));
  TRY(infer_as(context, 0, 1, 0));
  return infer_as(context, 0, 2, 1);
}

static status *infer_attention(const struct custom_op *op, shape_context *context) {
  (void)op;
  TRY(infer_as(context, 0, 0, 0));
  TRY(infer_as(context, 3, 1, 0));
  return infer_as(context, 4, 2, 0);
}

#define LAST 5 /* the input of attention that is no float */

NAMED(attention_name, "CachedAttention")
NAMED(norm_name, "RmsNormAndRound")
NAMED(sum_name, "AddNormAndRound")
NAMED(gate_name, "GateAndRound")
NAMED(provider, "CPUExecutionProvider")
COUNT(two, 2)
COUNT(three, 3)
COUNT(four, 4)
COUNT(eight, 8)
TYPES(floats, FLOAT32)
TYPES(mixed, (i == LAST ? INT32 : FLOAT32))
TYPES(codes_first, (i == 0 ? UINT8 : FLOAT32))
TYPES(codes_second, (i == 1 ? UINT8 : FLOAT32))
TYPES(required, 0)
NUMBER(none, 0)
NUMBER(first_version, 1)
NUMBER(last_version, 0x7fffffff)

const struct custom_op decoder_ops[] = {
    OP(attention_name, eight, mixed, three, floats, create_attention, free, attend,
       infer_attention),
    OP(norm_name, two, floats, two, codes_first, create_norm, free, norm, infer_rows),
    OP(sum_name, four, floats, three, codes_second, create_norm, free, add_norm, infer_sum),
    OP(gate_name, three, floats, two, codes_first, create_plain, free, gate, infer_rows),
};
const size_t decoder_op_count = sizeof decoder_ops / sizeof *decoder_ops;
