// What the files of the operators (*_ops.cpp) share: tensors as the kernels see them, dispatch by dtype and device.
// Only these files know both.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <optional>

#include "cpu/kept_memory.h"
#include "positive.h"

#ifdef PIXCONTRAST_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pixcontrast {

using at::Tensor;
using std::optional;

// The dtype that sums are kept in.
inline at::ScalarType accumulation(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline optional<Tensor> contiguous(const optional<Tensor>& t) {
  return t.has_value() ? optional<Tensor>(t->contiguous()) : optional<Tensor>();
}

// The numbers of a tensor; null where there is none. T need not be the name that PyTorch has for the dtype.
template <class T>
const T* read(const Tensor& t) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) : nullptr;
}
template <class T>
const T* read(const optional<Tensor>& t) {
  return t.has_value() ? read<T>(*t) : nullptr;
}
template <class T>
T* write(const Tensor& t) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// ---- features [P, D] or [B, D, H, W]

inline void check_features(const Tensor& features) {
  TORCH_CHECK_VALUE(features.dim() == 2 || features.dim() == 4, "features must be [P, D] or [B, D, H, W], got ",
                    features.sizes());
}

inline at::MemoryFormat format_of(const Tensor& features) {
  const bool channels_last = features.dim() == 4 && features.is_contiguous(at::MemoryFormat::ChannelsLast);
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

inline FeatureLayout layout_of(const Tensor& features) {
  const bool planes = features.dim() == 4 && format_of(features) == at::MemoryFormat::Contiguous;
  return {features.numel() / std::max<int64_t>(features.size(1), 1), features.size(1),
          planes ? features.size(2) * features.size(3) : 0};
}

// Room for a result of the size of feature maps, from memory that is kept on CPUs.
inline Tensor empty_map(at::IntArrayRef sizes, const at::TensorOptions& options,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  if (!options.device().is_cpu()) return at::empty(sizes, options.memory_format(format));
  return Tensor(at::detail::empty_generic(sizes, cpu::kept_memory(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                          at::typeMetaToScalarType(options.dtype()), format));
}

// Room for the gradient of features, laid out like them.
inline Tensor empty_like_features(const Tensor& features) {
  return empty_map(features.sizes(), features.options().memory_format(std::nullopt), format_of(features));
}

// `t`, or an empty tensor where an operator has nothing to return.
inline Tensor made(const Tensor& t, const Tensor& like) {
  return t.defined() ? t : at::empty({0}, like.options().memory_format(std::nullopt));
}

// ---- dispatch

// body(T{}) with the type that CPU kernels have for the dtype of the tensor.
template <class Body>
void dispatch_cpu(const Tensor& t, const char* name, const Body& body) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return body(float{});
    case at::kDouble:
      return body(double{});
    case at::kBFloat16:
      return body(c10::BFloat16{});
    case at::kHalf:
      return body(c10::Half{});
    default:
      TORCH_CHECK_TYPE(false, name, ": no kernel for ", t.scalar_type());
  }
}

#ifdef PIXCONTRAST_WITH_CUDA
// body(T{}, stream) with the type that CUDA kernels have for the dtype of the tensor, on its device.
template <class Body>
void dispatch_cuda(const Tensor& t, const char* name, const Body& body) {
  const c10::cuda::CUDAGuard guard(t.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto type = t.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name, ": no CUDA kernel for ",
                   type, "; use float32, bfloat16 or float16, or backend=\"reference\"");
  if (type == at::kFloat) C10_CUDA_CHECK(body(float{}, stream));
  if (type == at::kBFloat16) C10_CUDA_CHECK(body(__nv_bfloat16{}, stream));
  if (type == at::kHalf) C10_CUDA_CHECK(body(__half{}, stream));
}

// Memory for a launch. PyTorch hands it out again only to later work of the same stream.
inline Tensor workspace(size_t bytes, const Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte).memory_format(std::nullopt));
}

// A number that describes the device of the tensor.
inline int attribute(const Tensor& t, cudaDeviceAttr which) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, t.get_device()));
  return value;
}
inline int sm_count(const Tensor& t) { return attribute(t, cudaDevAttrMultiProcessorCount); }

// Whether the user lets matrix products of float32 be rounded to tf32.
inline bool allow_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// Whether matrix products of tensors like this go to tensor cores.
inline bool tensor_cores(const Tensor& t) {
  return attribute(t, cudaDevAttrComputeCapabilityMajor) >= 8 && (t.scalar_type() != at::kFloat || allow_tf32());
}
#endif

}  // namespace pixcontrast
