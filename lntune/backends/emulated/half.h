/* half and nv_bfloat16 with their pairs, in software. Every operation is done in float and rounded
 * once, to nearest, ties to even, which gives the bits the hardware gives: a float has more than
 * twice the digits of either type.
 */
#pragma once

#define LNT_NARROW(name, to, from)                                                                 \
  struct alignas(2) name {                                                                         \
    uint16_t bits;                                                                                 \
    name() = default;                                                                              \
    name(const name &o) : bits(o.bits) {}                                                          \
    name(const volatile name &o) : bits(o.bits) {}                                                 \
    LNT_HIDDEN name(float value) : bits(to(value)) {}                                              \
    LNT_HIDDEN name(double value) : bits(to(float(value))) {}                                      \
    LNT_HIDDEN name(int value) : bits(to(float(value))) {}                                         \
    LNT_HIDDEN name(unsigned value) : bits(to(float(value))) {}                                    \
    LNT_HIDDEN name(long value) : bits(to(float(value))) {}                                        \
    LNT_HIDDEN name(unsigned long value) : bits(to(float(value))) {}                               \
    LNT_HIDDEN name(long long value) : bits(to(float(value))) {}                                   \
    LNT_HIDDEN name(short value) : bits(to(float(value))) {}                                       \
    name &operator=(const name &o) {                                                               \
      bits = o.bits;                                                                               \
      return *this;                                                                                \
    }                                                                                              \
    void operator=(const name &o) volatile { bits = o.bits; }                                      \
    operator float() const { return from(bits); }                                                  \
    operator float() const volatile { return from(bits); }                                         \
    name operator+() const { return *this; }                                                       \
    name operator-() const {                                                                       \
      name r;                                                                                      \
      r.bits = bits ^ 0x8000;                                                                      \
      return r;                                                                                    \
    }                                                                                              \
    name &operator+=(const name &o) { return *this = name(float(*this) + float(o)); }              \
    name &operator-=(const name &o) { return *this = name(float(*this) - float(o)); }              \
    name &operator*=(const name &o) { return *this = name(float(*this) * float(o)); }              \
    name &operator/=(const name &o) { return *this = name(float(*this) / float(o)); }              \
  };                                                                                               \
  inline name operator+(const name &a, const name &b) { return name(float(a) + float(b)); }        \
  inline name operator-(const name &a, const name &b) { return name(float(a) - float(b)); }        \
  inline name operator*(const name &a, const name &b) { return name(float(a) * float(b)); }        \
  inline name operator/(const name &a, const name &b) { return name(float(a) / float(b)); }        \
  inline bool operator==(const name &a, const name &b) { return float(a) == float(b); }            \
  inline bool operator!=(const name &a, const name &b) { return float(a) != float(b); }            \
  inline bool operator<(const name &a, const name &b) { return float(a) < float(b); }              \
  inline bool operator>(const name &a, const name &b) { return float(a) > float(b); }              \
  inline bool operator<=(const name &a, const name &b) { return float(a) <= float(b); }            \
  inline bool operator>=(const name &a, const name &b) { return float(a) >= float(b); }            \
  inline name __hadd(name a, name b) { return a + b; }                                             \
  inline name __hsub(name a, name b) { return a - b; }                                             \
  inline name __hmul(name a, name b) { return a * b; }                                             \
  inline name __hdiv(name a, name b) { return a / b; }                                             \
  inline name __hfma(name a, name b, name c) {                                                     \
    return name(float(double(float(a)) * float(b) + float(c)));                                    \
  }                                                                                                \
  inline name __hneg(name a) { return -a; }                                                        \
  inline name __habs(name a) { return name(fabsf(float(a))); }                                     \
  inline bool __hgt(name a, name b) { return a > b; }                                              \
  inline bool __hge(name a, name b) { return a >= b; }                                             \
  inline bool __hlt(name a, name b) { return a < b; }                                              \
  inline bool __hle(name a, name b) { return a <= b; }                                             \
  inline bool __heq(name a, name b) { return a == b; }                                             \
  inline bool __hne(name a, name b) { return a != b; }                                             \
  inline bool __hisnan(name a) { return __builtin_isnan(float(a)); }                               \
  inline name __hmax(name a, name b) { return name(fmaxf(float(a), float(b))); }                   \
  inline name __hmin(name a, name b) { return name(fminf(float(a), float(b))); }                   \
  inline name hexp(name a) { return name(expf(float(a))); }                                        \
  inline name hexp2(name a) { return name(exp2f(float(a))); }                                      \
  inline name hexp10(name a) { return name(exp10f(float(a))); }                                    \
  inline name hlog(name a) { return name(logf(float(a))); }                                        \
  inline name hlog2(name a) { return name(log2f(float(a))); }                                      \
  inline name hlog10(name a) { return name(log10f(float(a))); }                                    \
  inline name hsqrt(name a) { return name(sqrtf(float(a))); }                                      \
  inline name hrsqrt(name a) { return name(rsqrtf(float(a))); }                                    \
  inline name hrcp(name a) { return name(1.0f / float(a)); }                                       \
  inline name hsin(name a) { return name(sinf(float(a))); }                                        \
  inline name hcos(name a) { return name(cosf(float(a))); }                                        \
  inline name htanh(name a) { return name(tanhf(float(a))); }                                      \
  inline name hfloor(name a) { return name(floorf(float(a))); }                                    \
  inline name hceil(name a) { return name(ceilf(float(a))); }                                      \
  inline name htrunc(name a) { return name(truncf(float(a))); }                                    \
  inline name hrint(name a) { return name(rintf(float(a))); }

inline float lnt_from_bfloat(uint16_t bits) { return lnt_bits<float>(uint32_t(bits) << 16); }
LNT_NARROW(__half, lnt_to_half, lnt_from_half)
LNT_NARROW(__nv_bfloat16, lnt_to_bfloat, lnt_from_bfloat)
typedef __half half;
typedef __nv_bfloat16 nv_bfloat16;

#define LNT_PAIR(name, T)                                                                          \
  struct alignas(4) name {                                                                         \
    T x, y;                                                                                        \
    name() = default;                                                                              \
    LNT_HIDDEN name(T x, T y) : x(x), y(y) {}                                                      \
    LNT_COPIES(name, lnt_raw4, 1)                                                                  \
  };                                                                                               \
  inline name operator+(const name &a, const name &b) { return name(a.x + b.x, a.y + b.y); }       \
  inline name operator-(const name &a, const name &b) { return name(a.x - b.x, a.y - b.y); }       \
  inline name operator*(const name &a, const name &b) { return name(a.x * b.x, a.y * b.y); }       \
  inline name operator/(const name &a, const name &b) { return name(a.x / b.x, a.y / b.y); }       \
  inline name __hadd2(name a, name b) { return a + b; }                                            \
  inline name __hsub2(name a, name b) { return a - b; }                                            \
  inline name __hmul2(name a, name b) { return a * b; }                                            \
  inline name __hfma2(name a, name b, name c) {                                                    \
    return name(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));                                     \
  }                                                                                                \
  inline float __low2float(name a) { return float(a.x); }                                          \
  inline float __high2float(name a) { return float(a.y); }
LNT_PAIR(__half2, __half)
LNT_PAIR(__nv_bfloat162, __nv_bfloat16)
typedef __half2 half2;
typedef __nv_bfloat162 nv_bfloat162;

inline half2 make_half2(half x, half y) { return half2(x, y); }
inline half __float2half(float x) { return half(x); }
inline half __float2half_rn(float x) { return half(x); }
inline half __double2half(double x) { return half(x); }
inline half __int2half_rn(int x) { return half(x); }
inline float __half2float(half x) { return float(x); }
inline half2 __halves2half2(half x, half y) { return half2(x, y); }
inline half2 __half2half2(half x) { return half2(x, x); }
inline half2 __float2half2_rn(float x) { return half2(half(x), half(x)); }
inline half2 __floats2half2_rn(float x, float y) { return half2(half(x), half(y)); }
inline half2 __float22half2_rn(float2 x) { return half2(half(x.x), half(x.y)); }
inline float2 __half22float2(half2 x) { return float2(float(x.x), float(x.y)); }
inline half __low2half(half2 x) { return x.x; }
inline half __high2half(half2 x) { return x.y; }
inline unsigned short __half_as_ushort(half x) { return x.bits; }
inline short __half_as_short(half x) { return short(x.bits); }
LNT_HIDDEN inline half __ushort_as_half(unsigned short x) {
  half r;
  r.bits = x;
  return r;
}
inline nv_bfloat162 make_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return nv_bfloat162(x, y); }
inline nv_bfloat16 __float2bfloat16(float x) { return nv_bfloat16(x); }
inline nv_bfloat16 __float2bfloat16_rn(float x) { return nv_bfloat16(x); }
inline nv_bfloat16 __double2bfloat16(double x) { return nv_bfloat16(x); }
inline float __bfloat162float(nv_bfloat16 x) { return float(x); }
inline nv_bfloat162 __halves2bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return nv_bfloat162(x, y); }
inline nv_bfloat162 __bfloat162bfloat162(nv_bfloat16 x) { return nv_bfloat162(x, x); }
inline nv_bfloat162 __float2bfloat162_rn(float x) {
  return nv_bfloat162(nv_bfloat16(x), nv_bfloat16(x));
}
inline nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return nv_bfloat162(nv_bfloat16(x), nv_bfloat16(y));
}
inline nv_bfloat162 __float22bfloat162_rn(float2 x) {
  return nv_bfloat162(nv_bfloat16(x.x), nv_bfloat16(x.y));
}
inline float2 __bfloat1622float2(nv_bfloat162 x) { return float2(float(x.x), float(x.y)); }
inline nv_bfloat16 __low2bfloat16(nv_bfloat162 x) { return x.x; }
inline nv_bfloat16 __high2bfloat16(nv_bfloat162 x) { return x.y; }
inline unsigned short __bfloat16_as_ushort(nv_bfloat16 x) { return x.bits; }
LNT_HIDDEN inline nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
  nv_bfloat16 r;
  r.bits = x;
  return r;
}
