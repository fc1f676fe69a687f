/* How long blocks of threads take to hear from each other: what decides whether a kernel that stays
 * on the multiprocessors for a whole sequence can pay (roundtrips.py has the launches).
 *
 * Each kernel makes `rows` round trips, block 0 writes the clock cycles they took to out[0], or -1
 * where a wait was given up. Flags are zero before a launch and after it. The emulator, whose blocks
 * run one after another, sees kernels that only write.
 */
#ifdef __CUDACC__
#define REAL 1
#else
#define REAL 0
#endif
#if REAL && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CLUSTER(n) __cluster_dims__(n, 1, 1)
#define CLUSTER_BARRIER                                                                            \
  asm volatile("barrier.cluster.arrive.release.aligned;\n"                                         \
               "barrier.cluster.wait.acquire.aligned;" ::: "memory")
#define CLUSTERS 1
#else
#define CLUSTER(n)
#define CLUSTER_BARRIER
#define CLUSTERS 0
#endif
#define POLLS (1 << 20)

#if REAL
static __device__ unsigned load_global(const unsigned *at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
static __device__ void store_global(unsigned *at, unsigned value) {
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}
static __device__ bool reaches(const unsigned *at, unsigned value) {
  for (int polls = 0; polls < POLLS; ++polls)
    if (load_global(at) >= value) return true;
  return false;
}
#endif

/* Nothing: what a node of a graph takes. */
extern "C" __global__ void __launch_bounds__(32)
    empty_node(long long *out, unsigned *flags, long long rows) {}

/* Every block of a cluster of 8 waits for all others. */
extern "C" CLUSTER(8) __global__ void __launch_bounds__(128)
    cluster_barrier(long long *out, unsigned *flags, long long rows) {
#if CLUSTERS
  long long begun = clock64();
  for (long long i = 0; i < rows; ++i) CLUSTER_BARRIER;
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = clock64() - begun;
#else
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = REAL ? -1 : rows;
#endif
}

/* Two blocks of a cluster send a number back and forth through distributed shared memory. */
extern "C" CLUSTER(2) __global__ void __launch_bounds__(32)
    distributed_shared(long long *out, unsigned *flags, long long rows) {
#if CLUSTERS
  __shared__ unsigned box;
  if (threadIdx.x == 0) box = 0;
  CLUSTER_BARRIER; /* the other block's box is there */
  if (threadIdx.x == 0) {
    unsigned here = (unsigned)__cvta_generic_to_shared(&box), there, seen = 0;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(1 - blockIdx.x % 2));
    bool first = blockIdx.x % 2 == 0, whole = true;
    long long begun = clock64();
    for (unsigned i = 1; whole && i <= rows; ++i) {
      if (first)
        asm volatile("st.release.cluster.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(i)
                     : "memory");
      int polls = 0;
      do
        asm volatile("ld.acquire.cluster.shared::cta.u32 %0, [%1];"
                     : "=r"(seen) : "r"(here) : "memory");
      while (seen < i && ++polls < POLLS);
      whole = seen >= i;
      if (!first)
        asm volatile("st.release.cluster.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(i)
                     : "memory");
    }
    if (blockIdx.x == 0) out[0] = whole ? clock64() - begun : -1;
  }
  __syncwarp();
  CLUSTER_BARRIER; /* nobody writes to a block that is gone */
#else
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = REAL ? -1 : rows;
#endif
}

/* Two blocks send a number back and forth through the L2 cache. */
extern "C" __global__ void __launch_bounds__(32)
    l2_flag(long long *out, unsigned *flags, long long rows) {
#if REAL
  if (threadIdx.x) return;
  unsigned *mine = flags + 32 * blockIdx.x, *other = flags + 32 * (1 - blockIdx.x);
  bool whole = true;
  long long begun = clock64();
  for (unsigned i = 1; whole && i <= rows; ++i) {
    if (blockIdx.x == 0) store_global(other, i);
    whole = reaches(mine, i);
    if (blockIdx.x == 1) store_global(other, i);
  }
  if (blockIdx.x == 0) { /* the other has written its last */
    out[0] = whole ? clock64() - begun : -1;
    store_global(mine, 0), store_global(other, 0);
  }
#else
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = rows;
#endif
}

/* All blocks wait for all others by a counter in the L2 cache. */
extern "C" __global__ void __launch_bounds__(32)
    grid_barrier(long long *out, unsigned *flags, long long rows) {
#if REAL
  if (threadIdx.x) return;
  bool whole = true;
  long long begun = clock64();
  for (unsigned i = 1; whole && i <= rows; ++i) {
    __threadfence();
    atomicAdd(flags, 1u);
    whole = reaches(flags, i * gridDim.x);
  }
  if (blockIdx.x == 0) out[0] = whole ? clock64() - begun : -1;
  if (atomicAdd(flags + 32, 1u) == gridDim.x - 1) flags[0] = flags[32] = 0; /* the last to leave */
#else
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = rows;
#endif
}
