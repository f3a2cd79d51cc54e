#include "common/tensor.h"
#include "scale/scale.h"

namespace pixcontrast {
namespace {

#ifdef PIXCONTRAST_WITH_CUDA
void scale(at::TensorList tensors, const Tensor& factor_) {
  const auto factor = checked(factor_, "factor", {}, at::kFloat, factor_.device());
  TORCH_CHECK_VALUE(tensors.size() <= kMostScaled, "at most ", kMostScaled, " tensors, got ", tensors.size());
  Scale args{};
  args.factor = read<float>(factor);
  for (const Tensor& t : tensors) {
    TORCH_CHECK_VALUE(t.is_non_overlapping_and_dense() && t.device() == factor.device(),
                      "tensors must be dense and on ", factor.device());
    TORCH_CHECK_TYPE(t.scalar_type() != at::kDouble, "tensors must be float32, bfloat16 or float16, got float64");
    args.tensor[args.tensors++] = {write<void>(t), t.numel(), dtype_of(t, "tensors")};
  }
  Cuda::dispatch(factor, "scale_", [&](auto element, const Cuda& device) {
    if constexpr (std::is_same_v<decltype(element), float>) {
      C10_CUDA_CHECK(scale_cuda(args, device.sm_count(), device.stream));
    }
  });
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) { library.def("scale_(Tensor(a!)[] tensors, Tensor factor) -> ()"); }
#ifdef PIXCONTRAST_WITH_CUDA
TORCH_LIBRARY_IMPL(pixcontrast, CUDA, library) { library.impl("scale_", &scale); }
#endif

}  // namespace pixcontrast
