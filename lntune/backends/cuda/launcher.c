/* Launches of GPU kernels through the driver: load an image, check the arguments of a call, launch
 * on PyTorch's stream.
 *
 * Everything known before a call is packed into a table of int64 by Python (packed.py, in the order
 * of the structs below); a call reads it and changes nothing, so that any number of threads may
 * call at once. The driver is found at run time: nothing is linked. Libraries and kernels of the
 * driver (cuLibrary*, CUDA 12) belong to no context, and so serve every GPU of the process whose
 * architecture they fit. Valid as C and as C++.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#ifdef __cplusplus
extern "C" {
#endif

/* As in packed.py. */
enum { MAX_DEVICES = 64, MAX_ARGS = 32, MAX_SCRATCH = 8, MAX_LAUNCHES = 8 };
enum { MAX_PARAMS = 48, MAX_DIMS = 4, MAX_STACK = 16 };
enum { ROWS = -1, OLDEST = 12000, EARLY_FROM = 12030, SCRATCH_ALIGNMENT = 256 };
enum { GRID_X = 0x7fffffff, GRID_YZ = 65535 };

/* As cuda.h has them; of the attributes' values the one that is used. */
typedef struct {
  unsigned id; /* CUlaunchAttributeID */
  char pad[4];
  union {
    char pad[64];
    int allowed;
  } value;
} LaunchAttribute;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream;
  LaunchAttribute *attributes;
  unsigned count;
} LaunchConfig;
enum { PROGRAMMATIC_STREAM_SERIALIZATION = 6 };

typedef struct {
  void *library;
  int device_type; /* DLPack's, of the tensors that are taken */
  int version, count, device[MAX_DEVICES];
  void *context[MAX_DEVICES]; /* primary contexts, once one had to be asked for; never given back */
  pthread_mutex_t lock;
  int (*init)(unsigned), (*driver_version)(int *);
  int (*device_count)(int *), (*device_get)(int *, int);
  int (*device_name)(char *, int, int), (*device_attribute)(int *, int, int);
  int (*context_device)(int *), (*context_retain)(void **, int);
  int (*context_state)(int, unsigned *, int *);
  int (*context_push)(void *), (*context_pop)(void **);
  int (*library_load)(void **, const void *, void *, void **, unsigned, void *, void **, unsigned);
  int (*library_kernel)(void **, void *, const char *);
  int (*kernel_function)(void **, void *), (*kernel_attribute)(int, int, void *, int);
  int (*function_load)(void *); /* of CUDA 12.4; null before */
  int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                void *, void **, void **);
  /* Null where the driver is too old for a launch before the kernel before it has ended (what a
   * graph's capture makes of one is known from CUDA 12.3 on), or has refused one. */
  int (*launch_config)(const LaunchConfig *, void *, void **, void **);
  int (*error_name)(int, const char **), (*error_string)(int, const char **);
} Driver;

/* Offsets of expressions are into `codes`. */
typedef struct {
  int64_t scalar, strided, code, bits, alignment, dims;
  int64_t dim[MAX_DIMS]; /* rows (-1) or a number */
} Argument;
typedef struct {
  int64_t itemsize, elements;
} Scratch;
typedef struct {
  int64_t first, count; /* parameters */
  int64_t grid[3], block[3], shared;
  int64_t opted; /* dynamic shared memory the kernel is told to allow */
  int64_t waits; /* the kernel waits for the one before it, and may begin earlier */
} Launch;
typedef struct {
  int64_t kind, index; /* of `kind` ARGUMENT, SCRATCH or NUMBER */
} Parameter;
enum { ARGUMENT, SCRATCH, NUMBER };

typedef struct {
  Driver *driver;
  char *names; /* the title, arguments, kernels; one after the other */
  const char *title, *argument_name[MAX_ARGS], *kernel_name[MAX_LAUNCHES];
  int64_t *words, arguments, scratches, launches;
  Argument *argument;
  Scratch *scratch;
  Launch *launch;
  Parameter *parameter;
  int64_t *codes;
  /* By device and launch; null where the GPU is of another architecture. */
  void **kernel[MAX_DEVICES];
  int ready[MAX_DEVICES]; /* its functions are loaded there */
  int early[MAX_DEVICES]; /* its image there has the waits that `Launch` speaks of */
} Program;

/* This thread is in a loop whose kernels may begin early, see lntune_overlap. */
static __thread int overlapping;

static DLPackExchangeAPI *dlpack;
static void (*set_error)(const char *kind, const char *message);
static int (*make_function)(void *, TVMFFISafeCallType, void (*)(void *), TVMFFIObjectHandle *);

void lntune_launcher_init(void *exchange, void *error, void *function) {
  dlpack = (DLPackExchangeAPI *)exchange;
  set_error = (void (*)(const char *, const char *))error;
  make_function =
      (int (*)(void *, TVMFFISafeCallType, void (*)(void *), TVMFFIObjectHandle *))function;
}

static int fail(const char *kind, const char *format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  set_error(kind, text);
  return -1;
}

/* What a driver's error most likely comes from. */
static const char *likely(int status) {
  /* clang-format off */
  switch (status) {
  case 1: return "; the launch asks for what this GPU does not have";
  case 2: return "; free GPU memory";
  case 3: case 4:
    return "; a process that was forked after CUDA was used cannot use it, and none can at its end";
  case 200: case 209: case 218: case 222:
    return "; the driver is older than the compiler that made the kernel, or the GPU is not the "
           "one it was made for";
  case 701: return "; a block needs more registers or shared memory than a multiprocessor has";
  case 700: case 702: case 710: case 714: case 715: case 716: case 717: case 718: case 719:
    return "; a kernel before this one failed, and the process cannot use the GPU any more";
  case 900: case 901: case 906: case 907:
    return "; call the op once before its calls are captured in a CUDA graph";
  }
  /* clang-format on */
  return "";
}

static void describe(const Driver *d, int status, char *text, size_t size) {
  const char *name = 0, *words = 0;
  if (d->error_name) d->error_name(status, &name);
  if (d->error_string) d->error_string(status, &words);
  snprintf(text, size, "%s (error %d%s%s)%s", name ? name : "an unknown error", status,
           words ? ", " : "", words ? words : "", likely(status));
}

static int driver_fail(const Program *p, int status, int device, const char *format,
                       const char *name) {
  char what[256], why[512];
  describe(p->driver, status, why, sizeof why);
  snprintf(what, sizeof what, format, name);
  return fail("lntune.LaunchError", "%s: %s on cuda:%d failed: %s.", p->title, what, device, why);
}

/* ---- The driver ---- */

static int find(Driver *d, void *function, const char *name, char *missing, size_t size) {
  void *found = dlsym(d->library, name);
  memcpy(function, &found, sizeof found);
  if (!found && !*missing) snprintf(missing, size, "%s", name);
  return found != 0;
}

/* The driver, or null and why there is none that can be used. */
Driver *lntune_driver_open(const char *path, int device_type, char *why, int size) {
  Driver *d = (Driver *)calloc(1, sizeof(Driver));
  char missing[64] = "", newer[64] = "", text[512];
  int status;
  d->device_type = device_type;
  pthread_mutex_init(&d->lock, 0);
  d->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!d->library) {
    snprintf(why, (size_t)size, "no NVIDIA driver (%s)", dlerror());
    free(d);
    return 0;
  }
#define FIND(field, name) find(d, &d->field, name, missing, sizeof missing)
  FIND(error_name, "cuGetErrorName"), FIND(error_string, "cuGetErrorString");
  FIND(init, "cuInit"), FIND(driver_version, "cuDriverGetVersion");
  FIND(device_count, "cuDeviceGetCount"), FIND(device_get, "cuDeviceGet");
  FIND(device_name, "cuDeviceGetName"), FIND(device_attribute, "cuDeviceGetAttribute");
  FIND(context_device, "cuCtxGetDevice"), FIND(context_retain, "cuDevicePrimaryCtxRetain");
  FIND(context_state, "cuDevicePrimaryCtxGetState");
  FIND(context_push, "cuCtxPushCurrent_v2"), FIND(context_pop, "cuCtxPopCurrent_v2");
  FIND(launch, "cuLaunchKernel");
  if (*missing) {
    snprintf(why, (size_t)size, "%s is no NVIDIA driver: it has no %s", path, missing);
    goto none;
  }
  status = d->driver_version(&d->version);
  if (!status && d->version < OLDEST) {
    snprintf(why, (size_t)size,
             "the NVIDIA driver is for CUDA %d.%d, expected %d.%d or newer; update the driver",
             d->version / 1000, d->version % 1000 / 10, OLDEST / 1000, OLDEST % 1000 / 10);
    goto none;
  }
  FIND(library_load, "cuLibraryLoadData"), FIND(library_kernel, "cuLibraryGetKernel");
  FIND(kernel_function, "cuKernelGetFunction"), FIND(kernel_attribute, "cuKernelSetAttribute");
  find(d, &d->function_load, "cuFuncLoad", newer, sizeof newer);
  find(d, &d->launch_config, "cuLaunchKernelEx", newer, sizeof newer);
  if (d->version < EARLY_FROM) d->launch_config = 0;
#undef FIND
  if (*missing) {
    snprintf(why, (size_t)size, "the NVIDIA driver lacks %s; update it", missing);
    goto none;
  }
  if (!status) status = d->init(0);
  if (!status) status = d->device_count(&d->count);
  if (status) {
    describe(d, status, text, sizeof text);
    snprintf(why, (size_t)size, "the NVIDIA driver does not start: %s", text);
    goto none;
  }
  if (d->count > MAX_DEVICES) d->count = MAX_DEVICES;
  for (int i = 0; i < d->count && !status; ++i) status = d->device_get(&d->device[i], i);
  if (!d->count || status) {
    snprintf(why, (size_t)size, "the NVIDIA driver sees no GPU");
    goto none;
  }
  return d;
none:
  dlclose(d->library);
  free(d);
  return 0;
}

int lntune_driver_version(const Driver *d) { return d->version; }
int lntune_driver_count(const Driver *d) { return d->count; }

/* One of CUdevice_attribute; -1 where the driver does not know it. */
int lntune_device_attribute(const Driver *d, int ordinal, int attribute) {
  int value;
  return d->device_attribute(&value, attribute, d->device[ordinal]) ? -1 : value;
}

int lntune_device_name(const Driver *d, int ordinal, char *name, int size) {
  return d->device_name(name, size, d->device[ordinal]);
}

/* Make a GPU's primary context current if another is, or none; `pushed` says whether `leave` must
 * undo it. */
static int enter(Driver *d, int device, int *pushed) {
  int current, status = 0;
  *pushed = 0;
  if (!d->context_device(&current) && current == d->device[device]) return 0;
  void *context = __atomic_load_n(&d->context[device], __ATOMIC_ACQUIRE);
  if (!context) {
    pthread_mutex_lock(&d->lock);
    context = d->context[device];
    if (!context && !(status = d->context_retain(&context, d->device[device])))
      __atomic_store_n(&d->context[device], context, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&d->lock);
  }
  if (!status) status = d->context_push(context);
  *pushed = !status;
  return status;
}

static void leave(Driver *d, int pushed) {
  void *popped;
  if (pushed) d->context_pop(&popped);
}

/* ---- Programs ---- */

/* Load a program's functions on a GPU whose context is current, before a first launch would, which
 * a graph's capture may not survive. */
static int prepare(Program *p, int device, const char **at) {
  Driver *d = p->driver;
  int status = 0;
  pthread_mutex_lock(&d->lock);
  for (int i = 0; i < p->launches && !status && !p->ready[device]; ++i) {
    void *function;
    *at = p->kernel_name[i];
    status = d->kernel_function(&function, p->kernel[device][i]);
    if (!status && d->function_load) status = d->function_load(function);
    if (!status && p->launch[i].opted)
      status =
          d->kernel_attribute(8, (int)p->launch[i].opted, p->kernel[device][i], d->device[device]);
  }
  if (!status) __atomic_store_n(&p->ready[device], 1, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&d->lock);
  return status;
}

/* A program from its table (see packed.py), its names, and its images; `image_of` has for each GPU
 * the number of its image, or -1, and `early` whether that image is of an architecture on which
 * kernels wait for those before them. Where a GPU is in use already its functions are loaded at
 * once. Null, and why, if something fails. */
Program *lntune_program(Driver *d, const int64_t *words, int64_t count, const char *names,
                        int64_t bytes, const void *const *images, int n_images, const int *image_of,
                        const int *early, char *why, int size) {
  Program *p = (Program *)calloc(1, sizeof(Program));
  void **kernels = (void **)calloc((size_t)n_images * MAX_LAUNCHES, sizeof(void *)), *library;
  char text[512];
  int status = 0;
  p->driver = d;
  p->words = (int64_t *)malloc((size_t)count * sizeof(int64_t));
  p->names = (char *)malloc((size_t)bytes);
  memcpy(p->words, words, (size_t)count * sizeof(int64_t));
  memcpy(p->names, names, (size_t)bytes);
  p->arguments = words[0], p->scratches = words[1], p->launches = words[2];
  p->argument = (Argument *)(p->words + 4);
  p->scratch = (Scratch *)(p->argument + p->arguments);
  p->launch = (Launch *)(p->scratch + p->scratches);
  p->parameter = (Parameter *)(p->launch + p->launches);
  p->codes = (int64_t *)(p->parameter + words[3]);
  const char *name = p->names;
#define NEXT(to) (to) = name, name += strlen(name) + 1
  NEXT(p->title);
  for (int i = 0; i < p->arguments; ++i) NEXT(p->argument_name[i]);
  for (int i = 0; i < p->launches; ++i) NEXT(p->kernel_name[i]);
#undef NEXT
  name = "the image";
  for (int n = 0; n < n_images && !status; ++n) {
    name = "the image";
    status = d->library_load(&library, images[n], 0, 0, 0, 0, 0, 0);
    for (int i = 0; i < p->launches && !status; ++i) {
      name = p->kernel_name[i];
      status = d->library_kernel(&kernels[n * MAX_LAUNCHES + i], library, name);
    }
  }
  for (int i = 0; i < d->count && !status; ++i) {
    unsigned flags;
    int active = 0, pushed;
    if (image_of[i] < 0) continue;
    p->kernel[i] = kernels + image_of[i] * MAX_LAUNCHES;
    p->early[i] = early[i];
    if (d->context_state(d->device[i], &flags, &active) || !active) continue;
    if (!enter(d, i, &pushed))
      prepare(p, i, &name); /* what fails here fails again, and is told, in the first call */
    leave(d, pushed);
  }
  if (!status) return p;
  describe(d, status, text, sizeof text);
  snprintf(why, (size_t)size, "the driver cannot load %s: %s", name, text);
  free(p->words), free(p->names), free(kernels), free(p);
  return 0;
}

/* The value of an expression in rows and arguments' row strides: a count of words, then codes in
 * postfix order. Non-zero where it does not fit 64 bits. */
enum { CONSTANT, ROWS_HERE, ADD, SUBTRACT, MULTIPLY, FLOOR_DIVIDE, MODULO, STRIDE };
static int number(const int64_t *code, int64_t rows, const int64_t *strides, int64_t *value) {
  int64_t stack[MAX_STACK], top = -1;
  for (const int64_t *end = code + 1 + code[0], *at = code + 1; at < end;) {
    int64_t operation = *at++, a, b, quotient, rest;
    if (operation == CONSTANT || operation == ROWS_HERE || operation == STRIDE) {
      stack[++top] = operation == CONSTANT ? *at++ : operation == STRIDE ? strides[*at++] : rows;
      continue;
    }
    b = stack[top--], a = stack[top];
    switch (operation) {
    case ADD:
      if (__builtin_add_overflow(a, b, &stack[top])) return 1;
      break;
    case SUBTRACT:
      if (__builtin_sub_overflow(a, b, &stack[top])) return 1;
      break;
    case MULTIPLY:
      if (__builtin_mul_overflow(a, b, &stack[top])) return 1;
      break;
    default:
      if (!b || (b == -1 && a == INT64_MIN)) return 1;
      quotient = a / b, rest = a % b;
      if (rest && (rest < 0) != (b < 0)) quotient -= 1, rest += b;
      stack[top] = operation == FLOOR_DIVIDE ? quotient : rest;
    }
  }
  *value = stack[0];
  return 0;
}

/* ---- Calls ---- */

typedef union {
  float f32;
  double f64;
  int32_t i32;
  int64_t i64;
  void *pointer;
} Value;

static const char *dtype_name(int code, int bits, int lanes, char *text, size_t size) {
  const char *kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  if (code >= 0 && code < 7 && lanes == 1)
    snprintf(text, size, code == kDLBool ? "%s" : "%s%d", kinds[code], bits);
  else snprintf(text, size, "dtype (%d, %d, %d)", code, bits, lanes);
  return text;
}

static const char *device_name(DLDevice device, char *text, size_t size) {
  if (device.device_type == kDLCPU) snprintf(text, size, "cpu");
  else if (device.device_type == kDLCUDA) snprintf(text, size, "cuda:%d", device.device_id);
  else snprintf(text, size, "device (%d, %d)", (int)device.device_type, device.device_id);
  return text;
}

static const char *kind_name(int32_t type) {
  return type == kTVMFFINone                                   ? "None"
         : type == kTVMFFIInt || type == kTVMFFIFloat          ? "a number"
         : type == kTVMFFIBool                                 ? "a bool"
         : type == kTVMFFIDLTensorPtr || type == kTVMFFITensor ? "a tensor"
                                                               : "something else";
}

static const char *list_dims(const int64_t *dim, int64_t count, char *text, size_t size) {
  size_t used = (size_t)snprintf(text, size, "(");
  for (int64_t i = 0; i < count && used < size; ++i) {
    if (dim[i] == ROWS) used += (size_t)snprintf(text + used, size - used, "rows");
    else used += (size_t)snprintf(text + used, size - used, "%lld", (long long)dim[i]);
    if (used < size)
      used += (size_t)snprintf(text + used, size - used,
                               i + 1 < count ? ", "
                               : count == 1  ? ","
                                             : "");
  }
  if (used < size) snprintf(text + used, size - used, ")");
  return text;
}

#define REFUSE(kind, ...) return fail(kind, __VA_ARGS__)
#define INPUT "lntune.InputError"

static int read_scalar(const Program *p, int i, const TVMFFIAny *given, Value *value) {
  const Argument *a = &p->argument[i];
  int whole = given->type_index == kTVMFFIInt || given->type_index == kTVMFFIBool;
  if (!whole && (given->type_index != kTVMFFIFloat || a->code != kDLFloat))
    REFUSE(INPUT, "%s, argument %s: got %s, expected a %snumber.", p->title, p->argument_name[i],
           kind_name(given->type_index), a->code == kDLFloat ? "" : "whole ");
  double real = whole ? (double)given->v_int64 : given->v_float64;
  if (a->code == kDLFloat && a->bits == 32) value->f32 = (float)real;
  else if (a->code == kDLFloat) value->f64 = real;
  else if (a->bits == 32) value->i32 = (int32_t)given->v_int64;
  else value->i64 = given->v_int64;
  return 0;
}

/* Check a tensor; the first decides the number of rows and the device, `rows_by` says which told
 * the rows. `stride` is that of its rows. */
static int read_tensor(const Program *p, int i, const TVMFFIAny *given, Value *value,
                       int64_t *stride, int64_t *rows, int *rows_by, int *device) {
  const Argument *a = &p->argument[i];
  const char *name = p->argument_name[i];
  const DLTensor *t = 0;
  char got[160], wanted[160];
  if (given->type_index == kTVMFFIDLTensorPtr) t = (const DLTensor *)given->v_ptr;
  else if (given->type_index == kTVMFFITensor)
    t = (const DLTensor *)((const char *)given->v_obj + sizeof(TVMFFIObject));
  else
    REFUSE(INPUT, "%s, argument %s: got %s, expected a tensor.", p->title, name,
           kind_name(given->type_index));
  if (t->dtype.code != a->code || t->dtype.bits != a->bits || t->dtype.lanes != 1)
    REFUSE(INPUT, "%s, argument %s: got %s, expected %s.", p->title, name,
           dtype_name(t->dtype.code, t->dtype.bits, t->dtype.lanes, got, sizeof got),
           dtype_name((int)a->code, (int)a->bits, 1, wanted, sizeof wanted));
  int fits = t->ndim == a->dims;
  for (int d = 0; fits && d < t->ndim; ++d) {
    if (a->dim[d] == ROWS && *rows < 0) *rows = t->shape[d], *rows_by = i;
    if (a->dim[d] == ROWS && t->shape[d] != *rows)
      REFUSE(INPUT, "%s, argument %s: got %lld rows, expected %lld as %s has.", p->title, name,
             (long long)t->shape[d], (long long)*rows, p->argument_name[*rows_by]);
    fits = a->dim[d] == ROWS || t->shape[d] == a->dim[d];
  }
  if (!fits)
    REFUSE(INPUT, "%s, argument %s: got shape %s, expected %s.", p->title, name,
           list_dims(t->shape, t->ndim, got, sizeof got),
           list_dims(a->dim, a->dims, wanted, sizeof wanted));
  uint64_t step = 1; /* unsigned: what does not fit wraps, and is no tensor there can be */
  int empty = 0;
  for (int d = 0; d < t->ndim; ++d) empty |= !t->shape[d];
  *stride = 0;
  for (int d = t->ndim - 1; d >= 0; step *= (uint64_t)t->shape[d--]) {
    int given_here = t->strides && !empty && t->shape[d] != 1, free = a->strided && !d;
    if (!d) *stride = given_here ? t->strides[0] : (int64_t)step;
    if (given_here && (free ? t->strides[0] < 0 : (uint64_t)t->strides[d] != step))
      REFUSE(INPUT, "%s, argument %s: got strides %s, expected a contiguous tensor%s.", p->title,
             name, list_dims(t->strides, t->ndim, got, sizeof got),
             a->strided ? ", but for gaps between its rows" : "");
  }
  DLDevice expected = {(DLDeviceType)p->driver->device_type,
                       *device < 0 ? t->device.device_id : *device};
  if (t->device.device_type != expected.device_type || t->device.device_id != expected.device_id)
    REFUSE(INPUT, "%s, argument %s: got a tensor on %s, expected %s.", p->title, name,
           device_name(t->device, got, sizeof got),
           *device < 0 ? "one on a GPU" : device_name(expected, wanted, sizeof wanted));
  *device = expected.device_id;
  value->pointer = (char *)t->data + t->byte_offset;
  if (!empty && (uintptr_t)value->pointer % (uintptr_t)a->alignment)
    REFUSE(INPUT, "%s, argument %s: got memory at a multiple of %d bytes, expected one of %d.",
           p->title, name, (int)((uintptr_t)value->pointer & -(uintptr_t)value->pointer),
           (int)a->alignment);
  uint64_t apart = (uint64_t)*stride * (uint64_t)(a->bits / 8);
  if (!empty && a->strided && *rows > 1 && apart % (uint64_t)a->alignment)
    REFUSE(INPUT, "%s, argument %s: got rows %llu bytes apart, expected a multiple of %d.",
           p->title, name, (unsigned long long)apart, (int)a->alignment);
  return 0;
}

typedef struct {
  const Program *program;
  int said;
} Trouble;

static void no_memory(void *context, const char *kind, const char *message) {
  Trouble *trouble = (Trouble *)context;
  (void)kind;
  trouble->said = 1;
  fail("lntune.LaunchError", "%s: no memory for the kernels' scratch: %s", trouble->program->title,
       message);
}

/* All scratch as one tensor of PyTorch's: what is released here is reused in the order of the
 * stream, and in a graph's own pool. */
static int allocate(const Program *p, int device, int64_t rows, const int64_t *strides,
                    Value *values, DLManagedTensorVersioned **owner) {
  int64_t offset[MAX_SCRATCH], total = 0, size, most = INT64_MAX / 2 / MAX_SCRATCH;
  Trouble trouble = {p, 0};
  for (int i = 0; i < p->scratches; ++i) {
    if (number(p->codes + p->scratch[i].elements, rows, strides, &size) || size < 0 ||
        __builtin_mul_overflow(size, p->scratch[i].itemsize, &size) || size > most)
      REFUSE(INPUT,
             "%s: got %lld rows, expected fewer: the kernels' scratch memory would be too large.",
             p->title, (long long)rows);
    offset[i] = total;
    total += (size + SCRATCH_ALIGNMENT - 1) / SCRATCH_ALIGNMENT * SCRATCH_ALIGNMENT;
  }
  if (!total) return 0;
  int64_t step = 1;
  DLDevice place = {(DLDeviceType)p->driver->device_type, device};
  DLDataType byte = {kDLUInt, 8, 1};
  DLTensor prototype = {0, place, 1, byte, &total, &step, 0};
  if (dlpack->managed_tensor_allocator(&prototype, owner, &trouble, no_memory))
    return trouble.said
               ? -1
               : fail("lntune.LaunchError", "%s: no memory for the kernels' scratch.", p->title);
  char *base = (char *)(*owner)->dl_tensor.data + (*owner)->dl_tensor.byte_offset;
  for (int i = 0; i < p->scratches; ++i) values[i].pointer = base + offset[i];
  return 0;
}

/* Whether kernels of this thread that wait for the one before them on their stream may be launched
 * before that has ended, from now on; the answer is what it was before, and stays so with a number
 * below 0. Whoever says so promises that what they read before they wait is written by nobody since
 * an ordinary launch on that stream. */
int lntune_overlap(int allowed) {
  int before = overlapping;
  if (allowed >= 0) overlapping = allowed;
  return before;
}

/* What a driver says to a launch that it does not know, or not while a graph is captured. */
static int refuses(int status) { return status == 1 || status == 801 || status / 100 == 9; }

static int launch(Driver *d, void *kernel, const int64_t *grid, const Launch *l, int early,
                  void *stream, void **parameters) {
  int (*with_config)(const LaunchConfig *, void *, void **, void **) =
      early ? __atomic_load_n(&d->launch_config, __ATOMIC_RELAXED) : 0;
  if (with_config) {
    LaunchAttribute attribute = {PROGRAMMATIC_STREAM_SERIALIZATION, {0}, {{0}}};
    LaunchConfig config = {{(unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2]},
                           {(unsigned)l->block[0], (unsigned)l->block[1], (unsigned)l->block[2]},
                           (unsigned)l->shared,
                           stream,
                           &attribute,
                           1};
    attribute.value.allowed = 1;
    int status = with_config(&config, kernel, parameters, 0);
    if (!refuses(status)) return status;
  }
  int status = d->launch(kernel, (unsigned)grid[0], (unsigned)grid[1], (unsigned)grid[2],
                         (unsigned)l->block[0], (unsigned)l->block[1], (unsigned)l->block[2],
                         (unsigned)l->shared, stream, parameters, 0);
  /* it was the attribute that the driver does not take, here or at all */
  if (with_config && !status) __atomic_store_n(&d->launch_config, 0, __ATOMIC_RELAXED);
  return status;
}

static int call(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  Program *p = (Program *)self;
  Driver *d = p->driver;
  Value values[MAX_ARGS], scratch[MAX_SCRATCH];
  int64_t grid[MAX_LAUNCHES][3], rows = -1, numbers[MAX_PARAMS], strides[MAX_ARGS];
  int device = -1, rows_by = 0, some = 0, pushed, status, failed = 0;
  if (count != p->arguments)
    REFUSE(INPUT, "%s: got %d arguments, expected %d.", p->title, (int)count, (int)p->arguments);
  for (int i = 0; i < count; ++i)
    if (p->argument[i].scalar
            ? read_scalar(p, i, &args[i], &values[i])
            : read_tensor(p, i, &args[i], &values[i], &strides[i], &rows, &rows_by, &device))
      return -1;
  for (int i = 0; i < p->launches; ++i) {
    int64_t *g = grid[i];
    for (int axis = 0; axis < 3; ++axis)
      if (number(p->codes + p->launch[i].grid[axis], rows, strides, &g[axis]) || g[axis] < 0 ||
          g[axis] > (axis ? GRID_YZ : GRID_X))
        REFUSE(INPUT,
               "%s: got %lld rows, expected fewer: a launch has at most %d blocks on axis %c.",
               p->title, (long long)rows, axis ? GRID_YZ : GRID_X, "xyz"[axis]);
    some |= g[0] && g[1] && g[2];
  }
  result->type_index = kTVMFFINone;
  result->v_int64 = 0;
  if (!some) return 0;
  if (device < 0 || device >= d->count || !p->kernel[device])
    REFUSE(
        INPUT,
        "%s: got tensors on cuda:%d, expected a GPU of the architecture the kernel was built for.",
        p->title, device);
  status = enter(d, device, &pushed);
  if (status) return driver_fail(p, status, device, "%s", "making the GPU current");
  const char *at = "";
  DLManagedTensorVersioned *owner = 0;
  void *stream = 0;
  if (!__atomic_load_n(&p->ready[device], __ATOMIC_ACQUIRE) && (status = prepare(p, device, &at)))
    failed = driver_fail(p, status, device, "loading %s", at);
  if (!failed && dlpack->current_work_stream((DLDeviceType)d->device_type, device, &stream))
    failed = fail("lntune.LaunchError", "%s: PyTorch does not tell its stream on cuda:%d.",
                  p->title, device);
  if (!failed) failed = allocate(p, device, rows, strides, scratch, &owner);
  for (int i = 0; i < p->launches && !failed; ++i) {
    const Launch *l = &p->launch[i];
    void *parameters[MAX_PARAMS];
    if (!grid[i][0] || !grid[i][1] || !grid[i][2]) continue;
    for (int j = 0; j < l->count && !failed; ++j) {
      const Parameter *one = &p->parameter[l->first + j];
      parameters[j] = one->kind == ARGUMENT  ? (void *)&values[one->index]
                      : one->kind == SCRATCH ? (void *)&scratch[one->index]
                                             : (void *)&numbers[j];
      if (one->kind == NUMBER && number(p->codes + one->index, rows, strides, &numbers[j]))
        failed = fail(INPUT, "%s: got %lld rows, expected fewer: a size does not fit 64 bits.",
                      p->title, (long long)rows);
    }
    if (failed) break;
    /* behind the first kernel of a program stands one of its own */
    int early = !i && l->waits && overlapping && p->early[device];
    status = launch(d, p->kernel[device][i], grid[i], l, early, stream, parameters);
    if (status) failed = driver_fail(p, status, device, "the launch of %s", p->kernel_name[i]);
  }
  if (owner && owner->deleter) owner->deleter(owner);
  leave(d, pushed);
  return failed;
}

/* wrap(program) -> the program as a function of tvm_ffi's; found by its name when this library is
 * loaded as a module. */
__attribute__((visibility("default"))) int __tvm_ffi_wrap(void *self, const TVMFFIAny *args,
                                                          int32_t count, TVMFFIAny *result) {
  TVMFFIObjectHandle made = 0;
  (void)self;
  if (count != 1 || args[0].type_index != kTVMFFIInt ||
      make_function((void *)(intptr_t)args[0].v_int64, call, 0, &made))
    return fail("RuntimeError", "no program");
  result->type_index = kTVMFFIFunction;
  result->zero_padding = 0;
  result->v_obj = (TVMFFIObject *)made;
  return 0;
}

#ifdef __cplusplus
}
#endif
