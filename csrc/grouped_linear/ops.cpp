#include "common/tensor.h"
#include "grouped_linear/grouped_linear.h"

namespace pixcontrast {
namespace {

template <class T>
void run(const GroupedLinear<T>& args, const Cpu&) {
  grouped_linear_cpu(args);
}
template <class T>
void run(const GroupedOuter<T>& args, const Cpu&) {
  grouped_outer_cpu(args);
}

#ifdef PIXCONTRAST_WITH_CUDA
template <class T>
void run(const GroupedLinear<T>& args, const Cuda& device) {
  C10_CUDA_CHECK(grouped_linear_cuda(args, device.tensor_cores<T>(), device.stream));
}
template <class T>
void run(const GroupedOuter<T>& args, const Cuda& device) {
  const Tensor workspace = device.workspace(grouped_outer_cuda_workspace(args));
  void* const sums = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(grouped_outer_cuda(args, device.tensor_cores<T>(), sums, device.stream));
}
#endif

void check_rows(const Tensor& rows, const char* name) {
  TORCH_CHECK_VALUE(rows.dim() == 2, name, " must be a matrix, got ", rows.sizes());
}

template <class Device>
Tensor grouped_linear(const Tensor& rows_, const optional<Tensor>& start, const Tensor& count, const Tensor& weight_) {
  check_rows(rows_, "rows");
  const CheckedSegments segments(start, count, rows_.size(0), rows_.device());
  TORCH_CHECK_VALUE(weight_.dim() == 3, "weight must be [C, E, D], got ", weight_.sizes());
  const auto rows = rows_.contiguous();
  const auto weight =
      checked(weight_, "weight", {count.numel(), weight_.size(1), rows.size(1)}, rows.scalar_type(), rows.device());
  const auto result = empty_map({rows.size(0), weight.size(1)}, rows.options());
  Device::dispatch(rows, "grouped_linear", [&](auto element, const auto& device) {
    using T = decltype(element);
    run(GroupedLinear<T>{segments.get(), rows.size(1), weight.size(1), read<T>(rows), read<T>(weight),
                         write<T>(result)},
        device);
  });
  return result;
}

template <class Device>
Tensor grouped_outer(const Tensor& left_, const Tensor& right_, const optional<Tensor>& start, const Tensor& count) {
  check_rows(left_, "left");
  check_rows(right_, "right");
  const CheckedSegments segments(start, count, left_.size(0), left_.device());
  const auto left = left_.contiguous();
  const auto right = checked(right_, "right", {left.size(0), right_.size(1)}, left.scalar_type(), left.device());
  const auto result = at::empty({count.numel(), left.size(1), right.size(1)}, left.options());
  Device::dispatch(left, "grouped_outer", [&](auto element, const auto& device) {
    using T = decltype(element);
    run(GroupedOuter<T>{segments.get(), left.size(1), right.size(1), read<T>(left), read<T>(right), write<T>(result)},
        device);
  });
  return result;
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("grouped_linear", &grouped_linear<Device>);
  library.impl("grouped_outer", &grouped_outer<Device>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("grouped_linear(Tensor rows, Tensor? start, Tensor count, Tensor weight) -> Tensor");
  library.def("grouped_outer(Tensor left, Tensor right, Tensor? start, Tensor count) -> Tensor");
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
