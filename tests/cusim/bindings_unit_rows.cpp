// The kernel of unit_rows for the tests: `type` is 0 for float, 1 for bfloat16, 2 for half.
#include "bindings.h"
#include "unit_rows/unit_rows.h"

using namespace pixcontrast;

extern "C" int64_t run_unit_rows(int64_t type, int64_t rows, int64_t dim, const void* from, void* to) {
  return with_type(type, [&](auto one) {
    using T = decltype(one);
    return static_cast<int64_t>(
        unit_rows_cuda(UnitRows<T>{rows, dim, static_cast<const T*>(from), static_cast<T*>(to)}, nullptr));
  });
}
