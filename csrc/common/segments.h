// Rows of a class stand together: what every operator that works class by class takes. No torch header.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

// Rows [P, .] of which begin(c) to end(c) - 1 are of class c. Segments ascend and do not overlap; rows outside of all
// segments are not valid. class_order makes start and count of a label map. Without start, segments lie P / C rows
// apart: one segment of all valid rows, or the filled rows of a memory [C, N, D].
struct Segments {
  int64_t rows;          // P
  int64_t classes;       // C
  const int64_t* start;  // [C] or null
  const int64_t* count;  // [C]

  PIXCONTRAST_HOST_DEVICE int64_t begin(int64_t c) const { return start ? start[c] : c * (rows / classes); }
  PIXCONTRAST_HOST_DEVICE int64_t end(int64_t c) const { return begin(c) + count[c]; }
};

}  // namespace pixcontrast
