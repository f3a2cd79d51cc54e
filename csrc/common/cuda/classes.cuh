// Work by class: segments cut into pieces, and weights within a class.
#pragma once

#include "common/cuda/warp.cuh"

namespace pixcontrast::cuda {

// ---- segments. Only the device knows their sizes, so they are cut into pieces of one class each, as many blocks start
// as there can be pieces, and a block whose piece does not exist ends at once.

// Rows [first, end) of class c; c is -1 for a piece that does not exist.
struct Piece {
  int64_t c, first, end;
};

__device__ __forceinline__ int64_t pieces_in(int64_t count, int64_t size) { return (count + size - 1) / size; }

// The piece of that number if every segment is cut into pieces of `size` rows.
__device__ __forceinline__ Piece piece_of(const Segments& segments, int64_t number, int64_t size) {
  for (int64_t c = 0; c < segments.classes; ++c) {
    const int64_t count = segments.count[c], pieces = pieces_in(count, size);
    if (number < pieces) {
      const int64_t first = segments.begin(c) + number * size, end = segments.begin(c) + count;
      return {c, first, first + size < end ? first + size : end};
    }
    number -= pieces;
  }
  return {-1, 0, 0};
}

// The number of the first piece of class c.
__device__ __forceinline__ int64_t first_piece(const Segments& segments, int64_t c, int64_t size) {
  int64_t number = 0;
  for (int64_t k = 0; k < c; ++k) number += pieces_in(segments.count[k], size);
  return number;
}

inline int64_t most_pieces(const Segments& segments, int64_t size) { return segments.rows / size + segments.classes; }

// The class of a row, -1 outside of all segments.
__device__ __forceinline__ int64_t class_of(const Segments& segments, int64_t row) {
  int64_t low = 0, high = segments.classes;  // the last segment that begins at or before the row is in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (segments.begin(middle) <= row ? low : high) = middle;
  }
  // Empty segments may begin at the same row as the one that holds it, which is then the last of them.
  return low < segments.classes && segments.begin(low) <= row && row < segments.end(low) ? low : -1;
}

// ---- weights: sigmoids that cannot vanish together, sums by class that do not depend on the order

// sigma(logit) / e^shift. With shift_of(largest logit of the class), the largest score of a class is at least a half.
__device__ __forceinline__ float score(float logit, float shift) {
  return expf(fminf(logit, 0.0f) - shift) / (1.0f + expf(-fabsf(logit)));
}
__device__ __forceinline__ float shift_of(float largest) { return fminf(largest, 0.0f); }

// Integers in the order of the floats, for atomicMax; NaN orders above every other value.
__device__ __forceinline__ int order_key(float x) {
  const int bits = __float_as_int(x != x ? fabsf(x) : x);
  return bits >= 0 ? bits : bits ^ 0x7fffffff;
}
__device__ __forceinline__ float from_order_key(int key) { return __int_as_float(key >= 0 ? key : key ^ 0x7fffffff); }
constexpr int kLeastKey = -0x7f800001;  // of minus infinity

// Sums in fixed point, because integers add up to the same in any order. A float of at least 2^(24 - bits) is exact.
template <int Bits>
__device__ __forceinline__ void add_fixed(unsigned long long* sum, float x) {
  atomicAdd(sum, static_cast<unsigned long long>(static_cast<long long>(x * static_cast<float>(1ull << Bits))));
}
template <int Bits>
__device__ __forceinline__ float from_fixed(unsigned long long sum) {
  return static_cast<float>(static_cast<double>(static_cast<long long>(sum)) / static_cast<double>(1ull << Bits));
}

// body(c, members) for each class c >= 0 among the lanes' own, once; the whole warp calls it. Neighbouring pixels are
// mostly of one class, so that a warp adds to a sum once instead of 32 times.
template <class Body>
__device__ __forceinline__ void for_classes(int own, const Body& body) {
  unsigned left = __ballot_sync(kAllLanes, own >= 0);
  while (left != 0) {
    const int c = __shfl_sync(kAllLanes, own, __ffs(left) - 1);
    const unsigned members = __ballot_sync(kAllLanes, own == c);
    body(c, members);
    left &= ~members;
  }
}

}  // namespace pixcontrast::cuda
