// CUDA's barriers, warp functions, atomics, loads, fast mathematics and bit casts.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "race_check.h"
#include "scheduler.h"
#include "warp_functions.h"

inline void __syncthreads(CUSIM_SITE) { cusim::block_barrier(cusim::Count::none, false, "__syncthreads", site); }
inline int __syncthreads_count(int vote, CUSIM_SITE) {
  return cusim::block_barrier(cusim::Count::sum, vote != 0, "__syncthreads_count", site);
}
inline int __syncthreads_and(int vote, CUSIM_SITE) {
  return cusim::block_barrier(cusim::Count::all, vote != 0, "__syncthreads_and", site);
}
inline int __syncthreads_or(int vote, CUSIM_SITE) {
  return cusim::block_barrier(cusim::Count::any, vote != 0, "__syncthreads_or", site);
}
inline void __threadfence_block() {}
inline void __threadfence() { cusim::race::note_fence(); }
inline void __threadfence_system() { cusim::race::note_fence(); }
[[noreturn]] inline void __trap(CUSIM_SITE) { cusim::fail("__trap at %s:%d", site.file, site.line); }

// Threads change only where they wait, so that a plain read and write are atomic. Not inlined, for the return address.
namespace cusim {
template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T update(T* address, const F& next, const void* pc) {
  race::note(race::Access::atomic, address, sizeof(T), pc);
  const T old = *address;
  *address = static_cast<T>(next(old));
  return old;
}
}  // namespace cusim

#define CUSIM_ATOMIC(name, expression)                                                               \
  template <class T>                                                                                 \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* address, std::common_type_t<T> value) { \
    return cusim::update(                                                                            \
        address, [value](T old) __attribute__((no_sanitize("thread"))) { return expression; },       \
        __builtin_return_address(0));                                                                \
  }
CUSIM_ATOMIC(atomicAdd, old + value)
CUSIM_ATOMIC(atomicSub, old - value)
CUSIM_ATOMIC(atomicMin, old < value ? old : value)
CUSIM_ATOMIC(atomicMax, old > value ? old : value)
CUSIM_ATOMIC(atomicAnd, old& value)
CUSIM_ATOMIC(atomicOr, old | value)
CUSIM_ATOMIC(atomicXor, old ^ value)
CUSIM_ATOMIC(atomicExch, value)
CUSIM_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
#undef CUSIM_ATOMIC
template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* address, std::common_type_t<T> expected,
                                                             std::common_type_t<T> value) {
  return cusim::update(
      address, [=](T old) __attribute__((no_sanitize("thread"))) { return old == expected ? value : old; },
      __builtin_return_address(0));
}

template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcg(T* to, const T& value) {
  *to = value;
}
template <class T>
void __stcs(T* to, const T& value) {
  *to = value;
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return a < b ? static_cast<std::common_type_t<A, B>>(a) : b;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a > b ? static_cast<std::common_type_t<A, B>>(a) : b;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }

namespace cusim {
template <class To, class From>
To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "other sizes have no common bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace cusim
inline int __float_as_int(float x) { return cusim::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return cusim::same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return cusim::same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return cusim::same_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cusim::same_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cusim::same_bits<double>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
