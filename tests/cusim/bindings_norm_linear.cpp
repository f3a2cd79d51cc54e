// The kernels of norm_linear for the tests: `type` is 0 for float, 1 for bfloat16, 2 for half. `workspace` has `room`
// bytes; -1 is returned if they are too few. `start` and `order` may be null.
#include "bindings.h"
#include "norm_linear/norm_linear.h"

using namespace pixcontrast;

extern "C" int64_t run_norm_stats(int64_t type, int64_t rows, int64_t classes, int64_t width, const int64_t* start,
                                  const int64_t* count, const void* hidden, const int64_t* order, int64_t training,
                                  double momentum, double eps, const float* hidden_bias, float* running_mean,
                                  float* running_var, int64_t* batches, void* workspace, int64_t room, float* mean,
                                  float* rstd, float* share) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const NormStats<T> args{{{rows, classes, start, count}, width, static_cast<const T*>(hidden), order},
                            training != 0,
                            static_cast<float>(momentum),
                            static_cast<float>(eps),
                            hidden_bias,
                            running_mean,
                            running_var,
                            batches,
                            mean,
                            rstd,
                            share};
    if (norm_workspace(args.rows) > static_cast<size_t>(room)) return int64_t{-1};
    return static_cast<int64_t>(norm_stats_cuda(args, workspace, nullptr));
  });
}

// norm: mean, rstd, norm_weight, norm_bias one after another, [4, C, E]. Without weight: dense, `out` are activations.
extern "C" int64_t run_norm_forward(int64_t type, int64_t rows, int64_t classes, int64_t width, const int64_t* start,
                                    const int64_t* count, const void* hidden, const int64_t* order, double slope,
                                    const float* norm, const float* weight, const float* bias, void* out) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const int64_t size = classes * width;
    NormLinear<T> args{};
    args.rows = {{rows, classes, start, count}, width, static_cast<const T*>(hidden), order};
    args.slope = static_cast<float>(slope);
    args.mean = norm, args.rstd = norm + size, args.norm_weight = norm + 2 * size, args.norm_bias = norm + 3 * size;
    args.weight = weight, args.bias = bias;
    args.activations = weight ? nullptr : static_cast<T*>(out);
    args.out = weight ? static_cast<float*>(out) : nullptr;
    return static_cast<int64_t>(norm_forward_cuda(args, nullptr));
  });
}

// grads: those of norm_weight, norm_bias, hidden_bias and weight, [4, C, E].
extern "C" int64_t run_norm_backward(int64_t type, int64_t rows, int64_t classes, int64_t width, const int64_t* start,
                                     const int64_t* count, const void* hidden, const int64_t* order, double slope,
                                     const float* norm, const float* weight, const float* share, const void* grad,
                                     void* workspace, int64_t room, void* grad_hidden, float* grads, float* grad_bias) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const int64_t size = classes * width;
    NormLinear<T> args{};
    args.rows = {{rows, classes, start, count}, width, static_cast<const T*>(hidden), order};
    args.slope = static_cast<float>(slope);
    args.mean = norm, args.rstd = norm + size, args.norm_weight = norm + 2 * size, args.norm_bias = norm + 3 * size;
    args.weight = weight, args.share = share;
    args.grad_activations = weight ? nullptr : static_cast<const T*>(grad);
    args.grad_out = weight ? static_cast<const float*>(grad) : nullptr;
    args.grad_hidden = static_cast<T*>(grad_hidden);
    args.grad_norm_weight = grads, args.grad_norm_bias = grads + size, args.grad_hidden_bias = grads + 2 * size;
    args.grad_weight = grads + 3 * size, args.grad_bias = grad_bias;
    if (norm_workspace(args.rows) > static_cast<size_t>(room)) return int64_t{-1};
    return static_cast<int64_t>(norm_backward_cuda(args, workspace, nullptr));
  });
}
