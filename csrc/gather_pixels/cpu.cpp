// Rows are taken in the order of their pixels, so that each channel plane of a map is walked through once, front to
// back, and a tile of maps passes through a buffer in the cache, because elements of a plane go to rows far apart. A
// task has some of the pixels and some of the channels, and nothing in common with another one.

#include <algorithm>
#include <vector>

#include "common/cpu/work.h"
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

// Calls body(runs, how many, first channel, how many) for tiles that make up all runs and channels.
template <class T, class Body>
void for_tiles(const GatherPixels<T>& args, const Body& body) {
  const auto runs = runs_of(args);
  const int64_t dim = args.layout.dim, width = args.layout.map_pixels ? std::min(kTileChannels, dim) : dim;
  if (runs.empty() || dim == 0) return;
  const int64_t count = static_cast<int64_t>(runs.size()), tiles = (count + kTilePixels - 1) / kTilePixels;
  const int64_t widths = (dim + width - 1) / width;  // neighbouring tasks share rows
  at::parallel_for(0, tiles * widths, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / widths * kTilePixels, channel = task % widths * width;
      body(runs.data() + first, std::min(kTilePixels, count - first), channel, std::min(width, dim - channel));
    }
  });
}

}  // namespace

template <class T>
void gather_pixels_cpu(const GatherPixels<T>& args) {
  const int64_t dim = args.layout.dim, stride = args.layout.map_pixels;
  for (int64_t row = 0; row < args.count; ++row) {
    if (!args.has_pixel(row)) std::fill_n(args.to + row * dim, dim, T(0));
  }
  for_tiles(args, [&](const Run* runs, int64_t count, int64_t channel, int64_t channels) {
    const auto to_rows = [&](const Run& run, const T* pixel, int64_t pixel_stride) {
      for (int64_t i = run.first; i < run.last; ++i) {
        T* const row = args.to + args.order[i] * dim + channel;
        for (int64_t d = 0; d < channels; ++d) row[d] = pixel[d * pixel_stride];
      }
    };
    if (stride == 0) {
      for (int64_t i = 0; i < count; ++i) to_rows(runs[i], args.from + runs[i].offset, 1);
      return;
    }
    T buffer[kTileChannels * kTilePixels];
    for (int64_t d = 0; d < channels; ++d) {
      const T* const plane = args.from + (channel + d) * stride;
      for (int64_t i = 0; i < count; ++i) buffer[d * kTilePixels + i] = plane[runs[i].offset];
    }
    for (int64_t i = 0; i < count; ++i) to_rows(runs[i], buffer + i, kTilePixels);
  });
}

template <class T>
void scatter_pixels_cpu(const GatherPixels<T>& args) {
  const int64_t dim = args.layout.dim, stride = args.layout.map_pixels;
  at::parallel_for(0, args.layout.pixels * dim, 1 << 15,
                   [&](int64_t begin, int64_t end) { std::fill(args.to + begin, args.to + end, T(0)); });
  for_tiles(args, [&](const Run* runs, int64_t count, int64_t channel, int64_t channels) {
    const auto sum_rows = [&](const Run& run, T* pixel, int64_t pixel_stride) {
      const auto row = [&](int64_t i) { return args.from + args.order[i] * dim + channel; };
      const T* const first = row(run.first);
      for (int64_t d = 0; d < channels; ++d) {
        Acc<T> sum = first[d];
        for (int64_t i = run.first + 1; i < run.last; ++i) sum += static_cast<Acc<T>>(row(i)[d]);
        pixel[d * pixel_stride] = static_cast<T>(sum);
      }
    };
    if (stride == 0) {
      for (int64_t i = 0; i < count; ++i) sum_rows(runs[i], args.to + runs[i].offset, 1);
      return;
    }
    T buffer[kTileChannels * kTilePixels];
    for (int64_t i = 0; i < count; ++i) sum_rows(runs[i], buffer + i, kTilePixels);
    for (int64_t d = 0; d < channels; ++d) {
      T* const plane = args.to + (channel + d) * stride;
      for (int64_t i = 0; i < count; ++i) plane[runs[i].offset] = buffer[d * kTilePixels + i];
    }
  });
}

#define INSTANTIATE(T)                                     \
  template void gather_pixels_cpu(const GatherPixels<T>&); \
  template void scatter_pixels_cpu(const GatherPixels<T>&);
CPU_FOR_DTYPES(INSTANTIATE)

}  // namespace pixcontrast
