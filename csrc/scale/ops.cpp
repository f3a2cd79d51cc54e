#include "common/tensor.h"
#include "scale/scale.h"

namespace pixcontrast {
namespace {

template <class T>
void run(const UnitRows<T>& args, const Cpu&) {
  using A = Acc<T>;
  const auto& kernels = cpu::row_kernels<A>();
  cpu::Pieces(args.rows, args.rows, 64).run([&](int64_t, int64_t first, int64_t last) {
    cpu::RowBuffer<T> in(args.dim), out(args.dim);
    for (int64_t i = first; i < last; ++i) {
      const A* const x = in.read(args.from + i * args.dim);
      A square, same;
      kernels.square_and_dot(x, x, args.dim, &square, &same);
      const A scale = inverse_norm(square);
      T* const to = args.to + i * args.dim;
      kernels.combine(A(0), x, scale, x, args.dim, false, out.target(to), A(0), nullptr);
      out.write(to);
    }
  });
}

#ifdef PIXCONTRAST_WITH_CUDA
template <class T>
void run(const UnitRows<T>& args, const Cuda& device) {
  C10_CUDA_CHECK(unit_rows_cuda(args, device.stream));
}

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
  Cuda::on(factor, [&](const Cuda& device) { C10_CUDA_CHECK(scale_cuda(args, device.sm_count(), device.stream)); });
}
#endif

template <class Device>
Tensor unit_rows(const Tensor& rows_) {
  TORCH_CHECK_VALUE(rows_.dim() == 2, "rows must be [P, D], got ", rows_.sizes());
  const auto rows = rows_.contiguous(), result = empty_map(rows.sizes(), rows.options());
  Device::dispatch(rows, "unit_rows", [&](auto element, const auto& device) {
    using T = decltype(element);
    run(UnitRows<T>{rows.size(0), rows.size(1), read<T>(rows), write<T>(result)}, device);
  });
  return result;
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("unit_rows", &unit_rows<Device>);
#ifdef PIXCONTRAST_WITH_CUDA
  if constexpr (std::is_same_v<Device, Cuda>) library.impl("scale_", &scale);
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("unit_rows(Tensor rows) -> Tensor");
  library.def("scale_(Tensor(a!)[] tensors, Tensor factor) -> ()");
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
