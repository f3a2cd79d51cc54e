// Rows of a class stand together: what every operator that works class by class takes. No torch header.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

// Rows [P, .] of which start[c] to start[c] + count[c] - 1 are of class c. Segments ascend and do not overlap; rows
// outside of all segments are not valid. `order` and class_order() make them of a label map; in a memory [C, N, D],
// start[c] is c N and count[c] the number of filled rows.
struct Segments {
  int64_t rows;          // P
  int64_t classes;       // C
  const int64_t* start;  // [C]
  const int64_t* count;  // [C]

  PIXCONTRAST_HOST_DEVICE int64_t end(int64_t c) const { return start[c] + count[c]; }
};

}  // namespace pixcontrast
