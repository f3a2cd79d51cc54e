// The kernels of gather_pixels for the tests: `type` is 0 for float, 1 for bfloat16, 2 for half.
#include "bindings.h"
#include "gather_pixels/gather_pixels.h"

using namespace pixcontrast;

namespace {

__global__ void store_offsets(const FeatureLayout layout, const int64_t* pixels, int64_t* offsets) {
  offsets[threadIdx.x] = layout.offset(pixels[threadIdx.x]);
}

}  // namespace

// Gathers from features to rows [count, dim], or scatters from rows to features.
extern "C" int64_t run_gather_pixels(int64_t scatter, int64_t type, int64_t pixels, int64_t dim, int64_t map_pixels,
                                     int64_t count, const int64_t* index, const int64_t* order, const void* from,
                                     void* to) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const GatherPixels<T> args{{pixels, dim, map_pixels}, count, index, order, static_cast<const T*>(from),
                               static_cast<T*>(to)};
    return static_cast<int64_t>(scatter ? scatter_pixels_cuda(args, nullptr) : gather_pixels_cuda(args, nullptr));
  });
}

// Where pixels [count] of features lie.
extern "C" int64_t run_offsets(int64_t pixels, int64_t dim, int64_t map_pixels, int64_t count, const int64_t* pixel,
                               int64_t* offsets) {
  const FeatureLayout layout{pixels, dim, map_pixels};
  return static_cast<int64_t>(cu_launch(store_offsets, dim3(1), dim3(count), 0, nullptr, layout, pixel, offsets));
}
