// The operator `scale_`: see scale_cuda.h. On a CPU the factor can be looked at, so there it is not needed.
#include "ops.h"

#ifdef PIXCONTRAST_WITH_CUDA
#include "scale_cuda.h"
#endif

namespace pixcontrast {
namespace {

#ifdef PIXCONTRAST_WITH_CUDA
void scale(Tensor& numbers, const Tensor& factor) {
  TORCH_CHECK_VALUE(numbers.is_non_overlapping_and_dense(), "numbers must be dense");
  TORCH_CHECK_VALUE(factor.numel() == 1 && factor.device() == numbers.device(), "factor must be one number on ",
                    numbers.device());
  TORCH_CHECK_TYPE(factor.scalar_type() == at::kFloat, "factor must be float32, got ", factor.scalar_type());
  dispatch_cuda(numbers, "scale_", [&](auto number, cudaStream_t stream) {
    using T = decltype(number);
    return scale_cuda(write<T>(numbers), numbers.numel(), read<float>(factor), sm_count(numbers), stream);
  });
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) { library.def("scale_(Tensor(a!) numbers, Tensor factor) -> ()"); }
#ifdef PIXCONTRAST_WITH_CUDA
TORCH_LIBRARY_IMPL(pixcontrast, CUDA, library) { library.impl("scale_", &scale); }
#endif

}  // namespace pixcontrast
