#include "common/cpu/kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pixcontrast::cpu {

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors never cross a call that is not inlined

#if defined(__x86_64__)
#define PIXCONTRAST_TARGET \
  __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,prefer-vector-width=512")))
#define PIXCONTRAST_BYTES 64
#define PIXCONTRAST_REGISTERS 32
namespace avx512 {
PIXCONTRAST_TARGET inline void stream(float* to, __m512 value) { _mm512_stream_ps(to, value); }
PIXCONTRAST_TARGET inline void stream(double* to, __m512d value) { _mm512_stream_pd(to, value); }
#include "common/cpu/pair_kernels_impl.h"  // and row_kernels_impl.h
}  // namespace avx512
#undef PIXCONTRAST_TARGET
#undef PIXCONTRAST_BYTES
#undef PIXCONTRAST_REGISTERS

#define PIXCONTRAST_TARGET __attribute__((target("avx2,fma")))
#define PIXCONTRAST_BYTES 32
#define PIXCONTRAST_REGISTERS 16
namespace avx2 {
PIXCONTRAST_TARGET inline void stream(float* to, __m256 value) { _mm256_stream_ps(to, value); }
PIXCONTRAST_TARGET inline void stream(double* to, __m256d value) { _mm256_stream_pd(to, value); }
#include "common/cpu/pair_kernels_impl.h"  // and row_kernels_impl.h
}  // namespace avx2
#undef PIXCONTRAST_TARGET
#undef PIXCONTRAST_BYTES
#undef PIXCONTRAST_REGISTERS
#endif

#define PIXCONTRAST_TARGET
#define PIXCONTRAST_BYTES 16
#if defined(__x86_64__)
#define PIXCONTRAST_REGISTERS 16
#else
#define PIXCONTRAST_REGISTERS 32
#endif
namespace baseline {
template <class A, class V>
inline void stream(A* to, V value) {
  *reinterpret_cast<V*>(to) = value;
}
#include "common/cpu/pair_kernels_impl.h"  // and row_kernels_impl.h
}  // namespace baseline

namespace {

const char* detect() {
  const char* wanted = std::getenv("PIXCONTRAST_CPU_CAPABILITY");
  bool allowed = wanted == nullptr;  // from the wanted one on
  const auto allows = [&](const char* name) { return allowed = allowed || std::strcmp(wanted, name) == 0; };
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (allows("avx512_bf16") && has_avx512 && __builtin_cpu_supports("avx512bf16")) return "avx512_bf16";
  if (allows("avx512") && has_avx512) return "avx512";
  if (allows("avx2") && has_avx2) return "avx2";
#endif
  return "baseline";
}

}  // namespace

void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

const char* capability() {
  static const char* const found = detect();
  return found;
}

#if defined(__x86_64__)
#define FOR_THIS_MACHINE(table)                                   \
  std::strncmp(capability(), "avx512", 6) == 0 ? avx512::table<A> \
  : std::strcmp(capability(), "avx2") == 0     ? avx2::table<A>   \
                                               : baseline::table<A>
#else
#define FOR_THIS_MACHINE(table) baseline::table<A>
#endif

template <class A>
const RowKernels<A>& row_kernels() {
  return FOR_THIS_MACHINE(row_table);
}

template <class A>
const PairKernels<A>& pair_kernels() {
  return FOR_THIS_MACHINE(pair_table);
}

template const RowKernels<float>& row_kernels<float>();
template const RowKernels<double>& row_kernels<double>();
template const PairKernels<float>& pair_kernels<float>();
template const PairKernels<double>& pair_kernels<double>();

}  // namespace pixcontrast::cpu
