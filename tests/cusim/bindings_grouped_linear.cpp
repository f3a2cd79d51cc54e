// The grouped products for the tests: `type` is 0 for float, 1 for bfloat16, 2 for half. `workspace` has `room` bytes.
#include "bindings.h"
#include "grouped_linear/grouped_linear.h"

using namespace pixcontrast;

extern "C" int64_t run_grouped_linear(int64_t type, int64_t tensor_cores, int64_t rows, int64_t classes,
                                      const int64_t* start, const int64_t* count, int64_t dim, int64_t outputs,
                                      const void* x, const void* weight, void* result) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const GroupedLinear<T> args{
        {rows, classes, start, count}, dim, outputs, static_cast<const T*>(x), static_cast<const T*>(weight),
        static_cast<T*>(result)};
    return static_cast<int64_t>(grouped_linear_cuda(args, tensor_cores != 0, nullptr));
  });
}

extern "C" int64_t run_grouped_outer(int64_t type, int64_t tensor_cores, int64_t rows, int64_t classes,
                                     const int64_t* start, const int64_t* count, int64_t outputs, int64_t dim,
                                     const void* left, const void* right, void* workspace, int64_t room, void* result) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    const GroupedOuter<T> args{
        {rows, classes, start, count}, outputs, dim, static_cast<const T*>(left), static_cast<const T*>(right),
        static_cast<T*>(result)};
    if (grouped_outer_cuda_workspace(args) > static_cast<size_t>(room)) return int64_t{-1};
    return static_cast<int64_t>(grouped_outer_cuda(args, tensor_cores != 0, workspace, nullptr));
  });
}
