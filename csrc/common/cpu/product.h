// A small matrix product for one thread, with operands where they lie.
#pragma once

#include <cstdint>
#include <utility>

namespace pixcontrast::cpu {

constexpr int64_t kColumnStep = 16;  // products are made for a multiple of so many columns

constexpr int64_t padded(int64_t columns) { return (columns + kColumnStep - 1) / kColumnStep * kColumnStep; }

// out [rows, columns] = or += left [rows, units] right [units, columns].
//
// A unit is an element, or a pair of bfloat16 (see bf16.h). Columns of right and out lie side by side, left lies in any
// order: so rows of keys can be the left operand, and the transpose of a result, neither of them rearranged.
template <class Unit, class A>
struct Product {
  int64_t rows, units, columns;
  const Unit* left;
  int64_t left_row, left_unit;  // elements from one to the next
  const Unit* right;
  int64_t right_unit;
  A* out;
  int64_t out_row;
  bool add;
  int64_t ahead = 0;  // elements from what is read of left to what is fetched into the cache meanwhile; 0: nothing
};

// Calls tile(first row, std::integral_constant<int, rows of the tile>) for tiles of much the same size, at most Most.
template <int Most, class Tile, int... Less>
inline __attribute__((always_inline)) void for_row_tiles(int64_t rows, const Tile& tile,
                                                         std::integer_sequence<int, Less...>) {
  const int64_t tiles = (rows + Most - 1) / Most;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
    (void)((count == Less + 1 && (tile(first, std::integral_constant<int, Less + 1>()), true)) || ...);
  }
}

}  // namespace pixcontrast::cpu
