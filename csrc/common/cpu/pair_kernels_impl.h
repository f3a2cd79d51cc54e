// Included by kernels.cpp once for each instruction set; see row_kernels_impl.h.
#include "common/cpu/row_kernels_impl.h"

// ---- product: a tile of sums stays in registers, two vectors of columns wide

constexpr int kMostRows = PIXCONTRAST_REGISTERS == 32 ? 12 : 6;

template <int Rows, int Vectors, class A>
PIXCONTRAST_TARGET void product_tile(const Product<A, A>& args, int64_t row, int64_t column) {
  using V = Vector<A>;
  const A *left = args.left + row * args.left_row, *right = args.right + column;
  A* const out = args.out + row * args.out_row + column;
  const int64_t left_row = args.left_row, left_unit = args.left_unit, right_unit = args.right_unit;
  typename V::type sum[Rows][Vectors] = {};
  const auto* ahead = reinterpret_cast<const char*>(left + args.ahead);
  for (int64_t u = 0; u < args.units; ++u, ahead += 64) {
    if (args.ahead) __builtin_prefetch(ahead, 0, 2);
    typename V::type across[Vectors];
    for (int v = 0; v < Vectors; ++v) across[v] = LOAD(right + v * V::lanes);
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < Vectors; ++v) sum[r][v] += left[r * left_row] * across[v];
    }
    left += left_unit;
    right += right_unit;
  }
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      A* const to = out + r * args.out_row + v * V::lanes;
      STORE(to, args.add ? typename V::type(LOAD(to) + sum[r][v]) : sum[r][v]);
    }
  }
}

template <class A>
PIXCONTRAST_TARGET void product(const Product<A, A>& args) {
  constexpr int64_t lanes = Vector<A>::lanes;
  for_row_tiles<kMostRows>(
      args.rows,
      [&](int64_t row, auto rows) {
        int64_t column = 0;
        for (; column + 2 * lanes <= args.columns; column += 2 * lanes) product_tile<rows, 2>(args, row, column);
        for (; column < args.columns; column += lanes) product_tile<rows, 1>(args, row, column);
      },
      std::make_integer_sequence<int, kMostRows>());
}

// ---- one anchor

template <class A>
PIXCONTRAST_TARGET A largest(const A* z, int64_t count) {
  typedef typename Vector<A>::type V;
  constexpr int64_t lanes = Vector<A>::lanes;
  V one = V{} + z[0], other = one;
  int64_t i = 0;
  for (; i + 2 * lanes <= count; i += 2 * lanes) {
    const V x = LOAD(z + i), y = LOAD(z + i + lanes);
    one = x > one ? x : one;
    other = y > other ? y : other;
  }
  one = one > other ? one : other;
  A top = z[0];
  for (int64_t lane = 0; lane < lanes; ++lane) top = one[lane] > top ? one[lane] : top;
  for (; i < count; ++i) top = z[i] > top ? z[i] : top;
  return top;
}

// x, or NaN where it is not finite, so that no maximum, exponential or sigmoid hides an infinite similarity.
template <class V>
PIXCONTRAST_INLINE V finite_or_nan(V x) {
  const V zero{};
  return x + zero * x;
}

template <class A>
PIXCONTRAST_TARGET A exponentials(A* z, int64_t count, A scale, A shift) {
  for (int64_t i = 0; i < count; i += Vector<A>::lanes) {
    const typename Vector<A>::type x = finite_or_nan(typename Vector<A>::type(load_some(z + i, count - i) * scale));
    store_some(z + i, count - i, exp_nonpositive(x - shift));
  }
  return sum(z, count);
}

// log(1 + e^x) = max(x, 0) + log(1 + e^-|x|); the factors 1 + e^-|x| lie in (1, 2], so that this many have one
// logarithm together.
constexpr int64_t kFactors = 64;

// What becomes of x = away - scale z: returns sigma(x), adds max(x, 0) to *above, multiplies *factor by 1 + e^-|x|.
template <class V>
PIXCONTRAST_INLINE V positive_pair(V x, V* above, V* factor) {
  x = finite_or_nan(x);
  const V zero{}, e = exp_nonpositive(x < 0 ? x : -x), one = 1 + e;
  *above += x < 0 ? zero : x;
  *factor *= one;
  return (x < 0 ? e : zero + 1) / one;
}

template <class A>
PIXCONTRAST_TARGET A positives(A* z, int64_t count, A scale, A away, A* softplus) {
  typedef typename Vector<A>::type V;
  constexpr int64_t lanes = Vector<A>::lanes;
  for (int64_t first = 0; first < count; first += kFactors) {
    V above{}, factor = above + 1;
    for (int64_t i = first; i < count && i < first + kFactors; i += lanes) {
      V more = above, times = factor;
      const V sigma = positive_pair(V(away - load_some(z + i, count - i) * scale), &more, &times);
      for (int64_t lane = count - i; lane < lanes; ++lane) more[lane] = above[lane], times[lane] = factor[lane];
      above = more, factor = times;
      store_some(z + i, count - i, sigma);
    }
    A product = 1;
    for (int64_t lane = 0; lane < lanes; ++lane) product *= factor[lane];
    *softplus += sum_of<A>(above) + std::log(product);
  }
  return sum(z, count);
}

// ---- some anchors, each a column

template <class A>
PIXCONTRAST_TARGET void column_largest(const A* z, int64_t keys, int64_t stride, int64_t columns, A* largest) {
  for (int64_t column = 0; column < columns; column += Vector<A>::lanes) {
    typename Vector<A>::type top = LOAD(z + column);
    for (int64_t j = 1; j < keys; ++j) {
      const typename Vector<A>::type x = LOAD(z + j * stride + column);
      top = x > top ? x : top;
    }
    STORE(largest + column, top);
  }
}

template <class A>
PIXCONTRAST_TARGET void column_exponentials(A* z, int64_t keys, int64_t stride, int64_t columns, A scale,
                                            const A* shift, A* sum) {
  typedef typename Vector<A>::type V;
  for (int64_t column = 0; column < columns; column += Vector<A>::lanes) {
    const V away = LOAD(shift + column);
    V total{};
    for (int64_t j = 0; j < keys; ++j) {
      A* const at = z + j * stride + column;
      const V e = exp_nonpositive(finite_or_nan(V(LOAD(at) * scale)) - away);
      STORE(at, e);
      total += e;
    }
    STORE(sum + column, LOAD(sum + column) + total);
  }
}

template <class A>
PIXCONTRAST_TARGET void column_positives(A* z, int64_t keys, int64_t stride, int64_t columns, A scale, const A* away,
                                         A* sum, A* softplus) {
  typedef typename Vector<A>::type V;
  for (int64_t column = 0; column < columns; column += Vector<A>::lanes) {
    const V limit = LOAD(away + column);
    V total{}, above{};
    for (int64_t first = 0; first < keys; first += kFactors) {
      V factor = V{} + 1;
      for (int64_t j = first; j < keys && j < first + kFactors; ++j) {
        A* const at = z + j * stride + column;
        const V sigma = positive_pair(V(limit - LOAD(at) * scale), &above, &factor);
        STORE(at, sigma);
        total += sigma;
      }
      for (int64_t lane = 0; lane < Vector<A>::lanes; ++lane) above[lane] += std::log(factor[lane]);
    }
    STORE(sum + column, LOAD(sum + column) + total);
    STORE(softplus + column, LOAD(softplus + column) + above);
  }
}

template <class A>
const PairKernels<A> pair_table = {product<A>,         largest<A>,        exponentials<A>,
                                   positives<A>,       column_largest<A>, column_exponentials<A>,
                                   column_positives<A>};

#undef PIXCONTRAST_INLINE
#undef LOAD
#undef STORE
