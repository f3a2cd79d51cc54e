#include "common/tensor.h"
#include "grouped_linear/grouped_linear.h"

namespace pixcontrast {
namespace {

// On CPUs one product of the library a segment.

template <class T>
void linear(const Segments& segments, const Tensor& rows, const Tensor& weight, const Tensor& result, const Cpu&) {
  for (int64_t c = 0; c < segments.classes; ++c) {
    const int64_t first = segments.begin(c), count = segments.count[c];
    if (count > 0) gemm<Cpu>(rows.narrow(0, first, count), weight[c].t(), {}, result.narrow(0, first, count));
  }
}

template <class T>
void outer(const Segments& segments, const Tensor& left, const Tensor& right, const Tensor& result, const Cpu&) {
  for (int64_t c = 0; c < segments.classes; ++c) {
    const int64_t first = segments.begin(c), count = segments.count[c];
    if (count == 0) {
      result[c].zero_();
    } else {
      gemm<Cpu>(left.narrow(0, first, count).t(), right.narrow(0, first, count), {}, result[c]);
    }
  }
}

#ifdef PIXCONTRAST_WITH_CUDA
template <class T>
void linear(const Segments& segments, const Tensor& rows, const Tensor& weight, const Tensor& result,
            const Cuda& device) {
  const GroupedLinear<T> args{segments, rows.size(1), weight.size(1), read<T>(rows), read<T>(weight), write<T>(result)};
  C10_CUDA_CHECK(grouped_linear_cuda(args, device.tensor_cores(rows.scalar_type()), device.stream));
}

template <class T>
void outer(const Segments& segments, const Tensor& left, const Tensor& right, const Tensor& result,
           const Cuda& device) {
  const GroupedOuter<T> args{segments, left.size(1), right.size(1), read<T>(left), read<T>(right), write<T>(result)};
  const Tensor workspace = device.workspace(grouped_outer_cuda_workspace(args));
  const bool tensor_cores = device.tensor_cores(left.scalar_type());
  C10_CUDA_CHECK(grouped_outer_cuda(args, tensor_cores, workspace.mutable_data_ptr(), device.stream));
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
    linear<decltype(element)>(segments.get(), rows, weight, result, device);
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
    outer<decltype(element)>(segments.get(), left, right, result, device);
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
