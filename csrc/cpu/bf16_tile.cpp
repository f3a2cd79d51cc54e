// vdpbf16ps multiplies 16 pairs of bfloat16 with 16 others and adds the two products of each to a float32. Both
// products of the tile are made by one kernel: a pair of a row, copied to all lanes, times pairs that belong to 16
// columns. Rows stay as they are; the pairs of 32 columns lie one after the other, in the order in which they are
// needed.
#include "bf16_tile.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "row_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define PIXCONTRAST_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define PIXCONTRAST_INLINE PIXCONTRAST_TARGET __attribute__((always_inline)) inline
#endif

namespace pixcontrast::cpu {

#pragma GCC diagnostic ignored "-Wuninitialized"  // in the intrinsics of gcc 12
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

bool has_bf16() { return std::strcmp(capability(), "avx512_bf16") == 0; }

#if defined(__x86_64__)
namespace {

constexpr int kMostRows = 12;  // with two vectors of columns: 24 sums, of 32 registers

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The first `count` of 16 or 32 lanes.
__mmask16 first16(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1); }
__mmask32 first32(int64_t count) { return static_cast<__mmask32>((1ull << std::clamp<int64_t>(count, 0, 32)) - 1); }

// out [rows, width] = or += rows [rows, pairs] columns [panels of 32, pairs, 32], all but `out` in pairs of bfloat16.
struct Product {
  const uint32_t* rows;
  int64_t row_stride;
  const void* columns;
  int64_t pairs;
  float* out;
  int64_t out_stride, width;
  bool add;
};

// The first panel for `Rows` rows.
template <int Rows>
PIXCONTRAST_TARGET void multiply_rows(const Product& product) {
  const __mmask16 low = first16(product.width), high = first16(product.width - 16);
  const __mmask16 old_low = product.add ? low : 0, old_high = product.add ? high : 0;
  const auto* columns = static_cast<const __m512i*>(product.columns);
  __m512 sum[Rows][2];
  for (int r = 0; r < Rows; ++r) {
    const float* const out = product.out + r * product.out_stride;
    sum[r][0] = _mm512_maskz_loadu_ps(old_low, out);
    sum[r][1] = _mm512_maskz_loadu_ps(old_high, out + 16);
  }
  for (int64_t p = 0; p < product.pairs; ++p) {
    const __m512bh left = (__m512bh)columns[2 * p], right = (__m512bh)columns[2 * p + 1];
    for (int r = 0; r < Rows; ++r) {
      const __m512bh row = (__m512bh)_mm512_set1_epi32(product.rows[r * product.row_stride + p]);
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], row, left);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], row, right);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    float* const out = product.out + r * product.out_stride;
    _mm512_mask_storeu_ps(out, low, sum[r][0]);
    _mm512_mask_storeu_ps(out + 16, high, sum[r][1]);
  }
}

template <int... Less>
void multiply_rows(int64_t rows, const Product& product, std::integer_sequence<int, Less...>) {
  static constexpr void (*kernels[])(const Product&) = {multiply_rows<Less + 1>...};
  kernels[rows - 1](product);
}

// The whole product. Rows in groups of much the same size, which stay in the L1 cache while the panels pass.
void multiply(int64_t rows, const Product& whole) {
  const int64_t groups = ceil_div(rows, kMostRows);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = rows * g / groups, count = rows * (g + 1) / groups - first;
    Product p = whole;
    p.rows += first * p.row_stride;
    p.out += first * p.out_stride;
    for (; p.width > 0; p.width -= 32) {
      multiply_rows(count, p, std::make_integer_sequence<int, kMostRows>());
      p.columns = static_cast<const __m512i*>(p.columns) + 2 * p.pairs;
      p.out += 32;
    }
  }
}

// Transposes 16 x 16 pairs: squares of 1, 2, 4 and 8 pairs change places across the diagonal.
PIXCONTRAST_INLINE void transpose(__m512i (&rows)[16]) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int size = 1; size < 16; size *= 2) {
    const __mmask16 odd = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(size));
    // lanes of the second operand count from 16 on
    const __m512i even_half = _mm512_mask_add_epi32(lane, odd, lane, _mm512_set1_epi32(16 - size));
    const __m512i odd_half =
        _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(size)), odd, lane, _mm512_set1_epi32(16));
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) {
      if (r & size) continue;
      const __m512i first = rows[r], second = rows[r + size];
      rows[r] = _mm512_permutex2var_epi32(first, even_half, second);
      rows[r + size] = _mm512_permutex2var_epi32(first, odd_half, second);
    }
  }
}

}  // namespace

PIXCONTRAST_TARGET void Bf16Tile::pack(const c10::BFloat16* keys, int64_t count, int64_t dim) {
  count_ = count;
  dim_ = dim;
  const int64_t channel_pairs = padded(dim) / 2, key_pairs = ceil_div(count, 2);
  channel_pairs_.resize(stride() / 16 * channel_pairs);
  key_pairs_.resize(padded(dim) / 16 * key_pairs);
  for (int64_t j = 0; j < count; j += 2) {  // first, because memory is read fastest in order
    for (int64_t d = 0; d < padded(dim); d += 16) {
      const __mmask16 inside = first16(dim - d), second = j + 1 < count ? inside : 0;
      const __m256i low = _mm256_maskz_loadu_epi16(inside, keys + j * dim + d);
      const __m256i high = _mm256_maskz_loadu_epi16(second, keys + (j + 1) * dim + d);
      Pairs* const to = key_pairs_.data() + (d / 32 * key_pairs + j / 2) * 2 + d / 16 % 2;
      _mm512_store_si512(
          to, _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
    }
  }
  for (int64_t first = 0; first < stride(); first += 16) {
    Pairs* const panel = channel_pairs_.data() + first / 32 * channel_pairs * 2 + first / 16 % 2;
    for (int64_t d = 0; d < dim; d += 32) {
      __m512i rows[16];
      for (int64_t r = 0; r < 16; ++r) {
        const __mmask32 inside = first + r < count ? first32(dim - d) : 0;
        rows[r] = _mm512_maskz_loadu_epi16(inside, keys + (first + r) * dim + d);
      }
      transpose(rows);
      for (int64_t p = 0; p < 16; ++p) _mm512_store_si512(panel + (d / 2 + p) * 2, rows[p]);
    }
  }
}

void Bf16Tile::multiply(const c10::BFloat16* anchors, int64_t rows, float* z) const {
  const int64_t pairs = padded(dim_) / 2;
  cpu::multiply(rows, {reinterpret_cast<const uint32_t*>(anchors), pairs, channel_pairs_.data(), pairs, z, stride(),
                       stride(), false});
}

PIXCONTRAST_TARGET float Bf16Tile::round(float* z) const {
  __m512 sum = _mm512_setzero_ps();
  auto* to = reinterpret_cast<__m256i*>(z);   // never ahead of what is read
  for (int64_t j = 0; j < count_; j += 16) {  // behind the last key are products with zeros
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(z + j));
    _mm256_storeu_si256(to++, rounded);
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
  }
  return _mm512_reduce_add_ps(sum);
}

void Bf16Tile::accumulate(const float* z, int64_t rows, float* out) const {
  cpu::multiply(rows, {reinterpret_cast<const uint32_t*>(z), stride(), key_pairs_.data(), ceil_div(count_, 2), out,
                       dim_, dim_, true});
}

#else  // has_bf16() is false
void Bf16Tile::pack(const c10::BFloat16*, int64_t, int64_t) {}
void Bf16Tile::multiply(const c10::BFloat16*, int64_t, float*) const {}
float Bf16Tile::round(float*) const { return 0; }
void Bf16Tile::accumulate(const float*, int64_t, float*) const {}
#endif

}  // namespace pixcontrast::cpu
