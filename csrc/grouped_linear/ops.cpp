// The operators behind grouped_linear and grouped_outer of pixcontrast/heads.py on CUDA; elsewhere PyTorch has what is
// needed.
#include "common/old_tensor.h"

#ifdef PIXCONTRAST_WITH_CUDA
#include "grouped_linear/grouped_linear.h"
#endif

namespace pixcontrast {
namespace {

#ifdef PIXCONTRAST_WITH_CUDA
void check(const Tensor& rows, const Tensor& other, const Tensor& ends) {
  TORCH_CHECK_VALUE(rows.dim() == 2, "rows must be [P, D], got ", rows.sizes());
  TORCH_CHECK_TYPE(rows.scalar_type() == other.scalar_type(), "both must be ", rows.scalar_type(), ", got ",
                   other.scalar_type());
  TORCH_CHECK_VALUE(ends.dim() == 1, "ends must be [C], got ", ends.sizes());
  TORCH_CHECK_TYPE(ends.scalar_type() == at::kInt, "ends must be int32, got ", ends.scalar_type());
  TORCH_CHECK_VALUE(rows.device() == other.device() && rows.device() == ends.device(), "all must be on one device");
}

Groups groups_of(const Tensor& rows, const Tensor& ends) { return {rows.size(0), ends.size(0), read<int32_t>(ends)}; }

Tensor linear(const Tensor& rows_, const Tensor& weight_, const Tensor& ends_) {
  check(rows_, weight_, ends_);
  TORCH_CHECK_VALUE(weight_.dim() == 3 && weight_.size(0) == ends_.size(0) && weight_.size(2) == rows_.size(1),
                    "weight must be [C, E, D], got ", weight_.sizes());
  const auto rows = rows_.contiguous(), weight = weight_.contiguous(), ends = ends_.contiguous();
  const auto result = at::empty({rows.size(0), weight.size(1)}, rows.options());
  dispatch_cuda(rows, "grouped_linear", [&](auto number, cudaStream_t stream) {
    using T = decltype(number);
    const GroupedLinear<T> args{groups_of(rows, ends), rows.size(1),    weight.size(1),
                                read<T>(rows),         read<T>(weight), write<T>(result)};
    return grouped_linear_cuda(args, tensor_cores(rows), stream);
  });
  return result;
}

Tensor outer(const Tensor& left_, const Tensor& right_, const Tensor& ends_) {
  check(left_, right_, ends_);
  TORCH_CHECK_VALUE(right_.dim() == 2 && right_.size(0) == left_.size(0), "right must be [P, D], got ", right_.sizes());
  const auto left = left_.contiguous(), right = right_.contiguous(), ends = ends_.contiguous();
  const auto result = at::empty({ends.size(0), left.size(1), right.size(1)}, left.options());
  dispatch_cuda(left, "grouped_outer", [&](auto number, cudaStream_t stream) {
    using T = decltype(number);
    const GroupedOuter<T> args{groups_of(left, ends), left.size(1),   right.size(1),
                               read<T>(left),         read<T>(right), write<T>(result)};
    const auto room = workspace(grouped_outer_cuda_workspace(args), left);
    return grouped_outer_cuda(args, tensor_cores(left), room.mutable_data_ptr(), stream);
  });
  return result;
}
#endif

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("grouped_linear_cuda(Tensor rows, Tensor weight, Tensor ends) -> Tensor");
  library.def("grouped_outer_cuda(Tensor left, Tensor right, Tensor ends) -> Tensor");
}
#ifdef PIXCONTRAST_WITH_CUDA
TORCH_LIBRARY_IMPL(pixcontrast, CUDA, library) {
  library.impl("grouped_linear_cuda", &linear);
  library.impl("grouped_outer_cuda", &outer);
}
#endif

}  // namespace pixcontrast
