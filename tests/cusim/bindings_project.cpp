// The operator project for the tests: `type` is 0 for float, 1 for bfloat16, 2 for half. Without a workspace
// run_project_backward only says in *bytes how many bytes it needs.
#include "bindings.h"
#include "project_cuda.h"

using namespace pixcontrast;

namespace {

__global__ void store(int64_t* to, const int64_t number) { *to = number; }

}  // namespace

extern "C" int64_t run_project(int64_t type, int64_t tensor_cores, int64_t pixels, int64_t dim, int64_t map_pixels,
                               int64_t rows, int64_t outputs, const void* features, const int64_t* index,
                               const void* weight, const void* bias, void* result) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const Project<T> args{{pixels, dim, map_pixels},
                          rows,
                          outputs,
                          static_cast<const T*>(features),
                          index,
                          static_cast<const T*>(weight),
                          static_cast<const T*>(bias),
                          static_cast<T*>(result)};
    return static_cast<int64_t>(project_cuda(args, tensor_cores != 0, nullptr));
  });
}

extern "C" int64_t run_project_backward(int64_t type, int64_t tensor_cores, int64_t pixels, int64_t dim,
                                        int64_t map_pixels, int64_t rows, int64_t outputs, const void* features,
                                        const int64_t* index, const int64_t* order, const void* weight,
                                        const void* grad, void* grad_features, void* grad_weight, void* grad_bias,
                                        void* workspace, int64_t* bytes) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const ProjectBackward<T> args{{pixels, dim, map_pixels},
                                  rows,
                                  outputs,
                                  static_cast<const T*>(features),
                                  index,
                                  order,
                                  static_cast<const T*>(weight),
                                  static_cast<const T*>(grad),
                                  static_cast<T*>(grad_features),
                                  static_cast<T*>(grad_weight),
                                  static_cast<T*>(grad_bias)};
    if (!workspace) {
      const auto size = static_cast<int64_t>(project_backward_cuda_workspace(args));
      return static_cast<int64_t>(cu_launch(store, dim3(1), dim3(1), 0, nullptr, bytes, size));
    }
    return static_cast<int64_t>(project_backward_cuda(args, tensor_cores != 0, workspace, nullptr));
  });
}
