// The heads for the tests: `type` is 0 for float, 1 for bfloat16, 2 for half. `workspace` has `room` bytes; -1 is
// returned if they are too few.
#include "bindings.h"
#include "head_cuda.h"

using namespace pixcontrast;

extern "C" int64_t run_moments(int64_t type, int64_t rows, int64_t width, const void* hidden, const bool* valid,
                               void* workspace, int64_t room, float* mean, float* variance, int64_t* count) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const HeadMomentsCuda<T> args{{static_cast<const T*>(hidden), rows, width, valid}, mean, variance, count};
    if (head_moments_cuda_workspace(args) > static_cast<size_t>(room)) return int64_t{-1};
    return static_cast<int64_t>(head_moments_cuda(args, workspace, nullptr));
  });
}

extern "C" int64_t run_head(int64_t type, int64_t tensor_cores, int64_t rows, int64_t width, int64_t outputs,
                            const void* hidden, const bool* valid, const float* mean, const float* rstd,
                            const float* norm_weight, const float* norm_bias, const void* weight, const float* bias,
                            void* workspace, int64_t room, void* out) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const HeadCuda<T> args{{static_cast<const T*>(hidden), rows, width, valid},
                           {mean, rstd, norm_weight, norm_bias},
                           outputs,
                           static_cast<const T*>(weight),
                           bias,
                           static_cast<T*>(out)};
    if (head_cuda_workspace(args) > static_cast<size_t>(room)) return int64_t{-1};
    return static_cast<int64_t>(head_cuda(args, tensor_cores != 0, workspace, nullptr));
  });
}

extern "C" int64_t run_head_backward(int64_t type, int64_t tensor_cores, int64_t rows, int64_t width, int64_t outputs,
                                     const void* hidden, const bool* valid, const float* mean, const float* rstd,
                                     const float* norm_weight, const float* norm_bias, const void* weight,
                                     const void* grad, const float* share, void* workspace, int64_t room,
                                     void* grad_hidden, float* grad_norm_weight, float* grad_norm_bias,
                                     float* grad_weight, float* grad_bias) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const HeadBackwardCuda<T> args{{static_cast<const T*>(hidden), rows, width, valid},
                                   {mean, rstd, norm_weight, norm_bias},
                                   outputs,
                                   static_cast<const T*>(weight),
                                   static_cast<const T*>(grad),
                                   share,
                                   static_cast<T*>(grad_hidden),
                                   grad_norm_weight,
                                   grad_norm_bias,
                                   grad_weight,
                                   grad_bias};
    if (head_backward_cuda_workspace(args) > static_cast<size_t>(room)) return int64_t{-1};
    return static_cast<int64_t>(head_backward_cuda(args, tensor_cores != 0, workspace, nullptr));
  });
}
