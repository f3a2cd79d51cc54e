// The kernels of scale for the tests: `type` and `dtype` are 0 for float, 1 for bfloat16, 2 for half.
#include "bindings.h"
#include "scale/scale.h"

using namespace pixcontrast;

extern "C" int64_t run_unit_rows(int64_t type, int64_t rows, int64_t dim, const void* from, void* to) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    return static_cast<int64_t>(
        unit_rows_cuda(UnitRows<T>{rows, dim, static_cast<const T*>(from), static_cast<T*>(to)}, nullptr));
  });
}

// Two tensors, `skipped` elements into the memory of the first.
extern "C" int64_t run_scale(int64_t dtype, void* first, int64_t skipped, int64_t count, int64_t other_dtype,
                             void* second, int64_t other_count, const float* factor) {
  Scale args{};
  args.factor = factor;
  args.tensors = 2;
  const auto bytes = [](int64_t dtype) { return dtype == 0 ? 4 : 2; };
  args.tensor[0] = {static_cast<char*>(first) + skipped * bytes(dtype), count, static_cast<Dtype>(dtype)};
  args.tensor[1] = {second, other_count, static_cast<Dtype>(other_dtype)};
  return static_cast<int64_t>(scale_cuda(args, 2, nullptr));
}

// The calls that LargestSharedMemory makes for a row of requests (kernel, device, bytes, status of the call) [count,
// 4].
extern "C" int64_t run_largest_shared_memory(const int64_t* requests, int64_t count, int64_t* called) {
  cuda::LargestSharedMemory largest;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* const request = requests + 4 * i;
    called[i] = 0;
    const auto set = [&] {
      called[i] = 1;
      return static_cast<int>(request[3]);
    };
    const auto status = largest.raise(reinterpret_cast<const void*>(request[0]), request[1], request[2], set);
    if (status != (called[i] ? request[3] : 0)) return 1;
  }
  return 0;
}
