/* What the threads of a launch may touch, and who touched it last.
 *
 * The kernel is compiled with -fsanitize=thread, which puts a call before every load and store; the
 * calls end up here instead of in the sanitizer's library. Each access is looked up in the launch's
 * buffers (their copies lie in an arena with guard zones around each, so that what is next to a
 * buffer is nobody's), checked for its alignment as the hardware does, and compared with the last
 * accesses to the same bytes.
 *
 * Time is counted in phases: a new block and every barrier of a block begin one. Two accesses of
 * different threads of a block are in a defined order when their phases differ; within a phase only
 * when a collective of their warp lies between them, which a counter per warp tells.
 */
#pragma once
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum Kind { FINE, BOUNDS, MISALIGNED, RACE, BARRIER, INTERNAL }; /* ERRORS in __init__.py */
enum Use { LOAD, STORE, ATOMIC };

struct Cell { /* the shadow of a granule: its last store, its loads since */
  uint32_t write, write_stamp, read, first_read, read_stamp;
  uint16_t writer, reader;
};
/* SEVERAL | warp: all in one warp. */
enum : uint16_t { BY_ATOMIC = 0x8000, ONE = 0x3ff, SEVERAL = 0x400, MIXED = 0xffff };

struct Buffer { /* _Buffer in __init__.py */
  const char *name;
  char *data;
  uint64_t bytes, granule; /* of the shadow: the size of an element */
  uint64_t pending;        /* the kernel before this one may still be writing it */
  uint64_t loaded, stored, loads, stores, widest;
  char *low;
  Cell *cells;
};

struct Array { /* a __shared__ array; translate.py writes the table */
  const char *name;
  unsigned offset, bytes;
};

struct Warp {
  uint32_t clock, all;   /* collectives so far; the last one of all lanes */
  uint32_t pair[32][32]; /* the last one of two lanes, when it was not one of all */
  uint32_t exists, waiting, live;
};

struct Index {
  unsigned x, y, z;
};

struct Thread;
static Thread *me;
static Warp *my_warp;
static uint32_t my_id;              /* in the block */
static uint32_t phase, block_phase; /* now; when the block began */
/* The kernel before this one has not ended yet; which threads have waited for that. */
static bool early, waited[1024];
/* Accesses left before a thread that does not come to a barrier is taken for one that spins. */
static uint64_t patience;
static char *my_stack, *stacks;
static size_t stack_bytes, stacks_bytes;

[[noreturn]] static void fail(Kind kind, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static const char *thread_name(uint32_t id);

/* The arena: guard, buffer, guard, buffer, ... A page of the table names the nearest buffer. */
enum : size_t { PAGE = 1 << 16, GUARD = 1 << 20 };
enum : size_t { SHARED_PAGE = 256, SHARED_BYTES = 1 << 20, DYNAMIC = SHARED_BYTES / 2 };
static char *arena, *shared;
static size_t arena_bytes;
static uint16_t *pages, shared_pages[SHARED_BYTES / SHARED_PAGE];
static Buffer *buffers, shared_buffers[4096];
static Cell *shared_cells;

static inline bool ordered_in_warp(uint32_t other, uint32_t stamp) {
  return other / 32 == my_id / 32 &&
         (stamp < my_warp->all || stamp < my_warp->pair[my_id % 32][other % 32]);
}

static inline bool loads_are_past(const Cell &cell) {
  if (cell.reader == my_id) return true;
  if (cell.reader == MIXED) return false;
  if (cell.reader & SEVERAL)
    return uint32_t(cell.reader & 31) == my_id / 32 && cell.read_stamp < my_warp->all;
  return ordered_in_warp(cell.reader, cell.read_stamp);
}

static const char *const verbs[] = {"load", "store", "atomic update"};

static void race(const Buffer &b, const char *address, size_t size, Use use, bool with_load,
                 bool other_block, uint32_t other) {
  char who[160];
  if (other_block) snprintf(who, sizeof who, "another block, which nothing orders");
  else if (with_load && other & SEVERAL)
    snprintf(who, sizeof who, "several threads of the block, and no barrier lies between");
  else
    snprintf(who, sizeof who, "thread %s of the block, and no barrier lies between",
             thread_name(other & ONE));
  fail(RACE, "%s of %zu bytes at offset %td of %s races with a %s by %s", verbs[use], size,
       address - b.low, b.name, with_load ? "load" : "store", who);
}

static inline void note(const Buffer &b, Cell &cell, const char *address, size_t size, Use use,
                        bool global) {
  if (cell.write && !(use == ATOMIC && cell.writer & BY_ATOMIC)) {
    uint32_t other = cell.writer & ONE;
    if (cell.write == phase) {
      if (other != my_id && !ordered_in_warp(other, cell.write_stamp))
        race(b, address, size, use, false, false, other);
    } else if (global && cell.write < block_phase) {
      race(b, address, size, use, false, true, 0);
    }
  }
  if (use == LOAD) {
    if (!cell.first_read) cell.first_read = phase;
    uint32_t by = cell.reader & SEVERAL ? cell.reader & 31 : cell.reader / 32u;
    bool own_warp = cell.reader != MIXED && by == my_id / 32;
    if (cell.read != phase || cell.reader == my_id || (own_warp && cell.read_stamp < my_warp->all))
      cell.reader = uint16_t(my_id); /* earlier loads of the warp are past for all its lanes */
    else cell.reader = own_warp ? uint16_t(SEVERAL | my_id / 32) : uint16_t(MIXED);
    cell.read = phase;
    cell.read_stamp = my_warp->clock;
    return;
  }
  if (global && cell.first_read && cell.first_read < block_phase)
    race(b, address, size, use, true, true, 0);
  if (cell.read == phase && !loads_are_past(cell))
    race(b, address, size, use, true, false, cell.reader);
  cell.write = phase;
  cell.write_stamp = my_warp->clock;
  cell.writer = uint16_t(my_id | (use == ATOMIC ? BY_ATOMIC : 0));
}

static void check(Buffer &b, char *address, size_t size, Use use, bool whole, bool global) {
  if (address < b.low || address + size > b.low + b.bytes)
    fail(BOUNDS, "%s of %zu bytes at offset %td of %s, which has %llu bytes", verbs[use], size,
         address - b.low, b.name, (unsigned long long)b.bytes);
  if (whole && (uintptr_t)address & (size - 1))
    fail(MISALIGNED,
         "%s of %zu bytes at offset %td of %s, at an address that is no multiple of %zu",
         verbs[use], size, address - b.low, b.name, size);
  if (global && early && !waited[my_id] && (use != LOAD || b.pending))
    fail(RACE,
         "%s of %zu bytes at offset %td of %s races with the kernel before this one, for whose end "
         "the thread has not waited",
         verbs[use], size, address - b.low, b.name);
  if (use != STORE) b.loaded += size, ++b.loads;
  if (use != LOAD) b.stored += size, ++b.stores;
  if (size > b.widest) b.widest = size;
  if (!--patience) fail(BARRIER, "a deadlock: the thread spins on %s", b.name);
  size_t last = size_t(address + size - 1 - b.low) / b.granule;
  for (size_t i = size_t(address - b.low) / b.granule; i <= last; ++i)
    note(b, b.cells[i], address, size, use, global);
}

static void elsewhere(char *address, size_t size, Use use) {
  Dl_info info;
  /* A constant of the kernel's, or the emulator's own. */
  if (dladdr(address, &info) && info.dli_fname) return;
  fail(BOUNDS, "%s of %zu bytes at %p, outside of all buffers", verbs[use], size, (void *)address);
}

/* `whole`: one machine access of a power of two, which must be aligned. */
static inline void touch(void *p, size_t size, Use use, bool whole) {
  char *address = (char *)p;
  if (size_t(address - my_stack) < stack_bytes || !me) return;
  if (size_t(address - arena) < arena_bytes)
    check(buffers[pages[size_t(address - arena) / PAGE]], address, size, use, whole, true);
  else if (size_t(address - shared) < SHARED_BYTES)
    check(shared_buffers[shared_pages[size_t(address - shared) / SHARED_PAGE]], address, size, use,
          whole, false);
  else if (size_t(address - stacks) < stacks_bytes)
    fail(BOUNDS, "%s of %zu bytes in the local memory of another thread, or beyond its own",
         verbs[use], size);
  else elsewhere(address, size, use);
}

static char *reserve(size_t bytes) {
  void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : (char *)p;
}

static size_t up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

/* Copies the tensors into a fresh arena; its shadow is fresh too. */
static bool enter(Buffer *list, int count, size_t &cells_bytes, Cell *&cells) {
  arena_bytes = GUARD, cells_bytes = sizeof(Cell);
  for (int i = 0; i < count; ++i) {
    arena_bytes += up(list[i].bytes + 256, PAGE) + GUARD;
    cells_bytes += (list[i].bytes / list[i].granule + 2) * sizeof(Cell);
  }
  arena = reserve(arena_bytes), cells = (Cell *)reserve(cells_bytes);
  pages = (uint16_t *)reserve(arena_bytes / PAGE * sizeof *pages);
  if (!arena || !cells || !pages) return false;
  buffers = list;
  size_t at = GUARD, page = 0;
  Cell *cell = cells;
  for (int i = 0; i < count; ++i) {
    Buffer &b = list[i];
    b.low = arena + at + (uintptr_t)b.data % 256;
    b.cells = cell;
    cell += b.bytes / b.granule + 2;
    at += up(b.bytes + 256, PAGE) + GUARD;
    memcpy(b.low, b.data, b.bytes);
    size_t end = i + 1 < count ? at - GUARD / 2 : arena_bytes;
    for (; page < end / PAGE; ++page) pages[page] = uint16_t(i);
  }
  return true;
}

static void leave(int count, bool copy, size_t cells_bytes, Cell *cells) {
  for (int i = 0; copy && i < count; ++i)
    if (buffers[i].stores) memcpy(buffers[i].data, buffers[i].low, buffers[i].bytes);
  if (pages) munmap(pages, arena_bytes / PAGE * sizeof *pages);
  if (cells) munmap(cells, cells_bytes);
  if (arena) munmap(arena, arena_bytes);
  arena = nullptr, pages = nullptr, arena_bytes = 0;
}

static Buffer buffer_in_shared(const char *name, size_t offset, size_t bytes) {
  return {name, nullptr, bytes, 1, 0, 0, 0, 0, 0, 0, shared + offset, shared_cells + offset};
}

/* The shared memory of a block: the kernel's arrays each between guards, then what the launch asks
 * for. */
static size_t shared_used;
static bool lay_out_shared(const Array *arrays, size_t dynamic) {
  static char names[4096][64];
  size_t page = 0;
  int i = 0;
  shared_used = 0;
  for (; arrays[i].name; ++i) {
    if (i >= 4094 || arrays[i].offset + arrays[i].bytes + SHARED_PAGE > DYNAMIC) return false;
    snprintf(names[i], sizeof names[i], "shared memory %s", arrays[i].name);
    shared_used = arrays[i].offset + arrays[i].bytes;
    shared_buffers[i] = buffer_in_shared(names[i], arrays[i].offset, arrays[i].bytes);
    for (size_t end = arrays[i + 1].name ? arrays[i + 1].offset : DYNAMIC - PAGE;
         page < end / SHARED_PAGE; ++page)
      shared_pages[page] = uint16_t(i);
  }
  shared_buffers[i] = buffer_in_shared("dynamic shared memory", DYNAMIC, dynamic);
  for (; page < SHARED_BYTES / SHARED_PAGE; ++page) shared_pages[page] = uint16_t(i);
  return DYNAMIC + dynamic + PAGE <= SHARED_BYTES;
}

static void poison_shared(size_t dynamic) {
  memset(shared, 0xff, shared_used);
  memset(shared + DYNAMIC, 0xff, dynamic);
}
