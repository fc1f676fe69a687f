/* From a Python call to a kernel in one step: look up, allocate, call, return the outputs.
 *
 * What eager mode needs for one row is 2 to 3 us, all of it overhead; a wrapper written in Python
 * has spent that before the kernel starts. A table here knows, for what a call looks like from
 * outside (dtypes, which tensors are there, hidden size, bit length of the number of rows), which
 * kernel serves it; rows of several dimensions are to the kernel rows of one. A call that it does
 * not know, or that anything is unusual about, is answered with None and nothing done: the general
 * path in Python then finds out what it is, and says or mends it. On GPUs the kernel itself knows
 * the stream; a device is part of what a call looks like.
 *
 * Only functions of Python's stable ABI are used, and declared here, so that neither Python's
 * headers are needed to compile this file (they are often not installed) nor another build for
 * another Python. Tensors are read through DLPack's exchange table. Outputs are made by torch's C
 * shim (half the time of torch.empty_like) where it is found, else through DLPack. Where gradients
 * are recorded, a call is served by a kernel that also makes what its backward takes, and `record`,
 * C++ of an operator's (`torch/layer_norm_node.cpp`), attaches the backward to the first output;
 * the other outputs never reach Python. While cases are recorded, calls are counted here; while
 * they are not, that is one look at a flag. Valid as C and as C++.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <dlpack/dlpack.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <tvm/ffi/c_api.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct _object PyObject;
typedef intptr_t Py_ssize_t;
typedef PyObject *(*Fast)(PyObject *self, PyObject *const *args, Py_ssize_t count);
typedef struct {
  const char *name;
  Fast call;
  int flags;
  const char *doc;
} PyMethodDef;
enum { METH_FASTCALL = 0x80 };
extern PyObject _Py_NoneStruct, PyFloat_Type;
void Py_IncRef(PyObject *);
void Py_DecRef(PyObject *);
PyObject *PyObject_Type(PyObject *);
PyObject *PyObject_GetAttr(PyObject *, PyObject *);
PyObject *PyObject_CallNoArgs(PyObject *);
PyObject *PyObject_CallMethodObjArgs(PyObject *, PyObject *, ...);
int PyObject_IsTrue(PyObject *);
PyObject *PyUnicode_InternFromString(const char *);
double PyFloat_AsDouble(PyObject *);
Py_ssize_t PyLong_AsSsize_t(PyObject *);
Py_ssize_t PySequence_Size(PyObject *);
PyObject *PySequence_GetItem(PyObject *, Py_ssize_t);
PyObject *PyTuple_New(Py_ssize_t);
int PyTuple_SetItem(PyObject *, Py_ssize_t, PyObject *);
PyObject *PyErr_Occurred(void);
void PyErr_Clear(void);
void PyErr_SetString(PyObject *, const char *);
extern PyObject *PyExc_RuntimeError;
void *PyLong_AsVoidPtr(PyObject *);
char *PyBytes_AsString(PyObject *);
PyObject *PyBool_FromLong(long);
void *PyCapsule_GetPointer(PyObject *, const char *);
PyObject *PyCapsule_New(void *, const char *, void (*)(PyObject *));
PyObject *PyCFunction_NewEx(PyMethodDef *, PyObject *, PyObject *);
void *PyEval_SaveThread(void);
void PyEval_RestoreThread(void *);

enum { MAX_ARGS = 24, MAX_OUT = 8, MAX_DIMS = 2, MAX_NDIM = 8 };
/* Bytes: kernels of GPUs ask for whole accesses, and the general path finds those for other
 * tensors. */
enum { ALIGNED = 16 };

/* In the place of a size: the number of rows; those of normalized_shape, however many they are. */
enum { ROWS = -1, NORMALIZED = -2 };

/* A shape of its own, or that of the first tensor (`dims` 0). */
typedef struct {
  int64_t dtype, dims;
  int64_t dim[MAX_DIMS];
} Output;

/* `order` has the kernel's arguments: i >= 0 is the i-th of the call, -1 - j the j-th output.
 * `matrices` has a bit for each of them that the kernel takes as (rows, hidden), whatever the
 * number of its leading dimensions. `tag` is what calls are counted under. */
typedef struct {
  int64_t key, key_rest, kernel, tag, matrices, arguments, order[MAX_ARGS], outputs;
  Output output[MAX_OUT];
} Entry;

/* Make the first output part of the autograd graph. `inputs` are c10::TensorImpl *, one for each
 * argument of the call (null for what is no tensor), `outputs` are at::Tensor *, and `dims` is how
 * many dimensions a row has. Returns 0; else an error is set in Python, or `message` says what went
 * wrong. */
typedef int (*Record)(void *const *inputs, void *const *outputs, int dims, char *message,
                      size_t size);

typedef struct {
  /* t a tensor, o a tensor or None, f a float, n a normalized_shape. Where there is one, each t
   * ends in these dimensions, which are a row, each o has them and no others, and s is a tensor
   * that has nothing to do with them. */
  char *signature;
  int shape_at; /* the place of n, -1 without one */
  PyObject *tensor, *parameter, *grad_enabled, *forward_ad, *level, *requires_grad, *is_neg, *cdata;
  PyObject **quiet; /* all to be false, the first of them only where tensors are not on the CPU */
  int quiet_count, size, used, shim;
  Record *record; /* null, or null there: calls whose gradients are recorded are not served */
  Entry *entries; /* open addressing; `arguments` 0 is a free place */
} Table;

static DLPackExchangeAPI *dlpack;
static int (*call_function)(void *, TVMFFIAny *, int32_t, TVMFFIAny *);
static void (*take_error)(void **);
static int (*release)(void *);
static int32_t (*empty_strided)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t,
                                int32_t, void **);
static int32_t (*data_pointer)(void *, void **), (*delete_tensor)(void *);
/* THPVariable_Wrap(const at::TensorBase &); a handle of the shim is an at::Tensor *. */
static PyObject *(*wrap)(void *);

/* Calls of one tag and number of rows: how many, how many of them were timed, and their
 * nanoseconds. */
typedef struct {
  int64_t tag, rows, calls, timed, ns;
} Count;
/* Beyond so many, rows are counted as the power of two below them, which is in their bucket. */
enum { MOST_COUNTS = 4096 };
static volatile int counting;
static pthread_mutex_t count_lock = PTHREAD_MUTEX_INITIALIZER; /* of the next three */
static Count *counts; /* open addressing; `calls` 0 is a free place */
static int64_t count_room, count_used;

static Count *count_slot(int64_t tag, int64_t rows) {
  uint64_t hash = (uint64_t)tag * 0x9E3779B97F4A7C15u ^ (uint64_t)rows * 0xC2B2AE3D27D4EB4Fu;
  for (uint64_t i = hash >> 32;; ++i) {
    Count *c = &counts[i & (uint64_t)(count_room - 1)];
    if (!c->calls || (c->tag == tag && c->rows == rows)) return c;
  }
}

/* Count a call; `ns` below 0: it was not timed. From any thread, with Python's lock or without. */
void lntune_count(int64_t tag, int64_t rows, int64_t ns) {
  pthread_mutex_lock(&count_lock);
  if (count_used >= MOST_COUNTS) rows = (int64_t)1 << (63 - __builtin_clzll((uint64_t)rows));
  if (2 * (count_used + 1) > count_room) {
    int64_t before = count_room, room = before ? 2 * before : 256;
    Count *old = counts, *grown = (Count *)calloc((size_t)room, sizeof(Count));
    if (!grown) {
      pthread_mutex_unlock(&count_lock);
      return;
    }
    counts = grown, count_room = room;
    for (int64_t i = 0; i < before; ++i)
      if (old[i].calls) *count_slot(old[i].tag, old[i].rows) = old[i];
    free(old);
  }
  Count *c = count_slot(tag, rows);
  count_used += !c->calls;
  c->tag = tag, c->rows = rows, ++c->calls;
  if (ns >= 0) ++c->timed, c->ns += ns;
  pthread_mutex_unlock(&count_lock);
}

static void lock_counts(void) { pthread_mutex_lock(&count_lock); }
static void unlock_counts(void) { pthread_mutex_unlock(&count_lock); }

/* Count from now on, or no longer. */
void lntune_counting(int on) {
  static int registered; /* a forked child must not find the lock shut */
  if (on && !registered) registered = !pthread_atfork(lock_counts, unlock_counts, unlock_counts);
  counting = on;
}

/* Move the counts to `into`, room for `most` of them; how many there are. Where there is no room,
 * nothing is moved. */
int64_t lntune_counts_take(Count *into, int64_t most) {
  pthread_mutex_lock(&count_lock);
  int64_t found = count_used;
  if (found && found <= most) {
    for (int64_t i = 0; i < count_room; ++i)
      if (counts[i].calls) *into++ = counts[i];
    memset(counts, 0, (size_t)count_room * sizeof(Count));
    count_used = 0;
  }
  pthread_mutex_unlock(&count_lock);
  return found;
}

static int64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* True when the shim was found. */
int lntune_direct_init(void *exchange, void *call, void *error, void *decref, const char *torch_cpu,
                       const char *torch_python) {
  dlpack = (DLPackExchangeAPI *)exchange;
  call_function = (int (*)(void *, TVMFFIAny *, int32_t, TVMFFIAny *))call;
  take_error = (void (*)(void **))error;
  release = (int (*)(void *))decref;
  void *cpu = dlopen(torch_cpu, RTLD_NOW | RTLD_NOLOAD),
       *python = dlopen(torch_python, RTLD_NOW | RTLD_NOLOAD);
  if (!cpu || !python) return 0;
  empty_strided = (int32_t (*)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t,
                               void **))dlsym(cpu, "aoti_torch_empty_strided");
  data_pointer = (int32_t (*)(void *, void **))dlsym(cpu, "aoti_torch_get_data_ptr");
  delete_tensor = (int32_t (*)(void *))dlsym(cpu, "aoti_torch_delete_tensor_object");
  wrap = (PyObject * (*)(void *)) dlsym(python, "_Z16THPVariable_WrapRKN2at10TensorBaseE");
  return empty_strided && data_pointer && delete_tensor && wrap;
}

/* The three dtypes kernels take, numbered 1 to 3; 0 for any other. Beside them torch's own numbers
 * (c10::ScalarType). */
static int dtype_of(DLDataType t) {
  if (t.lanes != 1) return 0;
  if (t.code == kDLFloat && t.bits == 32) return 1;
  if (t.code == kDLFloat && t.bits == 16) return 2;
  return t.code == kDLBfloat && t.bits == 16 ? 3 : 0;
}
static const int torch_dtype[] = {0, 6, 5, 15};
static DLDataType dlpack_dtype(int64_t dtype) {
  DLDataType t = {(uint8_t)(dtype == 3 ? kDLBfloat : kDLFloat), (uint8_t)(dtype == 1 ? 32 : 16), 1};
  return t;
}

/* Elements from one row, which is the last `dims` axes, to the next, and in `length` those of a
 * row, which is the same where the tensor is contiguous; -1 where the elements of a row do not lie
 * side by side, or the rows not evenly spaced. */
static int64_t row_stride(const DLTensor *t, int dims, int64_t *length) {
  int64_t inside = 1, rows = 1;
  int i = t->ndim - 1;
  for (; i >= t->ndim - dims; inside *= t->shape[i--])
    if (t->strides && t->shape[i] != 1 && t->strides[i] != inside) return -1;
  int64_t distance = *length = inside;
  if (!t->strides) return distance;
  for (; i >= 0; rows *= t->shape[i--]) {
    if (t->shape[i] == 1) continue;
    if (rows == 1) distance = t->strides[i];
    else if (t->strides[i] != rows * distance) return -1;
  }
  return distance;
}

static int is_type(PyObject *object, PyObject *one, PyObject *other) {
  PyObject *type = PyObject_Type(object);
  Py_DecRef(type);
  return type == one || type == other;
}

/* 1 when calling or reading gave something true, 0 for something false; an error counts as true. */
static int truth(PyObject *result) {
  int yes = result ? PyObject_IsTrue(result) : 1;
  if (result) Py_DecRef(result);
  return yes != 0;
}

typedef struct {
  int dims; /* of a row: those of normalized_shape */
  int64_t normalized[MAX_NDIM];
  DLTensor tensor[MAX_ARGS];
  int64_t distance[MAX_ARGS]; /* elements from one row to the next */
  double scalar[MAX_ARGS];
  int strided; /* some rows do not follow one another in memory: another kernel takes them */
  DLDevice device;
  int64_t hidden, rows, key; /* the key has the hidden size and the device */
  uint64_t rest;             /* and everything else */
} Call;

/* In `rest`: gradients of this call are recorded. */
static const uint64_t RECORDED = (uint64_t)1 << 63;

static int is_tensor(const Table *table, PyObject *const *args, int i) {
  return strchr("tos", table->signature[i]) && args[i] != &_Py_NoneStruct;
}

/* 1 when the gradient of a tensor may be asked for later. */
static int recording(const Table *table, PyObject *const *args) {
  if (!truth(PyObject_CallNoArgs(table->grad_enabled))) return 0;
  for (int i = 0; table->signature[i]; ++i)
    if (is_tensor(table, args, i) && truth(PyObject_GetAttr(args[i], table->requires_grad)))
      return 1;
  return 0;
}

/* Modes, transforms and tracing: whatever must see the call goes through the general path. */
static int unusual(const Table *table, PyObject *const *args, const Call *c) {
  for (int i = c->device.device_type == kDLCPU; i < table->quiet_count; ++i)
    if (truth(PyObject_CallNoArgs(table->quiet[i]))) return 1;
  PyObject *level = PyObject_GetAttr(table->forward_ad, table->level);
  if (!level) return 1;
  int dual = PyLong_AsSsize_t(level) >= 0;
  Py_DecRef(level);
  if (dual) return 1;
  /* A lazy minus: only _neg_view, and views of one element, can have it and be contiguous. */
  for (int i = 0; table->signature[i]; ++i)
    if (is_tensor(table, args, i) &&
        truth(PyObject_CallMethodObjArgs(args[i], table->is_neg, (PyObject *)0)))
      return 1;
  return 0;
}

/* 0 where it is no normalized_shape. */
static int read_shape(PyObject *shape, Call *c) {
  Py_ssize_t dims = PySequence_Size(shape);
  if (dims < 1 || dims > MAX_NDIM) return 0;
  c->dims = (int)dims;
  for (int d = 0; d < c->dims; ++d) {
    PyObject *item = PySequence_GetItem(shape, d);
    c->normalized[d] = item ? PyLong_AsSsize_t(item) : -1;
    if (item) Py_DecRef(item);
    if (c->normalized[d] < 0) return 0;
  }
  return 1;
}

/* 1 where a tensor is of the kind that it is in a signature with a normalized_shape. */
static int fits(const DLTensor *t, char kind, const Call *c) {
  if (t->ndim < c->dims || (kind == 'o' && t->ndim > c->dims)) return 0;
  for (int d = 0; d < c->dims; ++d)
    if (t->shape[t->ndim - c->dims + d] != c->normalized[d]) return 0;
  return 1;
}

/* Make of the dimensions of a row, which lie side by side, the one that kernels take. */
static void flatten(DLTensor *t, Call *c) {
  t->ndim = 1;
  t->shape = &c->hidden;
  t->strides = 0;
}

/* Arguments as the kernel takes them, but for matrices, whose shapes are still those of the call,
 * and the key; 0 when one of them is unusual. */
static int read_call(const Table *table, PyObject *const *args, Py_ssize_t count, Call *c) {
  const char *kinds = table->signature;
  if (count != (Py_ssize_t)strlen(kinds)) return 0;
  c->rest = 0;
  c->strided = 0;
  c->dims = 1;
  if (table->shape_at >= 0 && !read_shape(args[table->shape_at], c)) return 0;
  for (int i = 0; i < count; ++i) {
    DLTensor *t = &c->tensor[i];
    switch (kinds[i]) {
    case 'f':
      if (!is_type(args[i], &PyFloat_Type, &PyFloat_Type)) return 0;
      c->scalar[i] = PyFloat_AsDouble(args[i]);
      if (!(c->scalar[i] >= 0.0 && c->scalar[i] <= 1e300)) return 0;
      break;
    case 'n': break;
    default:
      c->rest <<= 2;
      if (kinds[i] == 'o' && args[i] == &_Py_NoneStruct) break;
      if (!is_type(args[i], table->tensor, table->parameter) ||
          dlpack->dltensor_from_py_object_no_sync(args[i], t))
        return 0;
      int dtype = dtype_of(t->dtype);
      if (!dtype || !t->ndim) return 0;
      const int whole = table->shape_at >= 0 && kinds[i] != 's';
      if (whole && !fits(t, kinds[i], c)) return 0;
      int64_t length, distance = row_stride(t, whole ? c->dims : 1, &length);
      if (distance < 0) return 0;
      c->rest |= dtype;
      c->distance[i] = distance;
      if (!i) c->device = t->device;
      if (t->device.device_type != c->device.device_type ||
          t->device.device_id != c->device.device_id)
        return 0;
      c->strided |= distance != length;
      uintptr_t address = (uintptr_t)t->data + t->byte_offset;
      if (distance != length) address |= (uintptr_t)distance * (t->dtype.bits / 8);
      if (c->device.device_type != kDLCPU && length > 1 && address % ALIGNED) return 0;
      if (whole && kinds[i] == 'o') flatten(t, c);
      if (i) break;
      c->hidden = length;
      c->rows = 1;
      for (int d = 0; d < t->ndim - c->dims; ++d) c->rows *= t->shape[d];
    }
  }
  if (c->hidden <= 0 || c->hidden >> 32 || c->rows <= 0 ||
      (c->device.device_type != kDLCPU && c->device.device_type != kDLCUDA))
    return 0;
  c->key = c->hidden | (int64_t)c->device.device_type << 56 | (int64_t)c->device.device_id << 32;
  c->rest = (c->rest << 1 | (uint64_t)c->strided) << 6 | (64 - __builtin_clzll((uint64_t)c->rows));
  return 1;
}

/* The entry of a key, or the free one where it belongs. */
static Entry *slot(const Table *table, int64_t key, uint64_t rest) {
  uint64_t hash = ((uint64_t)key * 0x9E3779B97F4A7C15u) ^ (rest * 0xC2B2AE3D27D4EB4Fu);
  for (uint64_t i = hash >> 32;; ++i) {
    Entry *e = &table->entries[i & (uint64_t)(table->size - 1)];
    if (!e->arguments || (e->key == key && e->key_rest == (int64_t)rest)) return e;
  }
}

static void say_nothing(void *context, const char *kind, const char *message) {
  (void)context, (void)kind, (void)message;
}

/* Make an output and describe it in `t`, whose shape and strides live in `dims`; returns it, or
 * where `keep` is given puts its handle there and returns null. */
static PyObject *make(const Table *table, const Output *o, const Call *c, DLTensor *t,
                      int64_t *dims, void **keep) {
  int64_t *shape = dims, *strides = dims + MAX_NDIM;
  int ndim = o->dims ? 0 : c->tensor[0].ndim;
  if (ndim > MAX_NDIM) return 0;
  for (int d = 0; d < ndim; ++d) shape[d] = c->tensor[0].shape[d];
  for (int d = 0; d < o->dims; ++d) {
    if (ndim + (o->dim[d] == NORMALIZED ? c->dims : 1) > MAX_NDIM) return 0;
    if (o->dim[d] == NORMALIZED)
      for (int n = 0; n < c->dims; ++n) shape[ndim++] = c->normalized[n];
    else shape[ndim++] = o->dim[d] == ROWS ? c->rows : o->dim[d];
  }
  int64_t step = 1;
  for (int d = ndim - 1; d >= 0; step *= shape[d--]) strides[d] = step;
  DLTensor tensor = {0, c->device, ndim, dlpack_dtype(o->dtype), shape, strides, 0};
  PyObject *result = 0;
  if (table->shim) {
    void *handle;
    if (empty_strided(ndim, shape, strides, torch_dtype[o->dtype],
                      c->device.device_type != kDLCPU, /* c10::DeviceType */
                      c->device.device_type == kDLCPU ? -1 : c->device.device_id, &handle))
      return 0;
    if (data_pointer(handle, &tensor.data)) tensor.data = 0;
    else if (keep) *keep = handle;
    else result = wrap(handle);
    if (!keep || !*keep) delete_tensor(handle);
  } else {
    DLManagedTensorVersioned *managed;
    void *object;
    if (dlpack->managed_tensor_allocator(&tensor, &managed, 0, say_nothing)) return 0;
    tensor.data = (char *)managed->dl_tensor.data + managed->dl_tensor.byte_offset;
    if (!dlpack->managed_tensor_to_py_object_no_sync(managed, &object)) result = (PyObject *)object;
  }
  *t = tensor;
  return result;
}

/* The first output, once its backward is attached; null with an error set where that cannot be. */
static PyObject *recorded(const Table *table, PyObject *const *args, int dims,
                          void *const *handles) {
  void *inputs[MAX_ARGS] = {0};
  char message[1024] = "";
  for (int i = 0; table->signature[i]; ++i) {
    if (!is_tensor(table, args, i)) continue;
    PyObject *pointer = PyObject_GetAttr(args[i], table->cdata);
    inputs[i] = pointer ? PyLong_AsVoidPtr(pointer) : 0;
    if (pointer) Py_DecRef(pointer);
    if (!inputs[i]) return 0;
  }
  if (!(*table->record)(inputs, handles, dims, message, sizeof message)) return wrap(handles[0]);
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, message);
  return 0;
}

/* The outputs (the first alone where gradients are recorded). Null where the kernel could not be
 * called, which the general path finds out again and says, or with an error of autograd's set. */
static PyObject *run(const Table *table, const Entry *e, Call *c, PyObject *const *args) {
  TVMFFIAny values[MAX_ARGS], nothing;
  PyObject *outputs[MAX_OUT] = {0};
  void *handles[MAX_OUT] = {0};
  DLTensor out[MAX_OUT];
  int64_t dims[MAX_OUT][2 * MAX_NDIM];
  int64_t flat[2] = {c->rows, c->hidden}, steps[MAX_ARGS][2];
  int count = 0, failed = 0, record = (c->rest & RECORDED) != 0;
  for (; count < e->outputs && !failed; ++count) {
    outputs[count] =
        make(table, &e->output[count], c, &out[count], dims[count], record ? &handles[count] : 0);
    failed = !outputs[count] && !handles[count];
  }
  memset(&nothing, 0, sizeof nothing);
  for (int i = 0; i < e->arguments && !failed; ++i) {
    int64_t at = e->order[i];
    memset(&values[i], 0, sizeof values[i]);
    if (at >= 0 && table->signature[at] == 'f') {
      values[i].type_index = kTVMFFIFloat;
      values[i].v_float64 = c->scalar[at];
      continue;
    }
    DLTensor *t = at >= 0 ? &c->tensor[at] : &out[-1 - at];
    if (e->matrices >> i & 1) {
      int64_t size = 1, length = 1;
      for (int d = t->ndim - 1; d >= 0; size *= t->shape[d--])
        if (d >= t->ndim - c->dims) length *= t->shape[d];
      if (t->ndim < c->dims || size != c->rows * c->hidden || length != c->hidden) {
        failed = 1;
        break;
      }
      steps[i][0] = at >= 0 ? c->distance[at] : c->hidden;
      steps[i][1] = 1;
      t->ndim = 2;
      t->shape = flat;
      t->strides = steps[i];
    } else if (at < 0 && e->output[-1 - at].dim[0] == NORMALIZED) flatten(t, c);
    values[i].type_index = kTVMFFIDLTensorPtr;
    values[i].v_ptr = t;
  }
  if (!failed) {
    /* a GPU's kernel has only been launched when the call returns */
    const int timed = counting && c->device.device_type == kDLCPU;
    int64_t ns = -1;
    void *state = PyEval_SaveThread();
    if (timed) ns = -nanoseconds();
    failed = call_function((void *)(intptr_t)e->kernel, values, (int32_t)e->arguments, &nothing);
    if (timed) ns += nanoseconds();
    PyEval_RestoreThread(state);
    if (counting && !failed) lntune_count(e->tag, c->rows, ns);
    if (failed) {
      void *error = 0;
      take_error(&error);
      if (error) release(error);
    }
  }
  PyObject *result = 0;
  if (record) {
    if (!failed) result = recorded(table, args, c->dims, handles);
    for (int i = 0; i < count; ++i)
      if (handles[i]) delete_tensor(handles[i]);
    return result;
  }
  if (!failed && count == 1) return outputs[0];
  if (!failed && (result = PyTuple_New(count))) {
    /* takes the reference */
    for (int i = 0; i < count; ++i) PyTuple_SetItem(result, i, outputs[i]);
    return result;
  }
  for (int i = 0; i < count; ++i)
    if (outputs[i]) Py_DecRef(outputs[i]);
  return 0;
}

static PyObject *none(void) {
  if (PyErr_Occurred()) PyErr_Clear();
  Py_IncRef(&_Py_NoneStruct);
  return &_Py_NoneStruct;
}

/* The outputs of the kernel that serves these arguments, or None. An error is one of autograd's: of
 * hooks for saved tensors, or about tensors that cannot be saved. */
static PyObject *call(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  Table *table = (Table *)PyCapsule_GetPointer(self, 0);
  Call c;
  if (!table->used || !read_call(table, args, count, &c)) return none();
  if (recording(table, args)) {
    if (!table->record || !*table->record) return none();
    c.rest |= RECORDED;
  }
  /* A copy: Python that runs from here on, and other threads, may change the table. */
  Entry entry = *slot(table, c.key, c.rest);
  if (!entry.arguments || unusual(table, args, &c)) return none();
  PyErr_Clear();
  PyObject *result = run(table, &entry, &c, args);
  return result || (c.rest & RECORDED && PyErr_Occurred()) ? result : none();
}

/* True when a call of these arguments would be served if no gradients were recorded. */
static PyObject *serves(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  Table *table = (Table *)PyCapsule_GetPointer(self, 0);
  Call c;
  int yes = table->used && read_call(table, args, count, &c) &&
            slot(table, c.key, c.rest)->arguments && !unusual(table, args, &c);
  if (PyErr_Occurred()) PyErr_Clear();
  return PyBool_FromLong(yes);
}

/* (bytes of an Entry without its key, first bit length, last bit length, whether gradients are
 * recorded, arguments...): calls that look like these, with rows of these bit lengths, are served
 * from now on. True when it could be done. */
static PyObject *remember(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  Table *table = (Table *)PyCapsule_GetPointer(self, 0);
  Call c;
  int known = count > 4 && read_call(table, args + 4, count - 4, &c);
  Py_ssize_t first = PyLong_AsSsize_t(args[1]), last = PyLong_AsSsize_t(args[2]);
  uint64_t record = PyObject_IsTrue(args[3]) ? RECORDED : 0;
  if (record && !(table->record && *table->record && table->shim)) known = 0;
  for (Py_ssize_t bits = first; known && bits <= last; ++bits) {
    if (2 * (table->used + 1) > table->size) {
      int size = table->size;
      Entry *old = table->entries, *grown = (Entry *)calloc((size_t)size * 2, sizeof(Entry));
      if (!grown) break;
      table->entries = grown;
      table->size = 2 * size;
      for (int i = 0; i < size; ++i)
        if (old[i].arguments) *slot(table, old[i].key, (uint64_t)old[i].key_rest) = old[i];
      free(old);
    }
    uint64_t rest = record | (c.rest & ~(uint64_t)63) | (uint64_t)bits;
    Entry *e = slot(table, c.key, rest);
    table->used += !e->arguments;
    memcpy(e, PyBytes_AsString(args[0]), sizeof *e);
    e->key = c.key;
    e->key_rest = (int64_t)rest;
  }
  if (PyErr_Occurred()) PyErr_Clear();
  return PyBool_FromLong(known);
}

static PyObject *forget(PyObject *self, PyObject *const *args, Py_ssize_t count) {
  Table *table = (Table *)PyCapsule_GetPointer(self, 0);
  (void)args, (void)count;
  memset(table->entries, 0, (size_t)table->size * sizeof(Entry));
  table->used = 0;
  return none();
}

static PyMethodDef methods[] = {
    {"call", call, METH_FASTCALL,
     "The outputs of the kernel that serves these arguments, or None where none is known."},
    {"serves", serves, METH_FASTCALL,
     "True when these arguments would be served if no gradients were recorded."},
    {"remember", remember, METH_FASTCALL, "Serve calls that look like this one from now on."},
    {"forget", forget, METH_FASTCALL, "Serve nothing."},
};

static void drop(PyObject *self) {
  Table *table = (Table *)PyCapsule_GetPointer(self, 0);
  PyObject *held[] = {table->tensor, table->parameter,     table->grad_enabled, table->forward_ad,
                      table->level,  table->requires_grad, table->is_neg,       table->cdata};
  for (unsigned i = 0; i < sizeof held / sizeof *held; ++i) Py_DecRef(held[i]);
  for (int i = 0; i < table->quiet_count; ++i) Py_DecRef(table->quiet[i]);
  free(table->quiet), free(table->signature), free(table->entries), free(table);
}

/* (call, serves, remember, forget) of a new table. `quiet` are callables that must all give
 * something false for a call to be served, the first of them only where its tensors are not on the
 * CPU. `record` is where a Record is, now or later, or null. */
PyObject *lntune_direct_table(const char *signature, PyObject *tensor, PyObject *parameter,
                              PyObject *grad_enabled, PyObject *forward_ad, PyObject *quiet,
                              int shim, Record *record) {
  Table *table = (Table *)calloc(1, sizeof(Table));
  PyObject *functions = PyTuple_New(4);
  int count = (int)PySequence_Size(quiet);
  PyObject **callables = (PyObject **)calloc((size_t)count + 1, sizeof(PyObject *));
  for (int i = 0; i < count; ++i) callables[i] = PySequence_GetItem(quiet, i);
  PyObject *kept[] = {tensor, parameter, grad_enabled, forward_ad};
  for (int i = 0; i < 4; ++i) Py_IncRef(kept[i]);
  table->signature = strdup(signature);
  const char *shape = strchr(signature, 'n');
  table->shape_at = shape ? (int)(shape - signature) : -1;
  table->tensor = tensor, table->parameter = parameter, table->grad_enabled = grad_enabled,
  table->forward_ad = forward_ad;
  table->level = PyUnicode_InternFromString("_current_level");
  table->requires_grad = PyUnicode_InternFromString("requires_grad");
  table->is_neg = PyUnicode_InternFromString("is_neg");
  table->cdata = PyUnicode_InternFromString("_cdata");
  table->quiet = callables, table->quiet_count = count;
  table->shim = shim;
  table->record = record;
  table->size = 64;
  table->entries = (Entry *)calloc((size_t)table->size, sizeof(Entry));
  PyObject *self = PyCapsule_New(table, 0, drop);
  for (int i = 0; i < 4; ++i)
    PyTuple_SetItem(functions, i, PyCFunction_NewEx(&methods[i], self, 0));
  Py_DecRef(self);
  return functions;
}

#ifdef __cplusplus
}
#endif
