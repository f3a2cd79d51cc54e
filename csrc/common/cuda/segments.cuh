// Work on segments whose sizes only the device knows: they are cut into pieces of one class each, as many blocks start
// as there can be pieces, and a block whose piece does not exist ends at once.
#pragma once

#include "common/cuda/device.cuh"
#include "common/layout.h"

namespace pixcontrast::cuda {

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

}  // namespace pixcontrast::cuda
