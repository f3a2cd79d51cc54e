// Sorted rows cut into blocks that lie in one class each, so that sums come out the same with any number of threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace pixcontrast::cpu {

// Some of the rows of class c.
struct Block {
  int64_t c, begin, end;
  int64_t size() const { return end - begin; }
};

// The rows of all classes (those of class c are ends[c - 1] : ends[c]) in blocks of much the same size, at most `most`.
inline std::vector<Block> blocks_of(int64_t classes, const int64_t* ends, int64_t most) {
  std::vector<Block> blocks;
  for (int64_t c = 0, begin = 0; c < classes; begin = ends[c++]) {
    const int64_t size = ends[c] - begin, count = (size + most - 1) / most;
    for (int64_t k = 0; k < count; ++k) blocks.push_back({c, begin + size * k / count, begin + size * (k + 1) / count});
  }
  return blocks;
}

// body(number, block, what make() has made for the thread) for all blocks; each thread has about as many rows.
template <class Make, class Body>
void for_blocks(const std::vector<Block>& blocks, const Make& make, const Body& body) {
  if (blocks.empty()) return;
  at::parallel_for(0, blocks.back().end, 1, [&](int64_t first, int64_t last) {
    auto own = make();
    const auto before = [](const Block& block, int64_t row) { return block.begin < row; };
    auto block = std::lower_bound(blocks.begin(), blocks.end(), first, before);
    for (; block != blocks.end() && block->begin < last; ++block) body(block - blocks.begin(), *block, own);
  });
}

}  // namespace pixcontrast::cpu
