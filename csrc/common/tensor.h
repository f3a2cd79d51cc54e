// Tensors as kernels see them: checks, allocation, dispatch by device and dtype. Only the files ops.cpp of the
// operators include it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <torch/library.h>

#include <optional>

#include "common/cpu/work.h"
#include "common/layout.h"

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
inline at::ScalarType accumulation(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }
inline at::ScalarType accumulation(const Tensor& t) { return accumulation(t.scalar_type()); }

// The dtype for kernels that learn it when they run.
inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kHalf:
      return Dtype::kHalf;
    case at::kDouble:
      return Dtype::kDouble;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, bfloat16, float16 or float64, got ", t.scalar_type());
  }
}

// Elements of a tensor; null where there is none. T need not be the name that PyTorch has for the dtype.
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

// ---- checks. What is friendly to people (hints, values of labels) is checked before, in Python.

// `t`, contiguous, if it has these sizes, this dtype and this device.
inline Tensor checked(const Tensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType type,
                      const c10::Device& device) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must be ", sizes, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == type, name, " must be ", type, ", got ", t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == device, name, " must be on ", device, ", got ", t.device());
  return t.contiguous();
}
inline optional<Tensor> checked(const optional<Tensor>& t, const char* name, at::IntArrayRef sizes, at::ScalarType type,
                                const c10::Device& device) {
  return t.has_value() ? optional<Tensor>(checked(*t, name, sizes, type, device)) : optional<Tensor>();
}

// Segments of `rows` rows.
struct CheckedSegments {
  optional<Tensor> start;  // [C] int64
  Tensor count;            // [C] int64
  int64_t rows;

  CheckedSegments(const optional<Tensor>& start_, const Tensor& count_, int64_t rows, const c10::Device& device)
      : rows(rows) {
    TORCH_CHECK_VALUE(count_.dim() == 1, "count must be [C], got ", count_.sizes());
    count = checked(count_, "count", count_.sizes(), at::kLong, device);
    start = checked(start_, "start", count_.sizes(), at::kLong, device);
    if (!device.is_cpu()) return;  // elsewhere, reading them would wait for the device
    const Segments segments = get();
    for (int64_t c = 0, last = 0; c < segments.classes; last = segments.end(c++)) {
      TORCH_CHECK_VALUE(segments.begin(c) >= last && segments.count[c] >= 0 && segments.end(c) <= rows,
                        "segments must ascend within 0..", rows, ", got ", segments.begin(c), " and ",
                        segments.count[c], " for class ", c);
    }
  }

  Segments get() const { return {rows, count.numel(), read<int64_t>(start), read<int64_t>(count)}; }
};

// ---- features [P, D] or [B, D, H, W]

inline at::MemoryFormat format_of(const Tensor& features) {
  const bool channels_last = features.dim() == 4 && features.is_contiguous(at::MemoryFormat::ChannelsLast);
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// Features in a layout that kernels read: as they are, if they are contiguous or channels_last.
inline Tensor checked_features(const Tensor& features) {
  TORCH_CHECK_VALUE(features.dim() == 2 || features.dim() == 4, "features must be [P, D] or [B, D, H, W], got ",
                    features.sizes());
  return features.contiguous(format_of(features));
}

inline FeatureLayout layout_of(const Tensor& features) {
  const bool planes = features.dim() == 4 && format_of(features) == at::MemoryFormat::Contiguous;
  return {features.numel() / std::max<int64_t>(features.size(1), 1), features.size(1),
          planes ? features.size(2) * features.size(3) : 0};
}

// ---- allocation

// A result of the size of feature maps. On CPUs its memory is kept from step to step.
inline Tensor empty_map(at::IntArrayRef sizes, const at::TensorOptions& options,
                        at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  if (!options.device().is_cpu()) return at::empty(sizes, options.memory_format(format));
  return Tensor(at::detail::empty_generic(sizes, cpu::kept_memory(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                          at::typeMetaToScalarType(options.dtype()), format));
}

// The gradient of features, laid out like them.
inline Tensor empty_like_features(const Tensor& features, optional<at::ScalarType> type = std::nullopt) {
  const auto options = features.options().dtype(type.value_or(features.scalar_type()));
  return empty_map(features.sizes(), options.memory_format(std::nullopt), format_of(features));
}

// The dtype of a gradient of features that is multiplied by grad_output later, see GradOf.
inline at::ScalarType unscaled_grad(const Tensor& features) {
  return features.scalar_type() == at::kHalf ? at::kFloat : features.scalar_type();
}

// `t`, or an empty tensor where an operator has nothing to return.
inline Tensor defined_or_empty(const Tensor& t, const Tensor& like) {
  return t.defined() ? t : at::empty({0}, like.options().memory_format(std::nullopt));
}

// ---- dispatch: Device::dispatch(t, name, body) calls body(T{}, device) with the type that kernels have for the dtype;
// Device::on(t, body) calls body(device)

struct Cpu {
  template <class Body>
  static void on(const Tensor&, const Body& body) {
    body(Cpu());
  }

  template <class Body>
  static void dispatch(const Tensor& t, const char* name, const Body& body) {
    switch (t.scalar_type()) {
      case at::kFloat:
        return body(float{}, Cpu());
      case at::kDouble:
        return body(double{}, Cpu());
      case at::kBFloat16:
        return body(c10::BFloat16{}, Cpu());
      case at::kHalf:
        return body(c10::Half{}, Cpu());
      default:
        TORCH_CHECK_TYPE(false, name, ": no kernel for ", t.scalar_type());
    }
  }
};

#ifdef PIXCONTRAST_WITH_CUDA
struct Cuda {
  c10::Device device;
  cudaStream_t stream;

  template <class Body>
  static void on(const Tensor& t, const Body& body) {
    const c10::cuda::CUDAGuard guard(t.device());
    body(Cuda{t.device(), c10::cuda::getCurrentCUDAStream()});
  }

  template <class Body>
  static void dispatch(const Tensor& t, const char* name, const Body& body) {
    on(t, [&](const Cuda& device) {
      switch (t.scalar_type()) {
        case at::kFloat:
          return body(float{}, device);
        case at::kBFloat16:
          return body(__nv_bfloat16{}, device);
        case at::kHalf:
          return body(__half{}, device);
        default:
          TORCH_CHECK_TYPE(false, name, ": no CUDA kernel for ", t.scalar_type(),
                           "; use float32, bfloat16 or float16, or backend=\"reference\"");
      }
    });
  }

  // Memory for a launch. PyTorch hands it out again only to later work of the same stream.
  Tensor workspace(size_t bytes) const {
    return at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte).device(device));
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device.index()));
    return value;
  }
  int sm_count() const { return attribute(cudaDevAttrMultiProcessorCount); }

  // Whether the user lets float32 matrix products be rounded to tf32.
  static bool allow_tf32() {
    return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
           at::Float32Precision::TF32;
  }

  // Whether matrix products of T go to tensor cores.
  template <class T>
  bool tensor_cores() const {
    return attribute(cudaDevAttrComputeCapabilityMajor) >= 8 && (!std::is_same_v<T, float> || allow_tf32());
  }
};

// Registers the operators of a room for each device: implement<Device>(library) calls library.impl(...).
#define PIXCONTRAST_IMPLEMENT(implement)                                     \
  TORCH_LIBRARY_IMPL(pixcontrast, CPU, library) { implement<Cpu>(library); } \
  TORCH_LIBRARY_IMPL(pixcontrast, CUDA, library) { implement<Cuda>(library); }
#else
#define PIXCONTRAST_IMPLEMENT(implement) \
  TORCH_LIBRARY_IMPL(pixcontrast, CPU, library) { implement<Cpu>(library); }
#endif

// out [n, m] = a [n, k] b [k, m] (+ bias [m]), or batches of such products without bias, by the library.
template <class Device>
void gemm(Tensor a, Tensor b, Tensor bias, Tensor out) {
  const c10::impl::ExcludeDispatchKeyGuard below(c10::autograd_dispatch_keyset | c10::autocast_dispatch_keyset);
  const Tensor result = out;
  // float16 products of the library take a hundred times as long on CPUs as those of float32
  const bool widen = std::is_same_v<Device, Cpu> && out.scalar_type() == at::kHalf;
  if (widen) {
    a = a.to(at::kFloat), b = b.to(at::kFloat), bias = bias.defined() ? bias.to(at::kFloat) : bias;
    out = at::empty(out.sizes(), a.options());
  }
  if (bias.defined()) {
    at::addmm_out(out, bias, a, b);
  } else {
    a.dim() == 3 ? at::bmm_out(out, a, b) : at::mm_out(out, a, b);
  }
  if (widen) result.copy_(out);
}

}  // namespace pixcontrast
