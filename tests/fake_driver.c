/* A stand-in for NVIDIA's driver: GPUs that are imagined, and launches that are handed to a
 * function of the test.
 *
 * An image is the CUDA source itself, as text. What a real driver refuses is refused here too, as
 * far as launcher.c relies on it: a launch without a context, more shared memory than was opted
 * into, too many threads, a kernel that is not in the image. Every call is written to a log, and
 * any function can be made to fail.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { DEVICES = 8, KERNELS = 4096, PLAIN_SHARED = 48 * 1024 };
enum {
  INVALID_VALUE = 1,
  NO_DEVICE = 100,
  INVALID_IMAGE = 200,
  INVALID_CONTEXT = 201,
  NOT_FOUND = 500,
  OUT_OF_RESOURCES = 701
};

typedef int (*Launched)(int device, const char *image, const char *kernel, const unsigned *sizes,
                        unsigned shared, void *stream, void **parameters, int early);
typedef struct { /* as cuda.h has them */
  unsigned id;
  char pad[4];
  union {
    char pad[64];
    int allowed;
  } value;
} Attribute;
typedef struct {
  unsigned sizes[6], shared;
  void *stream;
  Attribute *attributes;
  unsigned count;
} Config;
typedef struct {
  int device;
} Context;
typedef struct {
  const char *image;
  char name[128];
  int opted[DEVICES], loaded[DEVICES];
} Kernel;

static int version = 13000, count = 1, capability[DEVICES][2], active[DEVICES];
static Context contexts[DEVICES];
static __thread Context *stack[16];
static __thread int depth;
static Launched launched;
static char failing[64], text[1 << 16];
static int failure;
static size_t used;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- For the test ---- */

void fake_set(int new_version, int new_count, Launched function) {
  version = new_version, count = new_count, launched = function;
  for (int i = 0; i < DEVICES; ++i)
    contexts[i].device = i, active[i] = 0, capability[i][0] = 9, capability[i][1] = 0;
  failing[0] = 0, used = 0, text[0] = 0, depth = 0;
}
void fake_capability(int device, int major, int minor) {
  capability[device][0] = major, capability[device][1] = minor;
}
/* The device's context current in this thread; -1: none. */
void fake_current(int device) {
  depth = device >= 0;
  if (depth) stack[0] = &contexts[device], active[device] = 1;
}
int fake_depth(void) { return depth; }
void fake_fail(const char *function, int status) {
  snprintf(failing, sizeof failing, "%s", function), failure = status;
}
const char *fake_log(void) { return text; }
void fake_forget(void) { used = 0, text[0] = 0; }

static int called(const char *function, const char *what, int number) {
  pthread_mutex_lock(&lock);
  if (used + 256 < sizeof text)
    used += (size_t)snprintf(text + used, 256, "%s %s %d\n", function, what, number);
  pthread_mutex_unlock(&lock);
  return strcmp(function, failing) ? 0 : failure;
}
#define CALLED(what, number)                                                                       \
  do {                                                                                             \
    int status_ = called(__func__, what, number);                                                  \
    if (status_) return status_;                                                                   \
  } while (0)

/* ---- The driver's functions ---- */

int cuGetErrorName(int status, const char **name) {
  static const struct {
    int status;
    const char *name;
  } known[] = {{1, "CUDA_ERROR_INVALID_VALUE"},
               {2, "CUDA_ERROR_OUT_OF_MEMORY"},
               {3, "CUDA_ERROR_NOT_INITIALIZED"},
               {100, "CUDA_ERROR_NO_DEVICE"},
               {200, "CUDA_ERROR_INVALID_IMAGE"},
               {201, "CUDA_ERROR_INVALID_CONTEXT"},
               {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
               {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"},
               {500, "CUDA_ERROR_NOT_FOUND"},
               {700, "CUDA_ERROR_ILLEGAL_ADDRESS"},
               {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"},
               {719, "CUDA_ERROR_LAUNCH_FAILED"},
               {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i)
    if (known[i].status == status) return *name = known[i].name, 0;
  *name = 0;
  return INVALID_VALUE;
}
int cuGetErrorString(int status, const char **words) {
  *words = status == 1 ? "invalid argument" : 0;
  return *words ? 0 : INVALID_VALUE;
}
int cuInit(unsigned flags) {
  CALLED("", (int)flags);
  return count ? 0 : NO_DEVICE;
}
int cuDriverGetVersion(int *found) { return *found = version, 0; }
int cuDeviceGetCount(int *found) { return *found = count, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal < count ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) {
  snprintf(name, (size_t)size, "Imagined GPU");
  return device < count ? 0 : 101;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 16: *value = 132; return 0;
  case 38: *value = 50 << 20; return 0;
  case 75: *value = capability[device][0]; return 0;
  case 76: *value = capability[device][1]; return 0;
  case 97: *value = 227 * 1024; return 0;
  }
  return INVALID_VALUE;
}
int cuCtxGetDevice(int *device) {
  if (!depth) return INVALID_CONTEXT;
  *device = stack[depth - 1]->device;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
  CALLED("", device);
  active[device] = 1;
  *context = &contexts[device];
  return 0;
}
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *found) {
  *flags = 0, *found = active[device];
  return 0;
}
int cuCtxPushCurrent_v2(void *context) {
  CALLED("", ((Context *)context)->device);
  stack[depth++] = (Context *)context;
  return 0;
}
int cuCtxPopCurrent_v2(void **context) {
  if (!depth) return INVALID_CONTEXT;
  *context = stack[--depth];
  return called(__func__, "", ((Context *)*context)->device);
}
int cuLibraryLoadData(void **library, const void *image, void *options, void **values, unsigned n,
                      void *library_options, void **m, unsigned k) {
  (void)options, (void)values, (void)n, (void)library_options, (void)m, (void)k;
  CALLED("", (int)strlen((const char *)image));
  if (!strstr((const char *)image, "__global__")) return INVALID_IMAGE;
  *library = strdup((const char *)image);
  return 0;
}
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  char defined[160];
  CALLED(name, 0);
  snprintf(defined, sizeof defined, "%s(", name);
  if (!strstr((const char *)library, defined)) return NOT_FOUND;
  Kernel *made = (Kernel *)calloc(1, sizeof(Kernel));
  made->image = (const char *)library;
  snprintf(made->name, sizeof made->name, "%s", name);
  *kernel = made;
  return 0;
}
int cuKernelGetFunction(void **function, void *kernel) {
  if (!depth) return INVALID_CONTEXT;
  CALLED(((Kernel *)kernel)->name, stack[depth - 1]->device);
  *function = kernel;
  return 0;
}
int cuFuncLoad(void *function) {
  if (!depth) return INVALID_CONTEXT;
  ((Kernel *)function)->loaded[stack[depth - 1]->device] = 1;
  return 0;
}
int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  CALLED(((Kernel *)kernel)->name, value);
  if (attribute != 8 || value > 227 * 1024) return INVALID_VALUE;
  ((Kernel *)kernel)->opted[device] = value;
  return 0;
}
static int launch(Kernel *kernel, const unsigned *sizes, unsigned shared, void *stream_of,
                  void **parameters, void **extra, int early) {
  int device = stack[depth - 1]->device;
  if (!kernel->loaded[device])
    return INVALID_VALUE; /* a real driver loads it now; launcher.c has it done before */
  for (int i = 0; i < 6; ++i)
    if (!sizes[i] || (i % 3 && i < 3 && sizes[i] > 65535)) return INVALID_VALUE;
  if (sizes[3] * sizes[4] * sizes[5] > 1024 || extra) return INVALID_VALUE;
  if (shared > (kernel->opted[device] > PLAIN_SHARED ? (unsigned)kernel->opted[device]
                                                     : (unsigned)PLAIN_SHARED))
    return INVALID_VALUE;
  return launched(device, kernel->image, kernel->name, sizes, shared, stream_of, parameters, early);
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *stream_of, void **parameters, void **extra) {
  const unsigned sizes[6] = {gx, gy, gz, bx, by, bz};
  if (!depth) return INVALID_CONTEXT;
  CALLED(((Kernel *)function)->name, stack[depth - 1]->device);
  return launch((Kernel *)function, sizes, shared, stream_of, parameters, extra, 0);
}
#ifndef WITHOUT_CONFIG /* a driver of before CUDA 11.8 */
int cuLaunchKernelEx(const Config *config, void *function, void **parameters, void **extra) {
  if (!depth) return INVALID_CONTEXT;
  int device = stack[depth - 1]->device;
  CALLED(((Kernel *)function)->name, device);
  if (config->count != 1 || config->attributes->id != 6 || config->attributes->value.allowed != 1 ||
      capability[device][0] < 9)
    return INVALID_VALUE;
  return launch((Kernel *)function, config->sizes, config->shared, config->stream, parameters,
                extra, 1);
}
#endif

#ifdef __cplusplus
}
#endif
