/* What the compiled kernels call beside the barriers: the hooks before their accesses, and the
 * conversions of narrow floats. */
#pragma once
#include "memory.h"

/* Ranges are copies of structures, which a machine makes in parts: their alignment is not known. */
#define HOOK(n)                                                                                    \
  void __tsan_read##n(void *p) { touch(p, n, LOAD, true); }                                        \
  void __tsan_write##n(void *p) { touch(p, n, STORE, true); }                                      \
  void __tsan_unaligned_read##n(void *p) { touch(p, n, LOAD, true); }                              \
  void __tsan_unaligned_write##n(void *p) { touch(p, n, STORE, true); }                            \
  void __tsan_volatile_read##n(void *p) { touch(p, n, LOAD, true); }                               \
  void __tsan_volatile_write##n(void *p) { touch(p, n, STORE, true); }                             \
  void __tsan_read##n##_pc(void *p, void *) { touch(p, n, LOAD, true); }                           \
  void __tsan_write##n##_pc(void *p, void *) { touch(p, n, STORE, true); }
extern "C" {
HOOK(1)
HOOK(2)
HOOK(4)
HOOK(8)
HOOK(16)
void __tsan_read_range(void *p, size_t n) { touch(p, n, LOAD, false); }
void __tsan_write_range(void *p, size_t n) { touch(p, n, STORE, false); }
void __tsan_init() {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
void *__tsan_memcpy(void *to, const void *from, size_t n) {
  touch(const_cast<void *>(from), n, LOAD, false), touch(to, n, STORE, false);
  return memcpy(to, from, n);
}
void *__tsan_memmove(void *to, const void *from, size_t n) {
  touch(const_cast<void *>(from), n, LOAD, false), touch(to, n, STORE, false);
  return memmove(to, from, n);
}
void *__tsan_memset(void *to, int value, size_t n) {
  touch(to, n, STORE, false);
  return memset(to, value, n);
}
}

/* float <-> half, rounding to nearest, ties to even; subnormal numbers, infinities and NaNs as the
 * hardware has them. */
extern "C" uint16_t lnt_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x33000000) return uint16_t(sign);
  uint32_t drop = 13, fraction = magnitude - (112u << 23);
  if (magnitude < 0x38800000)
    drop = 126 - (magnitude >> 23), fraction = (magnitude & 0x7fffff) | 0x800000;
  uint32_t kept = fraction >> drop, rest = fraction & ((1u << drop) - 1), half = 1u << (drop - 1);
  return uint16_t(sign | (kept + (rest > half || (rest == half && kept & 1))));
}
extern "C" float lnt_from_half(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31,
           fraction = half & 0x3ff, bits;
  if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
  else if (exponent) bits = sign | (exponent + 112) << 23 | fraction << 13;
  else {
    float magnitude = float(fraction) * 0x1p-24f;
    memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
extern "C" uint16_t lnt_to_bfloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
