// Matrix products by the library. An index that runs through all pixels in order, holes or not, needs no gather: the
// products read the features, and write their gradient, where they lie. Any other index is sorted, so that it walks
// through the features once, and gathered a tile at a time.
#include <ATen/ATen.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <vector>

#include "common/cpu/parallel.h"
#include "project.h"

namespace pixcontrast {
namespace {

using at::Tensor;

constexpr int64_t kTilePixels = 256;
constexpr int64_t kLeastImage = 64;  // pixels of an image that make a product of its own worthwhile

// The dtype of products: those of the library in half precision are a hundred times slower than in float32.
template <class T>
using Factor = std::conditional_t<std::is_same_v<T, c10::Half>, float, T>;

template <class T>
constexpr at::ScalarType dtype = at::CppTypeToScalarType<T>::value;

template <class T>
Tensor view(const T* numbers, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::from_blob(const_cast<T*>(numbers), sizes, strides, dtype<T>);
}

template <class T>
Tensor matrix(const T* numbers, int64_t rows, int64_t columns) {
  return view(numbers, {rows, columns}, {columns, 1});
}

// out [n, m] = a [n, k] b [k, m] (+ bias [m])
void multiply(const Tensor& a, const Tensor& b, const Tensor& bias, Tensor out) {
  if (bias.defined()) {
    at::addmm_out(out, bias, a, b);
  } else {
    at::mm_out(out, a, b);
  }
}

// Whether row r means pixel r or none, for all r, and products of whole images pay.
template <class Args>
bool in_order(const Args& args) {
  const int64_t inside = args.layout.map_pixels;
  if (args.rows != args.layout.pixels || (inside > 0 && inside < kLeastImage)) return false;
  for (int64_t r = 0; r < args.rows; ++r) {
    if (args.index[r] >= 0 && args.index[r] != r) return false;
  }
  return true;
}

// Calls body(pixels [n, D], first) for every image, or once for all rows: a view, and which pixel comes first.
template <class T, class Body>
void for_images(const T* features, const FeatureLayout& layout, const Body& body) {
  const int64_t inside = layout.map_pixels, dim = layout.dim;
  if (inside == 0) return body(matrix(features, layout.pixels, dim), 0);
  for (int64_t first = 0; first < layout.pixels; first += inside) {
    body(view(features + first * dim, {inside, dim}, {1, inside}), first);
  }
}

// The rows that have a pixel, sorted by pixel (rows of one pixel keep their order), a tile at a time.
template <class T>
class SortedTiles {
  using F = Factor<T>;

 public:
  SortedTiles(const FeatureLayout& layout, const int64_t* index, int64_t count)
      : layout_(layout), start_(kTilePixels), room_(at::empty({kTilePixels * layout.dim}, dtype<F>)) {
    std::tie(pixel_, row_) = at::sort(view(index, {count}, {1}), /*stable=*/std::optional<bool>(true));
    const int64_t holes = (pixel_ < 0).sum().template item<int64_t>();
    pixel_ = pixel_.narrow(0, holes, count - holes);
    row_ = row_.narrow(0, holes, count - holes);
  }

  // Calls body(rows) with the next rows [n] int64; in it, read() and so on are about their pixels.
  template <class Body>
  void for_each(const Body& body) {
    const auto* const pixel = pixel_.template const_data_ptr<int64_t>();
    const int64_t inside = layout_.map_pixels, dim = layout_.dim;
    for (int64_t first = 0; first < row_.numel(); first += kTilePixels) {
      count_ = std::min(kTilePixels, row_.numel() - first);
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t p = pixel[first + i];
        start_[i] = inside ? p / inside * dim * inside + p % inside : p * dim;
      }
      body(row_.narrow(0, first, count_));
    }
  }

  // Room for the pixels as a matrix [n, D].
  Tensor pixels() {
    auto* const numbers = room_.template data_ptr<F>();
    if (layout_.map_pixels == 0) return matrix(numbers, count_, layout_.dim);
    return view(numbers, {count_, layout_.dim}, {1, kTilePixels});
  }

  // pixels(), filled from the features.
  Tensor read(const T* features) {
    auto* const to = room_.template data_ptr<F>();
    for_numbers([&](int64_t from, int64_t at) { to[at] = static_cast<F>(features[from]); });
    return pixels();
  }

  // Adds pixels() to the features, in the order of the rows.
  void add_to(T* features) {
    const auto* const from = room_.template const_data_ptr<F>();
    for_numbers([&](int64_t to, int64_t at) { features[to] += static_cast<T>(from[at]); });
  }

 private:
  // move(place in the features, place in the room). Each thread has channels of its own.
  template <class Move>
  void for_numbers(const Move& move) {
    const int64_t inside = layout_.map_pixels, dim = layout_.dim, count = count_;
    const int64_t* const start = start_.data();
    cpu::Pieces(dim, 16, 16).run([&](int64_t, int64_t first, int64_t last) {
      if (inside) {
        for (int64_t d = first; d < last; ++d)
          for (int64_t i = 0; i < count; ++i) move(start[i] + d * inside, d * kTilePixels + i);
      } else {
        for (int64_t i = 0; i < count; ++i)
          for (int64_t d = first; d < last; ++d) move(start[i] + d, i * dim + d);
      }
    });
  }

  const FeatureLayout& layout_;
  Tensor pixel_, row_;          // [U] int64
  int64_t count_ = 0;           // pixels in the tile
  std::vector<int64_t> start_;  // [kTilePixels] where the first channel of each is
  Tensor room_;                 // [kTilePixels, D] for rows, [D, kTilePixels] for maps
};

template <class T>
Tensor weight_of(const T* weight, int64_t outputs, int64_t dim) {
  return matrix(weight, outputs, dim).to(dtype<Factor<T>>);
}

template <class T>
void project_images(const Project<T>& args, const Tensor& weight, const Tensor& bias, const Tensor& result) {
  for_images(args.features, args.layout, [&](const Tensor& pixels, int64_t first) {
    multiply(pixels, weight.t(), bias, result.narrow(0, first, pixels.size(0)));
  });
  for (int64_t r = 0; r < args.rows; ++r) {
    if (args.index[r] < 0) std::fill_n(args.result + r * args.outputs, args.outputs, T(0));
  }
}

template <class T>
void project_tiles(const Project<T>& args, const Tensor& weight, const Tensor& bias, Tensor result) {
  result.zero_();
  SortedTiles<T> tiles(args.layout, args.index, args.rows);
  Tensor product = at::empty({kTilePixels, args.outputs}, weight.options());
  tiles.for_each([&](const Tensor& rows) {
    const Tensor part = product.narrow(0, 0, rows.numel());
    multiply(tiles.read(args.features), weight.t(), bias, part);
    result.index_copy_(0, rows, part.to(dtype<T>));
  });
}

// dW over whole images [Dout, Din]; grad [R, Dout] is zero in holes.
template <class T>
Tensor weight_gradient_images(const ProjectBackward<T>& args, const Tensor& grad) {
  Tensor sum = at::zeros({args.outputs, args.layout.dim}, dtype<Acc<T>>);
  for_images(args.features, args.layout, [&](const Tensor& pixels, int64_t first) {
    sum.add_(at::mm(grad.narrow(0, first, pixels.size(0)).t(), pixels));
  });
  return sum;
}

template <class T>
Tensor weight_gradient_tiles(const ProjectBackward<T>& args, const Tensor& grad) {
  Tensor sum = at::zeros({args.outputs, args.layout.dim}, dtype<Acc<T>>);
  SortedTiles<T> tiles(args.layout, args.index, args.rows);
  tiles.for_each([&](const Tensor& rows) {
    sum.add_(at::mm(grad.index_select(0, rows).to(dtype<Factor<T>>).t(), tiles.read(args.features)));
  });
  return sum;
}

template <class T>
void feature_gradient_images(const ProjectBackward<T>& args, const Tensor& grad, const Tensor& weight) {
  for_images(args.grad_features, args.layout, [&](const Tensor& pixels, int64_t first) {
    multiply(grad.narrow(0, first, pixels.size(0)), weight, {}, pixels);
  });
}

template <class T>
void feature_gradient_tiles(const ProjectBackward<T>& args, const Tensor& grad, const Tensor& weight) {
  view(args.grad_features, {args.layout.pixels * args.layout.dim}, {1}).zero_();
  SortedTiles<T> tiles(args.layout, args.index, args.rows);
  tiles.for_each([&](const Tensor& rows) {
    multiply(grad.index_select(0, rows).to(weight.scalar_type()), weight, {}, tiles.pixels());
    tiles.add_to(args.grad_features);
  });
}

}  // namespace

template <class T>
void project_cpu(const Project<T>& args) {
  const Tensor weight = weight_of(args.weight, args.outputs, args.layout.dim);
  const Tensor bias = args.bias ? view(args.bias, {args.outputs}, {1}).to(weight.scalar_type()) : Tensor();
  const Tensor result = matrix(args.result, args.rows, args.outputs);
  const bool whole = std::is_same_v<T, Factor<T>> && in_order(args);
  whole ? project_images(args, weight, bias, result) : project_tiles(args, weight, bias, result);
}

namespace {

// Whether the gradient of rows without pixel is zero as it comes.
template <class T>
bool zero_in_holes(const ProjectBackward<T>& args) {
  for (int64_t r = 0; r < args.rows; ++r) {
    const T* const row = args.grad + r * args.outputs;
    const auto is_zero = [](T number) { return number == T(0); };
    if (args.index[r] < 0 && !std::all_of(row, row + args.outputs, is_zero)) return false;
  }
  return true;
}

}  // namespace

template <class T>
void project_backward_cpu(const ProjectBackward<T>& args) {
  Tensor grad = matrix(args.grad, args.rows, args.outputs);
  if (!zero_in_holes(args)) grad = at::where(matrix(args.index, args.rows, 1) >= 0, grad, 0);
  const bool whole = std::is_same_v<T, Factor<T>> && in_order(args);
  if (args.grad_features) {
    const Tensor weight = weight_of(args.weight, args.outputs, args.layout.dim);
    whole ? feature_gradient_images(args, grad, weight) : feature_gradient_tiles(args, grad, weight);
  }
  if (args.grad_weight) {
    Tensor sum = whole ? weight_gradient_images(args, grad) : weight_gradient_tiles(args, grad);
    // A pixel of no row may hold anything, and zero times NaN is NaN: then once more without these pixels.
    if (whole && !sum.isfinite().all().template item<bool>()) sum = weight_gradient_tiles(args, grad);
    matrix(args.grad_weight, args.outputs, args.layout.dim).copy_(sum);
  }
  if (args.grad_bias) view(args.grad_bias, {args.outputs}, {1}).copy_(grad.sum(0));
}

#define INSTANTIATE(T)                          \
  template void project_cpu(const Project<T>&); \
  template void project_backward_cpu(const ProjectBackward<T>&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(c10::BFloat16)
INSTANTIATE(c10::Half)

}  // namespace pixcontrast
