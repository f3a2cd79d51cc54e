// Segments cut into blocks that lie in one class each, so that sums come out the same with any number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/segments.h"

namespace pixcontrast::cpu {

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
