// Work split into pieces whose number depends on the problem alone, so that sums come out the same with any number of
// threads: each piece writes its own partial sums, which are then added in order.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/layout.h"

namespace pixcontrast::cpu {

struct Pieces {
  int64_t total, count, size;

  // At most `most` pieces of at least `least` items.
  Pieces(int64_t total, int64_t most, int64_t least)
      : total(total),
        count(std::clamp<int64_t>(total / least, 1, std::max<int64_t>(most, 1))),
        size((total + count - 1) / count) {}

  // body(piece, begin, end)
  template <class Body>
  void run(const Body& body) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t piece = first; piece < last; ++piece) {
        body(piece, std::min(piece * size, total), std::min((piece + 1) * size, total));
      }
    });
  }
};

// ---- segments cut into blocks that lie in one class each

// Some of the rows of class c.
struct Block {
  int64_t c, begin, end;
  int64_t size() const { return end - begin; }
};

// The rows of all segments in blocks of much the same size, at most `most`.
inline std::vector<Block> blocks_of(const Segments& segments, int64_t most) {
  std::vector<Block> blocks;
  for (int64_t c = 0; c < segments.classes; ++c) {
    const int64_t first = segments.begin(c), size = segments.count[c], count = (size + most - 1) / most;
    for (int64_t k = 0; k < count; ++k) blocks.push_back({c, first + size * k / count, first + size * (k + 1) / count});
  }
  return blocks;
}

// body(number, block) for all blocks, anything with ascending `begin` and `end`; each thread has about as many rows.
template <class Block, class Body>
void for_blocks(const std::vector<Block>& blocks, const Body& body) {
  if (blocks.empty()) return;
  at::parallel_for(0, blocks.back().end, 1, [&](int64_t first, int64_t last) {
    const auto before = [](const Block& block, int64_t row) { return block.begin < row; };
    auto block = std::lower_bound(blocks.begin(), blocks.end(), first, before);
    for (; block != blocks.end() && block->begin < last; ++block) body(block - blocks.begin(), *block);
  });
}

// body(first, last) for the rows outside of all segments, one range after another.
template <class Body>
void for_gaps(const Segments& segments, const Body& body) {
  int64_t end = 0;
  for (int64_t c = 0; c < segments.classes; ++c) {
    if (segments.begin(c) > end) body(end, segments.begin(c));
    end = segments.end(c);
  }
  if (segments.rows > end) body(end, segments.rows);
}

}  // namespace pixcontrast::cpu
