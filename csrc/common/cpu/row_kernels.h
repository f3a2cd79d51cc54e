// The inner loops over one row of D channels, compiled for several instruction sets and chosen when the program runs.
#pragma once

#include <cstdint>

namespace pixcontrast::cpu {

// y = scale * (x - centre) + bias, each [D]; then leaky(y) = y for y > 0, else slope * y.
template <class A>
struct Norm {
  const A *centre, *scale, *bias;
  A slope;
};

template <class A>
struct RowKernels {
  // x [D], y [D]: *square = <x, x>, *product = <x, y>
  void (*square_and_dot)(const A* x, const A* y, int64_t dim, A* square, A* product);
  // out [D] = alpha * y + beta * x, past the caches if `stream` and the address allows it (then call fence());
  // and, unless sum is null, sum [D] += gamma * x on the same way
  void (*combine)(A alpha, const A* y, A beta, const A* x, int64_t dim, bool stream, A* out, A gamma, A* sum);
  // sum [D] += alpha * x
  void (*accumulate)(A alpha, const A* x, int64_t dim, A* sum);
  // sum [D] += the sum of share[r] x_r/|x_r| over the rows x_r of x [rows, D], without those of a norm below `floor`
  void (*add_unit_rows)(const A* x, const A* share, int64_t rows, int64_t dim, A floor, A* sum);
  // score[i] = sigma(logit[i]) / exp(shift[i]), without shift (null): sigma(logit[i]). With min(largest logit of the
  // class, 0) as shift, the largest score of a class never underflows.
  void (*score)(const A* logit, const A* shift, int64_t count, A* score);
  // sum [D] += x - pivot, squares [D] += (x - pivot)^2
  void (*add_deviations)(const A* x, const A* pivot, int64_t dim, A* sum, A* squares);
  // out [D] = leaky(y)
  void (*leaky)(const A* x, const Norm<A>& norm, int64_t dim, A* out);
  // <weight [D], leaky(y)>
  A (*leaky_dot)(const A* x, const Norm<A>& norm, const A* weight, int64_t dim);
  // With s = grad * leaky'(y), for grad [D] or, unless `dense`, []: ones [D] += s, products [D] += s * (x - centre).
  void (*leaky_sums)(const A* x, const Norm<A>& norm, const A* grad, bool dense, int64_t dim, A* ones, A* products);
  // out [D] = factor * s + shift + tilt * (x - centre)
  void (*leaky_backward)(const A* x, const Norm<A>& norm, const A* grad, bool dense, const A* factor, const A* shift,
                         const A* tilt, int64_t dim, A* out);
};

// Makes streamed stores visible to other threads.
void fence();

// "avx512_bf16", "avx512", "avx2" or "baseline"; PIXCONTRAST_CPU_CAPABILITY can ask for a lesser one than the machine
// has.
const char* capability();

template <class A>
const RowKernels<A>& row_kernels();

}  // namespace pixcontrast::cpu
