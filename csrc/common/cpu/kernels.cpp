#include "common/cpu/kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pixcontrast::cpu {

#pragma GCC diagnostic ignored "-Wpsabi"          // vectors never cross a call that is not inlined
#pragma GCC diagnostic ignored "-Wuninitialized"  // in the intrinsics of gcc 12
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

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

// ---- bfloat16: vdpbf16ps multiplies 16 pairs with 16 others and adds the two products of each to a float32. Here one
// of the two is a pair of the left operand, copied to all lanes.

bool has_bf16() {
  static const bool has = std::strcmp(capability(), "avx512_bf16") == 0;
  return has;
}

#if defined(__x86_64__)
#define PIXCONTRAST_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
namespace {

constexpr int kMostRows = 12;  // with two vectors of columns: 24 sums, of 32 registers

template <int Rows, int Vectors>
PIXCONTRAST_BF16 void product_tile(const Product<uint32_t, float>& args, int64_t row, int64_t column) {
  const uint32_t *left = args.left + row * args.left_row, *right = args.right + column;
  float* const out = args.out + row * args.out_row + column;
  const int64_t left_row = args.left_row;
  __m512 sum[Rows][Vectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  const auto* ahead = reinterpret_cast<const char*>(left + args.ahead);
  for (int64_t u = 0; u < args.units; ++u, ahead += 64) {
    if (args.ahead) __builtin_prefetch(ahead, 0, 2);
    __m512bh across[Vectors];
    for (int v = 0; v < Vectors; ++v) across[v] = (__m512bh)_mm512_loadu_si512(right + 16 * v);
    for (int r = 0; r < Rows; ++r) {
      const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int>(left[r * left_row]));
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], pair, across[v]);
    }
    left += args.left_unit;
    right += args.right_unit;
  }
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      float* const to = out + r * args.out_row + 16 * v;
      _mm512_storeu_ps(to, args.add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[r][v]) : sum[r][v]);
    }
  }
}

}  // namespace

void bf16_product(const Product<uint32_t, float>& args) {
  for_row_tiles<kMostRows>(
      args.rows,
      [&](int64_t row, auto rows) {
        int64_t column = 0;
        for (; column + 32 <= args.columns; column += 32) product_tile<rows, 2>(args, row, column);
        if (column < args.columns) product_tile<rows, 1>(args, row, column);
      },
      std::make_integer_sequence<int, kMostRows>());
}

PIXCONTRAST_BF16 void round(const float* elements, int64_t count, c10::BFloat16* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(elements + i)));
  }
  for (; i < count; ++i) to[i] = elements[i];
}

PIXCONTRAST_BF16 void widen(const c10::BFloat16* elements, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(elements + i));
    _mm512_storeu_ps(to + i, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(some), 16)));
  }
  for (; i < count; ++i) to[i] = elements[i];
}

PIXCONTRAST_BF16 void pair_rows(const c10::BFloat16* rows, int64_t stride, int64_t count, int64_t columns,
                                uint32_t* to) {
  for (int64_t i = 0; i < count; i += 2, to += columns) {
    for (int64_t d = 0; d < columns; d += 16) {
      const auto read = [&](int64_t row) { return reinterpret_cast<const __m256i*>(rows + row * stride + d); };
      const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(read(i)));
      __m512i second = _mm512_setzero_si512();
      if (i + 1 < count) second = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(read(i + 1))), 16);
      _mm512_storeu_si512(to + d, _mm512_or_si512(first, second));
    }
  }
}

PIXCONTRAST_BF16 void round_to_pairs(float* rows, int64_t count, int64_t stride, int64_t columns, float* sum) {
  for (int64_t column = 0; column < columns; column += 16) {
    __m512 total = _mm512_setzero_ps();
    float *from = rows + column, *to = from;  // `to` is never ahead of what is read
    for (int64_t i = 0; i < count; i += 2, from += 2 * stride, to += stride) {
      const __m512i first = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from)));
      total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(first, 16)));
      __m512i second = _mm512_setzero_si512();
      if (i + 1 < count) {
        second = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + stride)));
        second = _mm512_slli_epi32(second, 16);
        total = _mm512_add_ps(total, _mm512_castsi512_ps(second));
      }
      _mm512_storeu_si512(to, _mm512_or_si512(first, second));
    }
    if (sum) _mm512_storeu_ps(sum + column, _mm512_add_ps(_mm512_loadu_ps(sum + column), total));
  }
}

#else  // has_bf16() is false
void bf16_product(const Product<uint32_t, float>&) {}
void round(const float*, int64_t, c10::BFloat16*) {}
void widen(const c10::BFloat16*, int64_t, float*) {}
void pair_rows(const c10::BFloat16*, int64_t, int64_t, int64_t, uint32_t*) {}
void round_to_pairs(float*, int64_t, int64_t, int64_t, float*) {}
#endif

}  // namespace pixcontrast::cpu
