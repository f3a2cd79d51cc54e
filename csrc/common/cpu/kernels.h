// The inner loops over rows, and over pairs of rows and their products z, compiled for several instruction sets and
// chosen when the program runs.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <utility>

namespace pixcontrast::cpu {

// ---- products

constexpr int64_t kColumnStep = 16;  // products are made for a multiple of so many columns

constexpr int64_t padded(int64_t columns) { return (columns + kColumnStep - 1) / kColumnStep * kColumnStep; }

// out [rows, columns] = or += left [rows, units] right [units, columns].
//
// A unit is an element, or a pair of bfloat16 (see below). Columns of right and out lie side by side, left lies in any
// order: so rows of keys can be the left operand, and the transpose of a result, neither of them rearranged.
template <class Unit, class A>
struct Product {
  int64_t rows, units, columns;
  const Unit* left;
  int64_t left_row, left_unit;  // elements from one to the next
  const Unit* right;
  int64_t right_unit;
  A* out;
  int64_t out_row;
  bool add;
  int64_t ahead = 0;  // prefetch distance in left, in units; 0: no prefetch
};

// Calls tile(first row, std::integral_constant<int, rows of the tile>) for tiles of much the same size, at most Most.
template <int Most, class Tile, int... Less>
inline __attribute__((always_inline)) void for_row_tiles(int64_t rows, const Tile& tile,
                                                         std::integer_sequence<int, Less...>) {
  const int64_t tiles = (rows + Most - 1) / Most;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
    (void)((count == Less + 1 && (tile(first, std::integral_constant<int, Less + 1>()), true)) || ...);
  }
}

// ---- bfloat16 in pairs, summed in float32, by the instruction vdpbf16ps; only where has_bf16() says so
//
// A pair is 32 bits, the first element below. The left operand of a product has neighbours of a row as pairs, as rows
// lie in memory; the right one neighbours of a column, as pair_rows() makes them.

// Whether the processor has the instruction, and PIXCONTRAST_CPU_CAPABILITY does not ask for less.
bool has_bf16();

void bf16_product(const Product<uint32_t, float>& args);

// to [count] = elements, rounded to the nearest, ties to even; and the way back.
void round(const float* elements, int64_t count, c10::BFloat16* to);
void widen(const c10::BFloat16* elements, int64_t count, float* to);

// to [ceil(count / 2), columns] = pairs of rows [count, columns] that follow each other, `stride` from row to row;
// columns are a multiple of kColumnStep. The last row of an odd count has zeros beside it.
void pair_rows(const c10::BFloat16* rows, int64_t stride, int64_t count, int64_t columns, uint32_t* to);

// The same for rows [count, columns] of float32, which are rounded, in their own place: pairs lie `stride` from each
// other, too. sum [columns], unless it is null, += the rounded elements.
void round_to_pairs(float* rows, int64_t count, int64_t stride, int64_t columns, float* sum);

// ---- one row of D channels

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
  // to [columns, rows] = the transpose of from [rows, columns]; strides from row to row
  void (*transpose)(const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to, int64_t to_stride);
};

// ---- pairs of rows

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

// Makes streamed stores visible to other threads.
void fence();

// "avx512_bf16", "avx512", "avx2" or "baseline"; PIXCONTRAST_CPU_CAPABILITY can ask for a lesser one than the machine
// has.
const char* capability();

template <class A>
const RowKernels<A>& row_kernels();
template <class A>
const PairKernels<A>& pair_kernels();

}  // namespace pixcontrast::cpu
