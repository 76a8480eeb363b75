/* A stand-in of NVIDIA's driver for the calls that cuda-core makes for us: a card in the host's
   memory. What is put on a stream runs at once, or is recorded while the stream is captured; a
   graph repeats what was recorded. New memory holds 0xFF: no number in any float format.
   cc -shared -fPIC -w -o libcuda.so.1 driver.c -ldl */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int R;
typedef void *P;
typedef unsigned long long D;
typedef struct {
  D target, source;
  size_t bytes;
  int value;
  void (*work)(void);
} Step;
typedef struct {
  int count;
  Step steps[64];
} Graph;

static long memory, pinned, streams, graphs, launches;
static __thread P current;
static P captured;
static Graph *recorded;

/* -- for the tests -- */
void counts(long *out) {
  long now[] = {memory, pinned, streams, graphs, launches};
  memcpy(out, now, sizeof now);
}
int capturing(P stream) { return captured && stream == captured; }
static R put(P stream, Step step) {
  if (!current) return 201; /* CUDA_ERROR_INVALID_CONTEXT */
  if (capturing(stream)) {
    if (recorded->count == 64) return 2;
    recorded->steps[recorded->count++] = step;
  } else if (step.work) {
    step.work();
  } else if (step.source) {
    memcpy((P)step.target, (P)step.source, step.bytes);
  } else {
    memset((P)step.target, step.value, step.bytes);
  }
  return 0;
}
R enqueue(P stream, void (*work)(void)) { return put(stream, (Step){0, 0, 0, 0, work}); }

/* -- the device -- */
R cuInit(unsigned flags) { return 0; }
R cuDriverGetVersion(int *version) { return *version = 13050, 0; }
R cuDeviceGetCount(int *count) { return *count = 1, 0; }
R cuDeviceGet(int *device, int number) { return *device = number, number ? 101 : 0; }
R cuDeviceGetName(char *name, int size, int device) { return strncpy(name, "Stub", size), 0; }
R cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = 1ull << 33, 0; }
R cuDeviceGetUuid_v2(char *id, int device) { return memset(id, 1, 16), 0; }
R cuDeviceGetAttribute(int *value, int which, int device) {
  *value = which == 75 ? 8 : which == 76 ? 9 : which != 18; /* sm_89, not integrated */
  return 0;
}
R cuDevicePrimaryCtxRetain(P *context, int device) { return *context = (P)0x1111, 0; }
R cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
R cuCtxGetCurrent(P *context) { return *context = current, 0; }
R cuCtxSetCurrent(P context) { return current = context, 0; }
R cuCtxPushCurrent_v2(P context) { return current = context, 0; }
R cuCtxPopCurrent_v2(P *context) { return *context = current, 0; }
R cuCtxGetDevice(int *device) { return *device = 0, current ? 0 : 201; }
R cuCtxGetDevice_v2(int *device, P context) { return *device = 0, 0; }
R cuCtxGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -5, 0; }

/* -- memory -- */
R cuDeviceGetMemPool(P *pool, int device) { return *pool = (P)0x2222, 0; }
R cuDeviceGetDefaultMemPool(P *pool, int device) { return *pool = (P)0x2222, 0; }
R cuMemPoolGetAttribute(P pool, int which, D *value) { return *value = 0, 0; }
R cuMemPoolSetAttribute(P pool, int which, D *value) { return 0; }
static R allocate(P *at, size_t bytes) {
  if (!current) return 201;
  if (posix_memalign(at, 512, bytes ? bytes : 1)) return 2;
  memset(*at, 0xFF, bytes);
  return 0;
}
R cuMemAllocFromPoolAsync(P *at, size_t bytes, P pool, P stream) {
  return bytes > 1ull << 33 ? 2 : (memory++, allocate(at, bytes));
}
R cuMemFreeAsync(P at, P stream) { return free(at), memory--, 0; }
R cuMemAllocHost_v2(P *at, size_t bytes) { return pinned++, allocate(at, bytes); }
R cuMemFreeHost(P at) { return free(at), pinned--, 0; }
R cuMemcpyAsync(D target, D source, size_t bytes, P stream) {
  return put(stream, (Step){target, source, bytes, 0, 0});
}
R cuMemsetD8Async(D target, unsigned char value, size_t bytes, P stream) {
  return put(stream, (Step){target, 0, bytes, value, 0});
}
R cuPointerGetAttributes(unsigned count, int *which, P *values, D at) {
  for (unsigned i = 0; i < count; i++) *(int *)values[i] = which[i] == 2 ? 2 : 0;
  return 0;
}
R cuPointerGetAttribute(P value, int which, D at) { return *(int *)value = which == 2 ? 2 : 0, 0; }

/* -- streams and graphs -- */
R cuStreamCreateWithPriority(P *stream, unsigned flags, int priority) {
  return *stream = malloc(8), streams++, 0;
}
R cuStreamDestroy_v2(P stream) { return streams--, 0; }
R cuStreamSynchronize(P stream) { return capturing(stream) ? 900 : 0; }
R cuStreamGetCtx(P stream, P *context) { return *context = (P)0x1111, 0; }
R cuStreamGetFlags(P stream, unsigned *flags) { return *flags = 1, 0; }
R cuStreamGetPriority(P stream, int *priority) { return *priority = 0, 0; }
R cuStreamGetDevice(P stream, int *device) { return *device = 0, 0; }
R cuStreamBeginCapture_v2(P stream, int mode) {
  return captured = stream, recorded = calloc(1, sizeof(Graph)), 0;
}
R cuStreamEndCapture(P stream, P *graph) { return *graph = recorded, captured = 0, 0; }
R cuStreamIsCapturing(P stream, int *status) { return *status = capturing(stream), 0; }
R cuStreamGetCaptureInfo_v3(P stream, int *status, D *id, P *graph, P *from, P *edges, size_t *n) {
  *status = capturing(stream);
  if (id) *id = 1;
  if (graph) *graph = recorded;
  if (n) *n = 0;
  return 0;
}
R cuStreamGetCaptureInfo_v2(P stream, int *status, D *id, P *graph, P *from, size_t *n) {
  return cuStreamGetCaptureInfo_v3(stream, status, id, graph, from, 0, n);
}
R cuGraphInstantiateWithParams(P *made, P graph, P how) {
  return *made = memcpy(malloc(sizeof(Graph)), graph, sizeof(Graph)), graphs++, 0;
}
R cuGraphInstantiateWithFlags(P *made, P graph, D flags) {
  return cuGraphInstantiateWithParams(made, graph, 0);
}
R cuGraphLaunch(P made, P stream) {
  Graph *graph = made;
  launches++;
  for (int i = 0; i < graph->count; i++) put(stream, graph->steps[i]);
  return 0;
}
R cuGraphExecDestroy(P made) { return free(made), graphs--, 0; }
R cuGraphDestroy(P graph) { return free(graph), 0; }
R cuUserObjectCreate(P *made, P of, P destroy, unsigned n, unsigned flags) {
  return *made = malloc(8), 0;
}
R cuUserObjectRelease(P object, unsigned n) { return 0; }
R cuUserObjectRetain(P object, unsigned n) { return 0; }
R cuGraphRetainUserObject(P graph, P object, unsigned n, unsigned flags) { return 0; }
R cuGraphReleaseUserObject(P graph, P object, unsigned n) { return 0; }

/* -- the rest -- */
R cuGetErrorName(int error, const char **name) {
  return *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER", 0;
}
R cuGetErrorString(int error, const char **text) { return *text = "of a stand-in", 0; }
static R unsupported(void) { return 801; }
R cuGetProcAddress_v2(const char *name, P *found, int version, D flags, int *status) {
  const char *suffixes[] = {"_v3", "_v2", "", 0};
  P self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  char full[200];
  *found = 0;
  for (int i = 0; suffixes[i] && !*found; i++) {
    snprintf(full, sizeof full, "%s%s", name, suffixes[i]);
    *found = dlsym(self, full);
  }
  if (!*found) *found = (P)unsupported;
  if (status) *status = 0;
  return 0;
}
R cuGetProcAddress(const char *name, P *found, int version, D flags) {
  return cuGetProcAddress_v2(name, found, version, flags, 0);
}
