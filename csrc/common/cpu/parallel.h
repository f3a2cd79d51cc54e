// Work split into pieces whose number depends on the problem alone, so that sums come out the same with any number of
// threads: each piece writes its own partial sums, which are then added in order.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

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

}  // namespace pixcontrast::cpu
