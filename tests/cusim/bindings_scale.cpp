// The kernel scale_ for the tests: `type` is 0 for float, 1 for bfloat16, 2 for half; `skipped` numbers come before it.
#include "cuda/device.cuh"
#include "scale_cuda.h"

using namespace pixcontrast;

extern "C" int64_t run_scale(int64_t type, void* numbers, int64_t skipped, int64_t count, const float* factor) {
  if (type == 0) return scale_cuda(static_cast<float*>(numbers) + skipped, count, factor, 2, nullptr);
  if (type == 1) return scale_cuda(static_cast<__nv_bfloat16*>(numbers) + skipped, count, factor, 2, nullptr);
  return scale_cuda(static_cast<__half*>(numbers) + skipped, count, factor, 2, nullptr);
}
