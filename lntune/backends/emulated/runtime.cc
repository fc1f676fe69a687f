/* Runs the blocks of a launch one after another, and the threads of a block as fibers on one thread
 * of the CPU.
 *
 * A fiber runs until it comes to a barrier or to a collective of its warp, or ends. When none can
 * go on, either all wait at the same barrier, which then opens, or the block is divergent, and the
 * launch fails. In what order threads and blocks get their turn is the caller's choice: a right
 * kernel cannot tell.
 */
#include "fibers.h" /* first: it asks the system's headers for more */
#include <unistd.h>

#include "hooks.h"

/* Barriers and collectives, called by fibers. */
extern "C" int lnt_barrier(int line, int gather, int value) {
  Thread *t = me;
  t->line = line, t->kind = gather, t->value = uint64_t(value), t->state = AT_BARRIER;
  yield();
  return int(t->result);
}

static uint64_t result_of(const Warp &w, Thread *lanes, uint32_t lane, uint32_t need) {
  const Thread &t = lanes[lane];
  if (t.kind >= BALLOT) {
    uint32_t votes = 0;
    for (uint32_t i = 0; i < 32; ++i)
      if (need >> i & 1 && lanes[i].value) votes |= 1u << i;
    return t.kind == BALLOT ? votes : t.kind == ALL ? votes == need : votes != 0;
  }
  int width = t.width, own = int(lane), first = own & -width, from = own;
  if (t.kind == SHUFFLE) from = first + (t.argument & (width - 1));
  if (t.kind == SHUFFLE_UP && own - t.argument >= first) from = own - t.argument;
  if (t.kind == SHUFFLE_DOWN && own + t.argument < first + width) from = own + t.argument;
  if (t.kind == SHUFFLE_XOR && (own ^ t.argument) < first + width) from = own ^ t.argument;
  const bool defined = from >= 0 && need & w.exists & (1u << (from & 31));
  return defined ? lanes[from & 31].value : ~uint64_t(0); /* undefined: NaN shows it */
}

extern "C" uint64_t lnt_collective(int line, int kind, uint32_t mask, uint64_t value, int argument,
                                   int width) {
  Thread *t = me;
  Warp &w = *my_warp;
  uint32_t lane = my_id % 32, need = mask & w.exists;
  Thread *lanes = threads + my_id / 32 * 32;
  if (!(mask >> lane & 1))
    fail(BARRIER, "%s of line %d with the mask 0x%08x, in which the calling lane %u is missing",
         collectives[kind], line, mask, lane);
  if (width < 1 || width > 32 || width & (width - 1))
    fail(BARRIER, "%s of line %d with the width %d", collectives[kind], line, width);
  t->line = line, t->kind = kind, t->mask = mask, t->value = value, t->argument = argument,
  t->width = width, t->state = AT_COLLECTIVE;
  w.waiting |= 1u << lane;
  bool complete = (w.waiting & need) == need;
  for (uint32_t i = 0; complete && i < 32; ++i)
    if (need >> i & 1)
      complete = lanes[i].line == line && lanes[i].kind == kind && lanes[i].mask == mask;
  if (!complete) {
    yield();
    return t->result;
  }
  ++w.clock;
  if (need == w.exists) w.all = w.clock;
  for (uint32_t i = 0; i < 32; ++i) {
    if (!(need >> i & 1)) continue;
    lanes[i].state = READY;
    lanes[i].result = kind == SYNC ? 0 : result_of(w, lanes, i, need);
    for (uint32_t j = 0; need != w.exists && j < 32; ++j)
      if (need >> j & 1) w.pair[i][j] = w.clock;
  }
  w.waiting &= ~need;
  return t->result;
}

extern "C" void lnt_wait() { waited[my_id] = true; }
extern "C" uint32_t lnt_activemask() { return my_warp->live; }
extern "C" void lnt_atomic(void *p, size_t size) { touch(p, size, ATOMIC, true); }

/* The order of turns. */
enum Order { FORWARD, BACKWARD, SHUFFLED };
static Order order;
static uint64_t seed;
static uint32_t draw(uint32_t n) {
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return uint32_t((seed >> 33) % n);
}
static void arrange(uint32_t *list, uint32_t n) {
  for (uint32_t i = 0; i < n; ++i) list[i] = order == BACKWARD ? n - 1 - i : i;
  for (uint32_t i = n; order == SHUFFLED && i > 1; --i) {
    uint32_t j = draw(i), kept = list[i - 1];
    list[i - 1] = list[j], list[j] = kept;
  }
}

static void resume(uint32_t id) {
  me = &threads[id], my_warp = &warps[id / 32], my_id = id, my_stack = stacks + id * stack_bytes;
  patience = 1u << 26;
  threadIdx = me->index;
  go(me);
  me = nullptr;
}

/* Gives every thread that can go on its turns; a warp runs as far as it can, unless the order is
 * shuffled. */
static void run_ready() {
  uint32_t warp_order[32], lane_order[32], count = (thread_count + 31) / 32;
  for (bool progress = true; progress;) {
    progress = false;
    arrange(warp_order, count);
    for (uint32_t i = 0; i < count; ++i) {
      uint32_t first = warp_order[i] * 32;
      uint32_t lanes = thread_count - first < 32 ? thread_count - first : 32;
      for (bool ran = true; ran;) {
        ran = false;
        arrange(lane_order, lanes);
        for (uint32_t j = 0; j < lanes; ++j) {
          if (threads[first + lane_order[j]].state != READY) continue;
          resume(first + lane_order[j]);
          if (failure) return;
          ran = progress = true;
        }
        if (order == SHUFFLED) break;
      }
    }
  }
}

static const char *whereabouts(uint32_t id) {
  static char text[160];
  const Thread &t = threads[id];
  if (t.state == EXITED) snprintf(text, sizeof text, "thread %s has ended", thread_name(id));
  else
    snprintf(text, sizeof text, "thread %s waits at the %s of line %d", thread_name(id),
             t.state == AT_BARRIER ? "__syncthreads" : collectives[t.kind], t.line);
  return text;
}

/* Nobody can go on, and not because all wait at one barrier. */
static void explain() {
  for (uint32_t id = 0; id < thread_count; ++id) {
    Thread &t = threads[id];
    if (t.state != AT_COLLECTIVE) continue;
    for (uint32_t lane = 0; lane < 32; ++lane) {
      uint32_t other = id / 32 * 32 + lane;
      if (!(t.mask & warps[id / 32].exists & 1u << lane)) continue;
      Thread &o = threads[other];
      if (o.state == AT_COLLECTIVE && o.line == t.line && o.kind == t.kind && o.mask == t.mask)
        continue;
      return blame(id, "%s of line %d with the mask 0x%08x, in which lane %u does not come: %s",
                   collectives[t.kind], t.line, t.mask, lane, whereabouts(other));
    }
  }
  uint32_t waits = 0;
  while (threads[waits].state != AT_BARRIER) ++waits;
  for (uint32_t id = 0; id < thread_count; ++id)
    if (threads[id].state != AT_BARRIER || threads[id].line != threads[waits].line ||
        threads[id].kind != threads[waits].kind)
      return blame(waits, "a divergent barrier: it waits at the __syncthreads of line %d, and %s",
                   threads[waits].line, whereabouts(id));
}

static void open_barrier() {
  uint64_t result = 0, holds = 0;
  for (uint32_t id = 0; id < thread_count; ++id) holds += threads[id].value != 0;
  if (threads[0].kind == COUNT) result = holds;
  if (threads[0].kind == AND) result = holds == thread_count;
  if (threads[0].kind == OR) result = holds != 0;
  for (uint32_t id = 0; id < thread_count; ++id)
    threads[id].state = READY, threads[id].result = result;
  ++phase;
}

static void run_block(size_t dynamic) {
  block_phase = ++phase;
  poison_shared(dynamic);
  for (uint32_t id = 0; id < thread_count; ++id) begin(id);
  for (uint32_t first = 0; first < thread_count; first += 32) {
    Warp &w = warps[first / 32];
    w.exists = w.live = thread_count - first < 32 ? (1u << (thread_count - first)) - 1 : ~0u;
    w.waiting = 0;
  }
  for (;;) {
    run_ready();
    if (failure) return;
    uint32_t ended = 0, together = 0;
    for (uint32_t id = 0; id < thread_count; ++id) {
      ended += threads[id].state == EXITED;
      together += threads[id].state == AT_BARRIER && threads[id].line == threads[0].line &&
                  threads[id].kind == threads[0].kind;
    }
    if (ended == thread_count) {
      for (uint32_t id = 0; early && id < thread_count && !failure; ++id)
        if (!waited[id]) blame(id, "it has ended and not waited for the kernel before this one");
      return;
    }
    if (together != thread_count) return explain();
    open_barrier();
  }
}

static bool prepare() {
  if (stacks) return true;
  size_t page = (size_t)sysconf(_SC_PAGESIZE);
  stack_bytes = 256 << 10;
  char *region = reserve(1024 * stack_bytes);
  shared = reserve(SHARED_BYTES);
  shared_cells = (Cell *)reserve(SHARED_BYTES * sizeof(Cell));
  if (!region || !shared || !shared_cells) return false;
  /* A stack that overflows does not reach the next. */
  for (size_t i = 0; i < 1024; ++i) mprotect(region + i * stack_bytes, page, PROT_NONE);
  stacks = region, stacks_bytes = 1024 * stack_bytes;
  lnt_shared = shared, lnt_dynamic_shared = shared + DYNAMIC;
  return true;
}

/* `before` says that the kernel before this one has not ended yet, but will once it is waited for.
 * `arguments` points, for a tensor to its number in `list` (`is_buffer`), and for a scalar to its
 * value. */
extern "C" int lnt_launch(void (*call)(void **), const Array *arrays, Buffer *list,
                          int buffer_count, void **arguments, const uint8_t *is_buffer,
                          int argument_count, const unsigned *grid, const unsigned *block,
                          uint64_t dynamic, int how, int before, char *text, uint64_t text_bytes) {
  static uint64_t scalars[256];
  static void *pointers[256], *addresses[256];
  failure = FINE, failure_text[0] = 0;
  size_t cells_bytes = 0;
  Cell *cells = nullptr;
  if (argument_count > 256 || !prepare() || !lay_out_shared(arrays, dynamic) ||
      !enter(list, buffer_count, cells_bytes, cells)) {
    failure = INTERNAL;
    snprintf(failure_text, sizeof failure_text, "no memory for the launch");
  }
  for (int i = 0; !failure && i < argument_count; ++i) {
    memcpy(&scalars[i], arguments[i], 8);
    addresses[i] = is_buffer[i] ? list[scalars[i]].low : nullptr;
    pointers[i] = is_buffer[i] ? (void *)&addresses[i] : (void *)&scalars[i];
  }
  kernel = call, kernel_arguments = pointers;
  order = Order(how), seed = 20240229, early = before;
  blockDim = {block[0], block[1], block[2]}, gridDim = {grid[0], grid[1], grid[2]};
  thread_count = block[0] * block[1] * block[2];
  for (uint32_t id = 0; id < thread_count; ++id)
    threads[id].index = {id % block[0], id / block[0] % block[1], id / block[0] / block[1]};
  uint32_t blocks = grid[0] * grid[1] * grid[2];
  uint32_t *turns = (uint32_t *)malloc(blocks * sizeof *turns);
  if (!failure) arrange(turns, blocks);
  for (uint32_t i = 0; i < blocks && !failure; ++i) {
    blockIdx = {turns[i] % grid[0], turns[i] / grid[0] % grid[1], turns[i] / grid[0] / grid[1]};
    run_block(dynamic);
  }
  free(turns);
  leave(buffer_count, !failure, cells_bytes, cells);
  snprintf(text, text_bytes, "%s", failure_text);
  return failure;
}
