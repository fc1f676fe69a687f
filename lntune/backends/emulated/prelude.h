/* CUDA's built-ins for kernels that run in the emulator. Included before the kernel, in place of
 * CUDA's own headers.
 *
 * Kept light: it is compiled with every kernel. What a copy of a vector type reads and writes must
 * be one access of its full width, so these types copy themselves as a whole; and their copies are
 * functions, so that a vector passed by value is seen too (the compiler does not instrument the
 * passing of structures).
 */
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __block_size__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__ /* accesses stay as they are written */
#define __restrict
#define __CUDA_ARCH__ 900
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 8
/* Functions whose own accesses are not the kernel's. */
#define LNT_HIDDEN __attribute__((no_sanitize("thread"), noinline))

struct lnt_index {
  unsigned x, y, z;
};
struct lnt_array {
  const char *name;
  unsigned offset, bytes;
};
/* Where the next array begins: a guard of 256 bytes at least lies between. */
constexpr unsigned lnt_after(unsigned end) { return (end + 511) / 256 * 256; }

template <int I, typename F> struct lnt_nth;
template <int I, typename R, typename A, typename... As>
struct lnt_nth<I, R(A, As...)> : lnt_nth<I - 1, R(As...)> {};
template <typename R, typename A, typename... As> struct lnt_nth<0, R(A, As...)> {
  typedef A type;
};
template <int I, typename F> using lnt_parameter = typename lnt_nth<I, F>::type;

extern "C" {
extern const lnt_index threadIdx, blockIdx, blockDim, gridDim;
extern char *const lnt_shared, *const lnt_dynamic_shared;
int lnt_barrier(int line, int gather, int value);
uint64_t lnt_collective(int line, int kind, uint32_t mask, uint64_t value, int argument, int width);
uint32_t lnt_activemask();
void lnt_atomic(void *p, size_t size);
void lnt_wait();
uint16_t lnt_to_half(float), lnt_to_bfloat(float);
float lnt_from_half(uint16_t);
int printf(const char *, ...);
void *memcpy(void *, const void *, size_t) noexcept;
void *memset(void *, int, size_t) noexcept;

/* clang-format off */
#define LNT_MATH1(name) float name##f(float) noexcept; double name(double) noexcept;
#define LNT_MATH2(name) float name##f(float, float) noexcept; double name(double, double) noexcept;
LNT_MATH1(sqrt) LNT_MATH1(exp) LNT_MATH1(exp2) LNT_MATH1(exp10) LNT_MATH1(expm1) LNT_MATH1(log)
LNT_MATH1(log2) LNT_MATH1(log10) LNT_MATH1(log1p) LNT_MATH1(sin) LNT_MATH1(cos) LNT_MATH1(tan)
LNT_MATH1(asin) LNT_MATH1(acos) LNT_MATH1(atan) LNT_MATH1(sinh) LNT_MATH1(cosh) LNT_MATH1(tanh)
LNT_MATH1(asinh) LNT_MATH1(acosh) LNT_MATH1(atanh) LNT_MATH1(erf) LNT_MATH1(erfc) LNT_MATH1(cbrt)
LNT_MATH1(floor) LNT_MATH1(ceil) LNT_MATH1(trunc) LNT_MATH1(round) LNT_MATH1(nearbyint)
LNT_MATH1(rint) LNT_MATH1(fabs) LNT_MATH2(pow) LNT_MATH2(fmod) LNT_MATH2(fmax) LNT_MATH2(fmin)
LNT_MATH2(atan2) LNT_MATH2(hypot) LNT_MATH2(copysign) LNT_MATH2(fdim)
/* clang-format on */
float fmaf(float, float, float) noexcept, ldexpf(float, int) noexcept;
double fma(double, double, double) noexcept, ldexp(double, int) noexcept;
}

/* Barriers and collectives. A call site is its line. */
#define __syncthreads() ((void)lnt_barrier(__LINE__, 0, 0))
#define __syncthreads_count(p) lnt_barrier(__LINE__, 1, !!(p))
#define __syncthreads_and(p) lnt_barrier(__LINE__, 2, !!(p))
#define __syncthreads_or(p) lnt_barrier(__LINE__, 3, !!(p))
#define __activemask() lnt_activemask()
#define __shfl_sync(...) lnt_shuffle<0>(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) lnt_shuffle<1>(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) lnt_shuffle<2>(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) lnt_shuffle<3>(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, p) unsigned(lnt_collective(__LINE__, 4, mask, !!(p), 0, 32))
#define __all_sync(mask, p) int(lnt_collective(__LINE__, 5, mask, !!(p), 0, 32))
#define __any_sync(mask, p) int(lnt_collective(__LINE__, 6, mask, !!(p), 0, 32))
#define __syncwarp(...) lnt_syncwarp(__LINE__, ##__VA_ARGS__)
inline void lnt_syncwarp(int line, unsigned mask = ~0u) { lnt_collective(line, 7, mask, 0, 0, 32); }
template <int KIND, typename T>
LNT_HIDDEN T lnt_shuffle(int line, unsigned mask, T value, long long argument, int width = 32) {
  static_assert(sizeof(T) <= 8, "a shuffle moves up to 8 bytes");
  uint64_t bits = 0;
  memcpy((void *)&bits, (const void *)&value, sizeof value);
  bits = lnt_collective(line, KIND, mask, bits, int(argument), width);
  memcpy((void *)&value, (const void *)&bits, sizeof value);
  return value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
inline void cudaGridDependencySynchronize() { lnt_wait(); }

/* Vectors. */
typedef uint16_t lnt_raw2 __attribute__((may_alias));
typedef uint32_t lnt_raw4 __attribute__((may_alias));
typedef uint64_t lnt_raw8 __attribute__((may_alias));
typedef float lnt_raw16 __attribute__((vector_size(16), may_alias));
#define LNT_COPIES(name, raw, parts)                                                               \
  name(const name &o) { lnt_copy<raw, parts>(this, &o); }                                          \
  name &operator=(const name &o) {                                                                 \
    lnt_copy<raw, parts>(this, &o);                                                                \
    return *this;                                                                                  \
  }
template <typename Raw, int PARTS> inline void lnt_copy(void *to, const void *from) {
  *(Raw *)to = *(const Raw *)from;
  if (PARTS > 1) ((Raw *)to)[PARTS - 1] = ((const Raw *)from)[PARTS - 1];
}
#define LNT_VECTOR2(name, T, raw, parts)                                                           \
  struct alignas(sizeof(raw)) name {                                                               \
    T x, y;                                                                                        \
    name() = default;                                                                              \
    LNT_HIDDEN name(T x, T y) : x(x), y(y) {}                                                      \
    LNT_COPIES(name, raw, parts)                                                                   \
  };                                                                                               \
  inline name make_##name(T x, T y) { return name(x, y); }
#define LNT_VECTOR3(name, T)                                                                       \
  struct name {                                                                                    \
    T x, y, z;                                                                                     \
  };                                                                                               \
  inline name make_##name(T x, T y, T z) { return name{x, y, z}; }
#define LNT_VECTOR4(name, T, raw, parts)                                                           \
  struct alignas(sizeof(raw)) name {                                                               \
    T x, y, z, w;                                                                                  \
    name() = default;                                                                              \
    LNT_HIDDEN name(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}                                \
    LNT_COPIES(name, raw, parts)                                                                   \
  };                                                                                               \
  inline name make_##name(T x, T y, T z, T w) { return name(x, y, z, w); }
#define LNT_VECTORS(name, T, raw2, raw4, parts)                                                    \
  struct name##1 { T x; };                                                                         \
  LNT_VECTOR2(name##2, T, raw2, 1)                                                                 \
  LNT_VECTOR3(name##3, T)                                                                          \
  LNT_VECTOR4(name##4, T, raw4, parts)
LNT_VECTORS(char, signed char, lnt_raw2, lnt_raw4, 1)
LNT_VECTORS(uchar, unsigned char, lnt_raw2, lnt_raw4, 1)
LNT_VECTORS(short, short, lnt_raw4, lnt_raw8, 1)
LNT_VECTORS(ushort, unsigned short, lnt_raw4, lnt_raw8, 1)
LNT_VECTORS(int, int, lnt_raw8, lnt_raw16, 1)
LNT_VECTORS(uint, unsigned, lnt_raw8, lnt_raw16, 1)
LNT_VECTORS(float, float, lnt_raw8, lnt_raw16, 1)
LNT_VECTORS(double, double, lnt_raw16, lnt_raw16, 2)
LNT_VECTORS(longlong, long long, lnt_raw16, lnt_raw16, 2)
LNT_VECTORS(ulonglong, unsigned long long, lnt_raw16, lnt_raw16, 2)
struct dim3 {
  unsigned x, y, z;
};

/* Loads and stores with a cache hint. */
#define LNT_LOADS(f)                                                                               \
  template <typename T> T f(const T *p) { return *p; }
#define LNT_STORES(f)                                                                              \
  template <typename T> void f(T *p, T value) { *p = value; }
/* clang-format off */
LNT_LOADS(__ldg) LNT_LOADS(__ldcg) LNT_LOADS(__ldca) LNT_LOADS(__ldcs) LNT_LOADS(__ldlu)
LNT_LOADS(__ldcv) LNT_STORES(__stwb) LNT_STORES(__stcg) LNT_STORES(__stcs) LNT_STORES(__stwt)

/* Atomic updates. Threads take turns, so a plain one will do. */
template <typename T> struct lnt_same { typedef T type; };
/* clang-format on */
#define LNT_ATOMIC(f, expression)                                                                  \
  template <typename T> LNT_HIDDEN T f(T *p, typename lnt_same<T>::type value) {                   \
    lnt_atomic((void *)p, sizeof *p);                                                              \
    T old = *p;                                                                                    \
    *p = T(expression);                                                                            \
    return old;                                                                                    \
  }
/* clang-format off */
LNT_ATOMIC(atomicAdd, old + value)
LNT_ATOMIC(atomicSub, old - value)
LNT_ATOMIC(atomicExch, value)
LNT_ATOMIC(atomicMin, value < old ? value : old)
LNT_ATOMIC(atomicMax, value > old ? value : old)
LNT_ATOMIC(atomicAnd, old & value)
LNT_ATOMIC(atomicOr, old | value)
LNT_ATOMIC(atomicXor, old ^ value)
LNT_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
/* clang-format on */
template <typename T>
LNT_HIDDEN T atomicCAS(T *p, typename lnt_same<T>::type expected,
                       typename lnt_same<T>::type value) {
  lnt_atomic((void *)p, sizeof *p);
  T old = *p;
  if (old == expected) *p = value;
  return old;
}

/* Arithmetic. The approximate forms are as exact here as their exact ones. */
#define LNT_MIN_MAX(T)                                                                             \
  inline T min(T a, T b) { return b < a ? b : a; }                                                 \
  inline T max(T a, T b) { return a < b ? b : a; }
/* clang-format off */
LNT_MIN_MAX(int) LNT_MIN_MAX(long) LNT_MIN_MAX(long long)
LNT_MIN_MAX(unsigned) LNT_MIN_MAX(unsigned long) LNT_MIN_MAX(unsigned long long)
/* clang-format on */
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
/* clang-format off */
#define LNT_FLOAT1(name) inline float name(float x) { return name##f(x); }
LNT_FLOAT1(sqrt) LNT_FLOAT1(exp) LNT_FLOAT1(exp2) LNT_FLOAT1(log) LNT_FLOAT1(log2) LNT_FLOAT1(sin)
LNT_FLOAT1(cos) LNT_FLOAT1(tanh) LNT_FLOAT1(erf) LNT_FLOAT1(floor) LNT_FLOAT1(ceil) LNT_FLOAT1(fabs)
/* clang-format on */
inline float pow(float x, float y) { return powf(x, y); }
inline int abs(int x) { return x < 0 ? -x : x; }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
/* clang-format off */
#define LNT_ALIAS1(alias, f) inline float alias(float x) { return f(x); }
LNT_ALIAS1(__expf, expf) LNT_ALIAS1(__exp2f, exp2f) LNT_ALIAS1(__exp10f, exp10f)
LNT_ALIAS1(__logf, logf) LNT_ALIAS1(__log2f, log2f) LNT_ALIAS1(__log10f, log10f)
LNT_ALIAS1(__sinf, sinf) LNT_ALIAS1(__cosf, cosf) LNT_ALIAS1(__tanf, tanf)
LNT_ALIAS1(__tanhf, tanhf) LNT_ALIAS1(__fsqrt_rn, sqrtf) LNT_ALIAS1(__frsqrt_rn, rsqrtf)
/* clang-format on */
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __saturatef(float x) { return fminf(fmaxf(x, 0.0f), 1.0f); }
template <typename To, typename From> LNT_HIDDEN To lnt_bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy((void *)&to, (const void *)&value, sizeof to);
  return to;
}
inline int __float_as_int(float x) { return lnt_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return lnt_bits<unsigned>(x); }
inline float __int_as_float(int x) { return lnt_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return lnt_bits<float>(x); }
inline long long __double_as_longlong(double x) { return lnt_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return lnt_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((uint64_t(x) * y) >> 32); }
inline int __mulhi(int x, int y) { return int((int64_t(x) * y) >> 32); }
inline int __float2int_rn(float x) { return int(rintf(x)); }
inline float __int2float_rn(int x) { return float(x); }
#define isnan(x) __builtin_isnan(x)
#define isinf(x) __builtin_isinf(x)
#define isfinite(x) __builtin_isfinite(x)
#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_INF __builtin_inf()
#define CUDART_NAN __builtin_nan("")

#include "half.h"
