// The inner loops over pairs of rows and their products z, compiled for several instruction sets and chosen when the
// program runs.
#pragma once

#include "common/cpu/product.h"

namespace pixcontrast::cpu {

template <class A>
struct PairKernels {
  void (*product)(const Product<A, A>& args);

  // The following are for z of one anchor and `count` keys.

  // The largest of z, count > 0.
  A (*largest)(const A* z, int64_t count);
  // z = e^(scale z - shift), for shift >= scale z; returns their sum. Here and below, z that is not finite gives NaN.
  A (*exponentials)(A* z, int64_t count, A scale, A shift);
  // z = sigma(away - scale z); returns their sum, and adds the sum of log(1 + e^(away - scale z)) to *softplus.
  A (*positives)(A* z, int64_t count, A scale, A away, A* softplus);

  // The same for z [keys, columns] of some anchors, each a column, a multiple of kColumnStep of them. All else is
  // [columns]; sums are added to.

  void (*column_largest)(const A* z, int64_t keys, int64_t stride, int64_t columns, A* largest);
  void (*column_exponentials)(A* z, int64_t keys, int64_t stride, int64_t columns, A scale, const A* shift, A* sum);
  void (*column_positives)(A* z, int64_t keys, int64_t stride, int64_t columns, A scale, const A* away, A* sum,
                           A* softplus);
};

template <class A>
const PairKernels<A>& pair_kernels();

}  // namespace pixcontrast::cpu
