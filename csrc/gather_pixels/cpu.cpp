// Rows are taken in the order of their pixels, so that each channel plane of a map is walked through once, front to
// back. A task has some of the pixels and some of the channels, and nothing in common with another one.
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <vector>

#include "gather_pixels/gather_pixels.h"

namespace pixcontrast {
namespace {

constexpr int64_t kTilePixels = 256;
constexpr int64_t kTileChannels = 16;  // of maps: a cache line of each row in float32

// The rows of one pixel: order[first] to order[last - 1].
struct Run {
  int64_t offset;  // of the pixel's first channel
  int64_t first, last;
};

template <class T>
std::vector<Run> runs_of(const GatherPixels<T>& args) {
  std::vector<Run> runs;
  for (int64_t i = 0; i < args.count; ++i) {
    const int64_t row = args.order[i];
    if (!args.has_pixel(row)) continue;
    if (!runs.empty() && args.index[args.order[i - 1]] == args.index[row]) {
      ++runs.back().last;
    } else {
      runs.push_back({args.layout.offset(args.index[row]), i, i + 1});
    }
  }
  return runs;
}

// Calls body(run, first channel, last) for all runs and channels.
template <class T, class Body>
void for_runs(const GatherPixels<T>& args, const Body& body) {
  const auto runs = runs_of(args);
  const int64_t dim = args.layout.dim, width = args.layout.map_pixels ? std::min(kTileChannels, dim) : dim;
  if (runs.empty() || dim == 0) return;
  const int64_t count = static_cast<int64_t>(runs.size()), tiles = (count + kTilePixels - 1) / kTilePixels;
  at::parallel_for(0, (dim + width - 1) / width * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tiles * kTilePixels, last = std::min(first + kTilePixels, count);
      const int64_t channel = task / tiles * width, channels_end = std::min(channel + width, dim);
      if (args.layout.map_pixels == 0) {
        for (int64_t i = first; i < last; ++i) body(runs[i], channel, channels_end);
        continue;
      }
      for (int64_t d = channel; d < channels_end; ++d) {
        for (int64_t i = first; i < last; ++i) body(runs[i], d, d + 1);
      }
    }
  });
}

}  // namespace

template <class T>
void gather_pixels_cpu(const GatherPixels<T>& args) {
  const int64_t dim = args.layout.dim, stride = args.layout.channel_stride();
  for (int64_t row = 0; row < args.count; ++row) {
    if (!args.has_pixel(row)) std::fill_n(args.to + row * dim, dim, T(0));
  }
  for_runs(args, [&](const Run& run, int64_t channel, int64_t end) {
    for (int64_t i = run.first; i < run.last; ++i) {
      T* const row = args.to + args.order[i] * dim;
      for (int64_t d = channel; d < end; ++d) row[d] = args.from[run.offset + d * stride];
    }
  });
}

template <class T>
void scatter_pixels_cpu(const GatherPixels<T>& args) {
  const int64_t dim = args.layout.dim, stride = args.layout.channel_stride();
  at::parallel_for(0, args.layout.pixels * dim, 1 << 15,
                   [&](int64_t begin, int64_t end) { std::fill(args.to + begin, args.to + end, T(0)); });
  for_runs(args, [&](const Run& run, int64_t channel, int64_t end) {
    const T* const row = args.from + args.order[run.first] * dim;
    T* const pixel = args.to + run.offset;
    if (run.last - run.first == 1) {
      for (int64_t d = channel; d < end; ++d) pixel[d * stride] = row[d];
      return;
    }
    for (int64_t d = channel; d < end; ++d) {
      Acc<T> sum = row[d];
      for (int64_t i = run.first + 1; i < run.last; ++i) sum += static_cast<Acc<T>>(args.from[args.order[i] * dim + d]);
      pixel[d * stride] = static_cast<T>(sum);
    }
  });
}

#define INSTANTIATE(T)                                     \
  template void gather_pixels_cpu(const GatherPixels<T>&); \
  template void scatter_pixels_cpu(const GatherPixels<T>&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)

}  // namespace pixcontrast
