// The inner loops over one row of D channels, compiled for several instruction sets and chosen when the program runs.
#pragma once

#include <cstdint>

namespace pixcontrast::cpu {

template <class A>
struct RowKernels {
  // x [D], y [D]: *square = <x, x>, *product = <x, y>
  void (*square_and_dot)(const A* x, const A* y, int64_t dim, A* square, A* product);
  // out [D] = alpha * y + beta * x, past the caches if `stream` and the address allows it (then call fence());
  // and, unless sum is null, sum [D] += gamma * x on the same way
  void (*combine)(A alpha, const A* y, A beta, const A* x, int64_t dim, bool stream, A* out, A gamma, A* sum);
  // sum [D] += alpha * x
  void (*accumulate)(A alpha, const A* x, int64_t dim, A* sum);
  // score[i] = sigma(logit[i]) / exp(shift[i]), without shift (null): sigma(logit[i]). With min(largest logit of the
  // class, 0) as shift, the largest score of a class never underflows.
  void (*score)(const A* logit, const A* shift, int64_t count, A* score);
  // Largest of z [count], count > 0.
  A (*largest)(const A* z, int64_t count);
  // z [count] = e^(scale z - shift), for shift >= scale z; returns their sum.
  A (*exponentials)(A* z, int64_t count, A scale, A shift);
  // z [count] = sigma(away - scale z); returns their sum, and adds the sum of log(1 + e^(away - scale z)) to *softplus.
  A (*positives)(A* z, int64_t count, A scale, A away, A* softplus);
};

// Makes streamed stores visible to other threads.
void fence();

// "avx512", "avx2" or "baseline"; PIXCONTRAST_CPU_CAPABILITY can ask for a lesser one than the machine has.
const char* capability();

template <class A>
const RowKernels<A>& row_kernels();

}  // namespace pixcontrast::cpu
