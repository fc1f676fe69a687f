// Preloaded into a process (LD_PRELOAD): tensors on the CPU get their memory as PyTorch's
// CUDACachingAllocator gives memory on a GPU. Best fit by size, then address; what is too large is
// split, neighbours that are free are joined; small and large ones are apart, in segments that are
// never given back.

#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <set>

namespace {

constexpr size_t kGrain = 512, kMiB = 1 << 20, kAll = size_t{4} << 30;
// PyTorch asks for tensors' memory with this alignment, nobody else.
constexpr size_t kTensors = 64;

struct Block {
  size_t size;
  uintptr_t start;
  Block *before, *after;
  bool used, small;
};

struct BySize {
  bool operator()(const Block *a, const Block *b) const {
    return a->size != b->size ? a->size < b->size : a->start < b->start;
  }
};

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
uintptr_t first = 0, top = 0;
std::set<Block *, BySize> *unused[2];
std::map<uintptr_t, Block *> *held;

template <class Function>
Function next(const char *name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

void set_up() {
  void *all = mmap(nullptr, kAll, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  first = top = reinterpret_cast<uintptr_t>(all);
  unused[0] = new std::set<Block *, BySize>;
  unused[1] = new std::set<Block *, BySize>;
  held = new std::map<uintptr_t, Block *>;
}

size_t segment(size_t size, bool small) {
  if (small) return 2 * kMiB;
  return size < 10 * kMiB ? 20 * kMiB : (size + 2 * kMiB - 1) / (2 * kMiB) * (2 * kMiB);
}

uintptr_t take(size_t size) {
  size = size < kGrain ? kGrain : (size + kGrain - 1) / kGrain * kGrain;
  const bool small = size <= kMiB;
  auto &pool = *unused[small];
  Block wanted{size, 0, nullptr, nullptr, false, small};
  Block *block;
  if (auto found = pool.lower_bound(&wanted); found != pool.end()) {
    block = *found;
    pool.erase(found);
  } else {
    const size_t whole = segment(size, small);
    if (top + whole > first + kAll) abort();
    block = new Block{whole, top, nullptr, nullptr, false, small};
    top += whole;
  }
  const size_t rest = block->size - size;
  if (small ? rest >= kGrain : rest > kMiB) {
    auto *other = new Block{rest, block->start + size, block, block->after, false, small};
    if (block->after) block->after->before = other;
    block->after = other;
    block->size = size;
    pool.insert(other);
  }
  block->used = true;
  (*held)[block->start] = block;
  return block->start;
}

void join(Block *block, Block *after) {
  block->size += after->size;
  block->after = after->after;
  if (after->after) after->after->before = block;
  delete after;
}

void give_back(uintptr_t start) {
  auto found = held->find(start);
  Block *block = found->second;
  held->erase(found);
  block->used = false;
  auto &pool = *unused[block->small];
  if (Block *after = block->after; after && !after->used) {
    pool.erase(after);
    join(block, after);
  }
  if (Block *before = block->before; before && !before->used) {
    pool.erase(before);
    join(before, block);
    block = before;
  }
  pool.insert(block);
}

}  // namespace

extern "C" int posix_memalign(void **out, size_t alignment, size_t size) {
  if (alignment != kTensors) {
    static auto original = next<int (*)(void **, size_t, size_t)>("posix_memalign");
    return original(out, alignment, size);
  }
  pthread_mutex_lock(&mutex);
  if (!first) set_up();
  *out = reinterpret_cast<void *>(take(size));
  pthread_mutex_unlock(&mutex);
  return 0;
}

extern "C" void free(void *pointer) {
  const auto start = reinterpret_cast<uintptr_t>(pointer);
  if (!first || start < first || start >= first + kAll) {
    static auto original = next<void (*)(void *)>("free");
    original(pointer);
    return;
  }
  pthread_mutex_lock(&mutex);
  give_back(start);
  pthread_mutex_unlock(&mutex);
}
