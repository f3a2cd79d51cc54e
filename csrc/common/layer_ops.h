// What the files of the operators with layers in them (selectors, heads) share beyond ops.h.
#pragma once

#include "common/cpu/row_products.h"
#include "common/old_tensor.h"

namespace pixcontrast {

// `t` contiguous, if it has these sizes, the dtype that sums of `like` are kept in, and its device.
inline Tensor checked(const Tensor& t, const char* name, at::IntArrayRef sizes, const Tensor& like) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must be ", sizes, ", got ", t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == accumulation(like), name, " must be ", accumulation(like), ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.device() == like.device(), name, " must be on ", like.device());
  return t.contiguous();
}

// `t` contiguous, if it is a matrix that products take in `dtype`, see cpu::Source.
inline Tensor multipliable(const Tensor& t, const char* name, at::ScalarType dtype) {
  const bool rounds = t.scalar_type() == at::kFloat && (dtype == at::kBFloat16 || dtype == at::kHalf);
  TORCH_CHECK_TYPE(t.scalar_type() == dtype || rounds, name, " must be ", dtype, ", got ", t.scalar_type());
  return t.contiguous();
}

template <class T>
cpu::Source<T> source(const Tensor& t) {
  return {t.const_data_ptr(), t.size(-1), t.scalar_type() == at::kFloat};
}

}  // namespace pixcontrast
