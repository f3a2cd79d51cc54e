// Positive objective and class means for the tests: `type` is 0 for float, 1 for bfloat16, 2 for half. Without
// a workspace a call only says in *bytes how many bytes it needs.
#include "bindings.h"
#include "class_mean/class_mean.h"
#include "positive/positive.h"

using namespace pixcontrast;

namespace {

__global__ void store(int64_t* to, const int64_t number) { *to = number; }

int64_t store_bytes(int64_t* to, size_t bytes) { return cu_launch(store, dim3(1), dim3(1), 0, nullptr, to, bytes); }

}  // namespace

extern "C" int64_t run_positive(int64_t type, int64_t sm_count, int64_t pixels, int64_t dim, int64_t map_pixels,
                                int64_t classes, int64_t ignore_index, double loss_weight, const void* features,
                                const int64_t* labels, const float* weights, const float* mean,
                                const int64_t* memory_counts, float* loss, float* class_loss, int64_t* class_pixels,
                                int64_t* unknown, void* grad_features, float* grad_weights, float* grad_mean,
                                void* workspace, int64_t* bytes) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const Positive<T> args{{pixels, dim, map_pixels},
                           classes,
                           ignore_index,
                           loss_weight,
                           static_cast<const T*>(features),
                           labels,
                           weights,
                           mean,
                           memory_counts,
                           loss,
                           class_loss,
                           class_pixels,
                           unknown,
                           grad_features,
                           grad_weights,
                           grad_mean};
    if (!workspace) return store_bytes(bytes, positive_cuda_workspace(args, static_cast<int>(sm_count)));
    return static_cast<int64_t>(positive_cuda(args, static_cast<int>(sm_count), workspace, nullptr));
  });
}

// With grad_mean: the backward form.
extern "C" int64_t run_class_mean(int64_t type, int64_t classes, int64_t capacity, int64_t dim, const void* queue,
                                  const int64_t* counts, const float* weights, float* mean, const float* grad_mean,
                                  float* grad_weights, void* workspace, int64_t* bytes) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const ClassMean<T> args{classes, capacity,  dim,         static_cast<const T*>(queue), counts, weights,
                            mean,    grad_mean, grad_weights};
    if (grad_mean) return static_cast<int64_t>(class_mean_backward_cuda(args, nullptr));
    if (!workspace) return store_bytes(bytes, class_mean_cuda_workspace(args));
    return static_cast<int64_t>(class_mean_cuda(args, workspace, nullptr));
  });
}
