// at::parallel_for on std::thread, which ThreadSanitizer can follow: that of PyTorch uses an OpenMP it knows nothing
// of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t most = (end - begin + grain - 1) / std::max<int64_t>(grain, 1), count = std::min<int64_t>(3, most);
  if (count < 2) {
    if (begin < end) body(begin, end);
    return;
  }
  std::vector<std::thread> threads;
  const int64_t size = (end - begin + count - 1) / count;
  for (int64_t first = begin; first < end; first += size) {
    threads.emplace_back([&body, first, last = std::min(first + size, end)] { body(first, last); });
  }
  for (auto& thread : threads) thread.join();
}

inline int get_num_threads() { return 3; }
inline int get_thread_num() { return 0; }
inline bool in_parallel_region() { return false; }

}  // namespace at
