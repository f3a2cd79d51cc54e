// Names that the operators `project`, `head`, `selector` and `grouped` still use; goes with them.
#pragma once

#include "common/tensor.h"

namespace pixcontrast {

inline optional<Tensor> contiguous(const optional<Tensor>& t) {
  return t.has_value() ? optional<Tensor>(t->contiguous()) : optional<Tensor>();
}
inline void check_features(const Tensor& features) {
  TORCH_CHECK_VALUE(features.dim() == 2 || features.dim() == 4, "features must be [P, D] or [B, D, H, W], got ",
                    features.sizes());
}
inline Tensor made(const Tensor& t, const Tensor& like) { return defined_or_empty(t, like); }
template <class Body>
void dispatch_cpu(const Tensor& t, const char* name, const Body& body) {
  Cpu::dispatch(t, name, [&](auto element, const Cpu&) { body(element); });
}
#ifdef PIXCONTRAST_WITH_CUDA
template <class Body>
void dispatch_cuda(const Tensor& t, const char* name, const Body& body) {
  Cuda::dispatch(t, name, [&](auto element, const Cuda& on) { C10_CUDA_CHECK(body(element, on.stream)); });
}
inline Tensor workspace(size_t bytes, const Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte).memory_format(std::nullopt));
}
inline int attribute(const Tensor& t, cudaDeviceAttr which) { return Cuda{t.device(), nullptr}.attribute(which); }
inline int sm_count(const Tensor& t) { return attribute(t, cudaDevAttrMultiProcessorCount); }
inline bool allow_tf32() { return Cuda::allow_tf32(); }
inline bool tensor_cores(const Tensor& t) { return Cuda{t.device(), nullptr}.tensor_cores(t.scalar_type()); }
#endif

}  // namespace pixcontrast
