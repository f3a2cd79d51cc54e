// The kernels of class_order for the tests. Without a workspace run_class_order only says in *bytes how many bytes it
// needs.
#include "bindings.h"
#include "class_order/class_order.h"

using namespace pixcontrast;

namespace {

__global__ void store(int64_t* to, const int64_t number) { *to = number; }

}  // namespace

extern "C" int64_t run_class_order(int64_t rows, int64_t classes, const int64_t* labels, int64_t* order,
                                   int64_t* sorted_labels, int64_t* start, int64_t* count, int64_t* total,
                                   void* workspace, int64_t* bytes) {
  const ClassOrder args{rows, classes, labels, order, sorted_labels, start, count, total};
  if (!workspace) {
    const auto size = static_cast<int64_t>(class_order_cuda_workspace(args));
    return static_cast<int64_t>(cu_launch(store, dim3(1), dim3(1), 0, nullptr, bytes, size));
  }
  return static_cast<int64_t>(class_order_cuda(args, workspace, nullptr));
}

extern "C" int64_t run_labels_at(int64_t batch, int64_t full_height, int64_t full_width, int64_t height, int64_t width,
                                 int64_t classes, int64_t ignore_index, const int64_t* labels, int64_t* result) {
  const LabelsAt args{batch, full_height, full_width, height, width, classes, ignore_index, labels, result};
  return static_cast<int64_t>(labels_at_cuda(args, nullptr));
}
