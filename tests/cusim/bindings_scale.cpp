// The kernel scale_ for the tests: `type` is 0 for float, 1 for bfloat16, 2 for half; `skipped` numbers come before it.
#include "bindings.h"
#include "scale_cuda.h"

using namespace pixcontrast;

extern "C" int64_t run_scale(int64_t type, void* numbers, int64_t skipped, int64_t count, const float* factor) {
  return with_type(type, [&](auto one) {
    return static_cast<int64_t>(scale_cuda(static_cast<decltype(one)*>(numbers) + skipped, count, factor, 2, nullptr));
  });
}
