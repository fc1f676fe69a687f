/* What a built kernel needs from its process: a parallel launcher and scratch memory.
 *
 * The launcher runs TVM's parallel loops on the OpenMP pool that PyTorch already owns. A pool of
 * TVM's own beside it costs more than any schedule wins: two pools that spin for the same cores
 * make each other's barriers take a scheduler tick. It is looked up at run time (PyTorch brings
 * libgomp with it under a name of its own), so this file links against nothing. Valid as C and as
 * C++.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

/* Streamed stores of a task are seen by others only after a fence. */
#if defined(__x86_64__) || defined(__i386__)
#define FENCE() __builtin_ia32_sfence()
#else
#define FENCE() __sync_synchronize()
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  void *sync;
  int32_t num_task;
} Env; /* TVMParallelGroupEnv */
typedef int (*Task)(int task, Env *env, void *data);

static void (*omp_run)(void (*)(void *), void *, unsigned, unsigned);
static int (*omp_max_threads)(void);
static int (*omp_inside)(void);
static int (*omp_me)(void);
static int (*omp_team)(void);
static int (*omp_pause)(int);
static int paused;
static __thread int pool_used, orphan; /* the pool is one per thread that starts parallel regions */

/* libgomp's threads do not survive a fork; asking its pool for work in a child that inherited it
 * hangs for ever. So the forking thread's pool is given up before, and either process makes itself
 * a new one when it needs it (PyTorch's own operators too, which would hang otherwise). Where that
 * fails, a child of a thread that used the pool stays serial. */
static void before_fork(void) { paused = omp_pause && omp_pause(1) == 0; }
static void after_fork(void) {
  if (!paused) orphan |= pool_used;
}

/* A kernel that fails without saying why crashes its caller, who looks for the error; and what
 * another thread said is not heard. All that can fail in a kernel's tasks is scratch memory. */
static void (*set_error)(const char *kind, const char *message);
static void no_scratch(void) {
  if (set_error) set_error("MemoryError", "a kernel's scratch memory could not be had");
}

/* A function of the OpenMP runtime that PyTorch runs on. Where that is not among everyone's symbols
 * (its wheels for Arm), it is among those of what `torch`, a handle of PyTorch's library, needs. */
static void *of_pool(const char *name, void *torch) {
  void *found = dlsym(RTLD_DEFAULT, name);
  return found || !torch ? found : dlsym(torch, name);
}

/* `max_threads` is at::get_num_threads: it alone makes torch.set_num_threads hold in threads that
 * called no parallel operator of PyTorch's before. Null: OpenMP is asked itself. `error` is
 * TVMFFIErrorSetRaisedFromCStr; `torch` may be null. */
int lntune_runtime_init(int (*max_threads)(void), void (*error)(const char *, const char *),
                        void *torch) {
  static int hooked;
  set_error = error;
  omp_run = (void (*)(void (*)(void *), void *, unsigned, unsigned))of_pool("GOMP_parallel", torch);
  omp_max_threads =
      max_threads ? max_threads : (int (*)(void))of_pool("omp_get_max_threads", torch);
  omp_inside = (int (*)(void))of_pool("omp_in_parallel", torch);
  omp_me = (int (*)(void))of_pool("omp_get_thread_num", torch);
  omp_team = (int (*)(void))of_pool("omp_get_num_threads", torch);
  omp_pause = (int (*)(int))of_pool("omp_pause_resource_all", torch);
  /* No pool, or half of one: serial. */
  if (!(omp_max_threads && omp_inside && omp_me && omp_team)) omp_run = 0;
  if (omp_run && !hooked++) pthread_atfork(before_fork, 0, after_fork);
  return omp_run != 0;
}

typedef struct {
  Task task;
  void *data;
  int count;
  int failed;
} Job;

static void work(void *p) {
  Job *job = (Job *)p;
  Env env = {0, job->count};
  int step = omp_team();
  for (int i = omp_me(); i < job->count; i += step) { /* the team may be smaller than asked for */
    int rc = job->task(i, &env, job->data);
    if (rc) job->failed = rc;
  }
  FENCE();
}

int lntune_parallel_launch(Task task, void *data, int count) {
  int threads = omp_run && !orphan && !omp_inside() ? omp_max_threads() : 1;
  if (count <= 0) count = threads;
  if (threads <= 1 || count == 1) {
    Env env = {0, 1};
    int rc = task(0, &env, data);
    FENCE();
    return rc;
  }
  pool_used = 1;
  Job job = {task, data, count, 0};
  omp_run(work, &job, (unsigned)(count < threads ? count : threads), 0);
  if (job.failed) no_scratch();
  return job.failed;
}

/* Scratch memory: a few blocks a thread, kept and grown. The largest kernels take nine at once. */
enum { SLOTS = 32 };
typedef struct {
  void *block;
  uint64_t bytes;
  int used;
} Slot;
static pthread_key_t slots_key;
static pthread_once_t slots_once = PTHREAD_ONCE_INIT;
static __thread Slot *slots;

static void free_slots(void *p) {
  Slot *mine = (Slot *)p;
  for (int i = 0; i < SLOTS; ++i) free(mine[i].block);
  free(mine);
}
static void make_key(void) { pthread_key_create(&slots_key, free_slots); }

void *lntune_workspace_alloc(int device_type, int device, uint64_t bytes, int code, int bits) {
  (void)device_type, (void)device, (void)code, (void)bits;
  if (!slots) {
    pthread_once(&slots_once, make_key);
    slots = (Slot *)calloc(SLOTS, sizeof(Slot));
    if (!slots) return no_scratch(), (void *)0;
    pthread_setspecific(slots_key, slots);
  }
  int empty = -1;
  for (int i = 0; i < SLOTS; ++i) {
    if (slots[i].used) continue;
    if (slots[i].bytes >= bytes) {
      slots[i].used = 1;
      return slots[i].block;
    }
    empty = i;
  }
  void *block = 0;
  if (empty < 0 || posix_memalign(&block, 64, bytes)) return no_scratch(), (void *)0;
  free(slots[empty].block);
  slots[empty].block = block;
  slots[empty].bytes = bytes;
  slots[empty].used = 1;
  return block;
}

int lntune_workspace_free(int device_type, int device, void *block) {
  (void)device_type, (void)device;
  for (int i = 0; slots && i < SLOTS; ++i)
    if (slots[i].block == block) slots[i].used = 0;
  return 0;
}

#ifdef __cplusplus
}
#endif
