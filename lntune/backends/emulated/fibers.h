/* The threads of a block as fibers: each has a stack, and runs until it yields to the scheduler. */
#pragma once
#if !(defined(__x86_64__) && defined(__linux__))
#define UCONTEXT 1
#define _XOPEN_SOURCE 700
#define _DARWIN_C_SOURCE 1
#define _GNU_SOURCE 1
#include <ucontext.h>
#endif
#include <stdarg.h>
#include <stdlib.h>

#include "memory.h"

enum State : uint8_t { READY, AT_BARRIER, AT_COLLECTIVE, EXITED };
/* clang-format off */
enum Collective { SHUFFLE, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, BALLOT, ALL, ANY, SYNC };
/* clang-format on */
static const char *const collectives[] = {"__shfl_sync",     "__shfl_up_sync", "__shfl_down_sync",
                                          "__shfl_xor_sync", "__ballot_sync",  "__all_sync",
                                          "__any_sync",      "__syncwarp"};
enum Gather { PLAIN, COUNT, AND, OR };

struct Thread {
#ifdef UCONTEXT
  ucontext_t context;
#else
  void *context;
#endif
  State state;
  int line, kind, argument, width;
  uint32_t mask;
  uint64_t value, result;
  Index index;
};

extern "C" {
Index threadIdx, blockIdx, blockDim, gridDim;
char *lnt_shared, *lnt_dynamic_shared;
}

static Thread threads[1024];
static Warp warps[32];
static uint32_t thread_count;
static void (*kernel)(void **);
static void **kernel_arguments;
static Kind failure;
static char failure_text[1024];

#ifdef UCONTEXT
static ucontext_t scheduler;
static void go(Thread *t) { swapcontext(&scheduler, &t->context); }
static void yield() { swapcontext(&me->context, &scheduler); }
#else
static void *scheduler;
/* Keeps what a call must keep on the stack, and the stack in *from. */
extern "C" void lnt_switch(void **from, void *to);
asm(R"(
.text
.globl lnt_switch
.hidden lnt_switch
.type lnt_switch,@function
lnt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lnt_switch,.-lnt_switch
)");
static void go(Thread *t) { lnt_switch(&scheduler, t->context); }
static void yield() { lnt_switch(&me->context, scheduler); }
#endif

static void fiber() {
  kernel(kernel_arguments);
  me->state = EXITED;
  my_warp->live &= ~(1u << (my_id % 32));
  yield();
}

static void begin(uint32_t id) {
  char *stack = stacks + id * stack_bytes;
#ifdef UCONTEXT
  getcontext(&threads[id].context);
  threads[id].context.uc_stack.ss_sp = stack + 4096;
  threads[id].context.uc_stack.ss_size = stack_bytes - 4096;
  threads[id].context.uc_link = nullptr;
  makecontext(&threads[id].context, fiber, 0);
#else
  /* Six registers, where to go, and the caller that is none. */
  void **top = (void **)(stack + stack_bytes) - 8;
  memset(top, 0, 8 * sizeof *top);
  top[6] = (void *)fiber;
  threads[id].context = top;
#endif
  threads[id].state = READY;
  waited[id] = false;
}

static const char *thread_name(uint32_t id) {
  static char text[64];
  const Index &i = threads[id].index;
  snprintf(text, sizeof text, "(%u, %u, %u)", i.x, i.y, i.z);
  return text;
}

static void say(Kind kind, uint32_t id, const char *format, va_list arguments) {
  failure = kind;
  int n = snprintf(failure_text, sizeof failure_text, "block (%u, %u, %u), thread %s: ", blockIdx.x,
                   blockIdx.y, blockIdx.z, thread_name(id));
  vsnprintf(failure_text + n, sizeof failure_text - size_t(n), format, arguments);
}

/* Called by a fiber, which is never resumed. */
static void fail(Kind kind, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  say(kind, my_id, format, arguments);
  va_end(arguments);
  yield();
  abort();
}

static void blame(uint32_t id, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void blame(uint32_t id, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  say(BARRIER, id, format, arguments);
  va_end(arguments);
}
