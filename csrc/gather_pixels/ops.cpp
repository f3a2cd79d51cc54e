#include "common/tensor.h"
#include "gather_pixels/gather_pixels.h"

namespace pixcontrast {
namespace {

template <class T>
void gather(const GatherPixels<T>& args, const Cpu&) {
  gather_pixels_cpu(args);
}
template <class T>
void scatter(const GatherPixels<T>& args, const Cpu&) {
  scatter_pixels_cpu(args);
}

#ifdef PIXCONTRAST_WITH_CUDA
template <class T>
void gather(const GatherPixels<T>& args, const Cuda& device) {
  C10_CUDA_CHECK(gather_pixels_cuda(args, device.stream));
}
template <class T>
void scatter(const GatherPixels<T>& args, const Cuda& device) {
  C10_CUDA_CHECK(scatter_pixels_cuda(args, device.stream));
}
#endif

// index [R], contiguous; its values are checked where reading them does not wait for the device.
Tensor checked_index(const Tensor& index_, const Tensor& features) {
  TORCH_CHECK_VALUE(index_.dim() == 1, "index must be [R], got ", index_.sizes());
  const Tensor index = checked(index_, "index", index_.sizes(), at::kLong, features.device());
  if (!index.is_cpu() || index.numel() == 0) return index;
  const auto [lowest, highest] = at::aminmax(index);
  const int64_t first = lowest.item<int64_t>(), last = highest.item<int64_t>(), pixels = layout_of(features).pixels;
  TORCH_CHECK_VALUE(first >= -1 && last < pixels, "index must be within -1..", pixels - 1, ", got ", first, "..", last);
  return index;
}

// The rows sorted by index, equal ones in their order.
Tensor order_of(const Tensor& index) { return at::argsort(index, /*stable=*/true, /*dim=*/0, /*descending=*/false); }

template <class Device>
Tensor gather_pixels(const Tensor& features_, const Tensor& index_) {
  const Tensor features = checked_features(features_), index = checked_index(index_, features);
  const Tensor rows = empty_map({index.numel(), features.size(1)}, features.options().memory_format(std::nullopt));
  const Tensor order = std::is_same_v<Device, Cpu> ? order_of(index) : Tensor();
  Device::dispatch(features, "gather_pixels", [&](auto element, const auto& device) {
    using T = decltype(element);
    gather(GatherPixels<T>{layout_of(features), index.numel(), read<int64_t>(index), read<int64_t>(order),
                           read<T>(features), write<T>(rows)},
           device);
  });
  return rows;
}

template <class Device>
Tensor scatter_pixels(const Tensor& grad_, const Tensor& index_, const Tensor& features_) {
  const Tensor features = checked_features(features_), index = checked_index(index_, features);
  const Tensor grad =
      checked(grad_, "grad", {index.numel(), features.size(1)}, features.scalar_type(), features.device());
  const Tensor grad_features = empty_like_features(features), order = order_of(index);
  Device::dispatch(features, "scatter_pixels", [&](auto element, const auto& device) {
    using T = decltype(element);
    scatter(GatherPixels<T>{layout_of(features), index.numel(), read<int64_t>(index), read<int64_t>(order),
                            read<T>(grad), write<T>(grad_features)},
            device);
  });
  return grad_features;
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("gather_pixels", &gather_pixels<Device>);
  library.impl("scatter_pixels", &scatter_pixels<Device>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("gather_pixels(Tensor features, Tensor index) -> Tensor");
  library.def("scatter_pixels(Tensor grad, Tensor index, Tensor features) -> Tensor");
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
