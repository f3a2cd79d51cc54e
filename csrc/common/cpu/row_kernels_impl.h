// Included by kernels.cpp once for each instruction set, inside a namespace of its own, with
//   PIXCONTRAST_TARGET     the target attribute of every function
//   PIXCONTRAST_BYTES      the width of a vector
//   PIXCONTRAST_REGISTERS  vector registers of the processor
//   stream()               store of one vector past the caches
// No include guard, no includes: the same text makes every version.

template <class A>
struct Vector {
  static constexpr int64_t lanes = PIXCONTRAST_BYTES / sizeof(A);
  typedef A type __attribute__((vector_size(PIXCONTRAST_BYTES)));
  // the same at any address of an A
  typedef A loose __attribute__((vector_size(PIXCONTRAST_BYTES), aligned(alignof(A)), may_alias));
};

#define PIXCONTRAST_INLINE PIXCONTRAST_TARGET __attribute__((always_inline)) inline
#define LOAD(pointer) (*reinterpret_cast<const typename Vector<A>::loose*>(pointer))
#define STORE(pointer, value) (*reinterpret_cast<typename Vector<A>::loose*>(pointer) = (value))

// Of the first `count` lanes only, where there are more; the others are zero.
template <class A>
PIXCONTRAST_INLINE typename Vector<A>::type load_some(const A* from, int64_t count) {
  if (count >= Vector<A>::lanes) return LOAD(from);
  typename Vector<A>::type some{};
  for (int64_t lane = 0; lane < count; ++lane) some[lane] = from[lane];
  return some;
}
template <class A>
PIXCONTRAST_INLINE void store_some(A* to, int64_t count, typename Vector<A>::type some) {
  if (count >= Vector<A>::lanes) {
    STORE(to, some);
    return;
  }
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = some[lane];
}

// Halves are added to halves: a chain of log2(lanes) additions instead of one for each lane.
template <class A>
PIXCONTRAST_INLINE A sum_of(typename Vector<A>::type v) {
  A part[Vector<A>::lanes];
  STORE(part, v);
  for (int64_t half = Vector<A>::lanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) part[lane] += part[lane + half];
  }
  return part[0];
}

// Of all blocks of 2 H lanes, exchanges the second half in a with the first one in b.
template <class A, int H, int... Lanes>
PIXCONTRAST_INLINE void exchange(typename Vector<A>::type& a, typename Vector<A>::type& b,
                                 std::integer_sequence<int, Lanes...>) {
  const typename Vector<A>::type was = a;
#ifdef __clang__
  a = __builtin_shufflevector(was, b, (Lanes & H ? Vector<A>::lanes + Lanes - H : Lanes)...);
  b = __builtin_shufflevector(was, b, (Lanes & H ? Vector<A>::lanes + Lanes : Lanes + H)...);
#else
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Place __attribute__((vector_size(PIXCONTRAST_BYTES)));
  a = __builtin_shuffle(was, b, Place{(Lanes & H ? Vector<A>::lanes + Lanes - H : Lanes)...});
  b = __builtin_shuffle(was, b, Place{(Lanes & H ? Vector<A>::lanes + Lanes : Lanes + H)...});
#endif
}

// In place, for blocks of 2 H rows and columns and those inside of them.
template <class A, int H>
PIXCONTRAST_INLINE void transpose_blocks(typename Vector<A>::type* rows) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < Vector<A>::lanes; ++i) {
      if ((i & H) == 0) exchange<A, H>(rows[i], rows[i + H], std::make_integer_sequence<int, Vector<A>::lanes>());
    }
    transpose_blocks<A, H / 2>(rows);
  }
}

template <class A>
PIXCONTRAST_TARGET void transpose(const A* from, int64_t from_stride, int64_t rows, int64_t columns, A* to,
                                  int64_t to_stride) {
  constexpr int64_t lanes = Vector<A>::lanes;
  for (int64_t r = 0; r < rows; r += lanes) {
    for (int64_t c = 0; c < columns; c += lanes) {
      if (rows - r >= lanes && columns - c >= lanes) {
        typename Vector<A>::type block[lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) block[i] = LOAD(from + (r + i) * from_stride + c);
        transpose_blocks<A, lanes / 2>(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < lanes; ++i) STORE(to + (c + i) * to_stride + r, block[i]);
        continue;
      }
      for (int64_t i = r; i < (rows - r < lanes ? rows : r + lanes); ++i) {
        for (int64_t j = c; j < (columns - c < lanes ? columns : c + lanes); ++j) {
          to[j * to_stride + i] = from[i * from_stride + j];
        }
      }
    }
  }
}

template <class A>
PIXCONTRAST_TARGET void square_and_dot(const A* x, const A* y, int64_t dim, A* square, A* product) {
  using V = Vector<A>;
  constexpr int64_t step = V::lanes;
  // four independent sums hide the latency of the multiply-add
  typename V::type s0{}, s1{}, s2{}, s3{}, p0{}, p1{}, p2{}, p3{};
  int64_t d = 0;
  for (; d + 4 * step <= dim; d += 4 * step) {
    const auto x0 = LOAD(x + d), x1 = LOAD(x + d + step), x2 = LOAD(x + d + 2 * step), x3 = LOAD(x + d + 3 * step);
    s0 += x0 * x0;
    s1 += x1 * x1;
    s2 += x2 * x2;
    s3 += x3 * x3;
    p0 += x0 * LOAD(y + d);
    p1 += x1 * LOAD(y + d + step);
    p2 += x2 * LOAD(y + d + 2 * step);
    p3 += x3 * LOAD(y + d + 3 * step);
  }
  for (; d + step <= dim; d += step) {
    const auto x0 = LOAD(x + d);
    s0 += x0 * x0;
    p0 += x0 * LOAD(y + d);
  }
  A s = sum_of<A>((s0 + s1) + (s2 + s3)), p = sum_of<A>((p0 + p1) + (p2 + p3));
  for (; d < dim; ++d) {
    s += x[d] * x[d];
    p += x[d] * y[d];
  }
  *square = s;
  *product = p;
}

template <bool Stream, bool Sum, class A>
PIXCONTRAST_INLINE void combine_as(A alpha, const A* y, A beta, const A* x, int64_t dim, A* out, A gamma, A* sum) {
  using V = Vector<A>;
  int64_t d = 0;
  for (; d + V::lanes <= dim; d += V::lanes) {
    const typename V::type value = LOAD(x + d);
    if (Sum) STORE(sum + d, LOAD(sum + d) + gamma * value);
    const typename V::type result = alpha * LOAD(y + d) + beta * value;
    if (Stream) {
      stream(out + d, result);
    } else {
      STORE(out + d, result);
    }
  }
  for (; d < dim; ++d) {
    if (Sum) sum[d] += gamma * x[d];
    out[d] = alpha * y[d] + beta * x[d];
  }
}

template <class A>
PIXCONTRAST_TARGET void combine(A alpha, const A* y, A beta, const A* x, int64_t dim, bool wish, A* out, A gamma,
                                A* sum) {
  const bool past = wish && reinterpret_cast<uintptr_t>(out) % PIXCONTRAST_BYTES == 0;
  if (past && sum) return combine_as<true, true>(alpha, y, beta, x, dim, out, gamma, sum);
  if (past) return combine_as<true, false>(alpha, y, beta, x, dim, out, gamma, sum);
  if (sum) return combine_as<false, true>(alpha, y, beta, x, dim, out, gamma, sum);
  combine_as<false, false>(alpha, y, beta, x, dim, out, gamma, sum);
}

template <class A>
PIXCONTRAST_TARGET void accumulate(A alpha, const A* x, int64_t dim, A* sum) {
  using V = Vector<A>;
  int64_t d = 0;
  for (; d + V::lanes <= dim; d += V::lanes) STORE(sum + d, LOAD(sum + d) + alpha * LOAD(x + d));
  for (; d < dim; ++d) sum[d] += alpha * x[d];
}

template <class A>
PIXCONTRAST_TARGET void add_unit_rows(const A* x, const A* share, int64_t rows, int64_t dim, A floor, A* sum) {
  using V = Vector<A>;
  constexpr int64_t most = 4;
  while (rows > 0) {
    const int64_t count = rows < most ? rows : most;
    const A* row[most];
    A factor[most];
    for (int64_t r = 0; r < most; ++r) {
      row[r] = r < count ? x + r * dim : x;
      A square = 0, same;
      if (r < count) square_and_dot(row[r], row[r], dim, &square, &same);
      const A norm = std::sqrt(square);
      factor[r] = norm < floor ? A(0) : share[r] / norm + 0 * square;  // NaN where the square is infinite
    }
    int64_t d = 0;
    for (; d + V::lanes <= dim; d += V::lanes) {
      STORE(sum + d, LOAD(sum + d) + (factor[0] * LOAD(row[0] + d) + factor[1] * LOAD(row[1] + d)) +
                         (factor[2] * LOAD(row[2] + d) + factor[3] * LOAD(row[3] + d)));
    }
    for (; d < dim; ++d) {
      sum[d] += factor[0] * row[0][d] + factor[1] * row[1][d] + factor[2] * row[2][d] + factor[3] * row[3][d];
    }
    x += count * dim, share += count, rows -= count;
  }
}

// e^x for x <= 0. The library's for double; for float a polynomial, within 2 ulp: e^x = 2^n e^r with n = round(x / ln
// 2), |r| <= ln(2)/2, and e^r from the Taylor series (its rest is below 1e-8).
PIXCONTRAST_INLINE Vector<double>::type exp_nonpositive(Vector<double>::type x) {
  for (int64_t lane = 0; lane < Vector<double>::lanes; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}
PIXCONTRAST_INLINE Vector<float>::type exp_nonpositive(Vector<float>::type x) {
  typedef Vector<float>::type V;
  typedef int32_t Bits __attribute__((vector_size(PIXCONTRAST_BYTES)));
  x = x < -87.0f ? V{} - 87.0f : x;
  const V shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer in the low bits
  const V n = shifted - 12582912.0f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  V e = V{} + 1.0f / 5040;
  e = e * r + 1.0f / 720;
  e = e * r + 1.0f / 120;
  e = e * r + 1.0f / 24;
  e = e * r + 1.0f / 6;
  e = e * r + 0.5f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  return e * (V)((((Bits)shifted - 0x4B400000) + 127) << 23);
}

// sigma(logit) / e^shift = e^(min(logit, 0) - shift) / (1 + e^-|logit|)
template <class A>
PIXCONTRAST_TARGET void score(const A* logit, const A* shift, int64_t count, A* score) {
  typedef typename Vector<A>::type V;
  const V zero{};
  for (int64_t i = 0; i < count; i += Vector<A>::lanes) {
    const V x = load_some(logit + i, count - i), e = exp_nonpositive(x < 0 ? x : -x);
    V above = x < 0 ? e : zero + 1;  // without shift the two exponentials are one
    if (shift) above = exp_nonpositive((x < 0 ? x : zero) - load_some(shift + i, count - i));
    store_some(score + i, count - i, V(above / (1 + e)));
  }
}

// Sums and products of elements that may be added in any order, in as many strands as a vector has lanes.
template <class A>
PIXCONTRAST_TARGET A sum(const A* x, int64_t count) {
  using V = Vector<A>;
  typename V::type s0{}, s1{};
  int64_t i = 0;
  for (; i + 2 * V::lanes <= count; i += 2 * V::lanes) {
    s0 += LOAD(x + i);
    s1 += LOAD(x + i + V::lanes);
  }
  A total = sum_of<A>(s0 + s1);
  for (; i < count; ++i) total += x[i];
  return total;
}

template <class A>
PIXCONTRAST_TARGET void add_deviations(const A* x, const A* pivot, int64_t dim, A* __restrict sum,
                                       A* __restrict squares) {
  for (int64_t d = 0; d < dim; ++d) {
    const A deviation = x[d] - pivot[d];
    sum[d] += deviation;
    squares[d] += deviation * deviation;
  }
}

template <class A>
PIXCONTRAST_TARGET void leaky(const A* x, const Norm<A>& norm, int64_t dim, A* __restrict out) {
  const A *const centre = norm.centre, *const scale = norm.scale, *const bias = norm.bias, slope = norm.slope;
  for (int64_t d = 0; d < dim; ++d) {
    const A y = scale[d] * (x[d] - centre[d]) + bias[d];
    out[d] = y > 0 ? y : slope * y;
  }
}

template <class A>
PIXCONTRAST_TARGET A leaky_dot(const A* x, const Norm<A>& norm, const A* weight, int64_t dim) {
  constexpr int64_t strands = 4 * Vector<A>::lanes;
  const A *const centre = norm.centre, *const scale = norm.scale, *const bias = norm.bias, slope = norm.slope;
  A part[strands] = {};
  for (int64_t first = 0; first < dim; first += strands) {
    const int64_t size = dim - first < strands ? dim - first : strands;
    for (int64_t k = 0; k < size; ++k) {
      const int64_t d = first + k;
      const A y = scale[d] * (x[d] - centre[d]) + bias[d];
      part[k] += weight[d] * (y > 0 ? y : slope * y);
    }
  }
  return sum(part, strands);
}

template <bool Dense, class A>
PIXCONTRAST_INLINE void leaky_sums_as(const A* x, const Norm<A>& norm, const A* grad, int64_t dim, A* __restrict ones,
                                      A* __restrict products) {
  const A *const centre = norm.centre, *const scale = norm.scale, *const bias = norm.bias, slope = norm.slope;
  const A one = *grad, low = slope * one;
  for (int64_t d = 0; d < dim; ++d) {
    const A centred = x[d] - centre[d], high = Dense ? grad[d] : one;
    const A s = scale[d] * centred + bias[d] > 0 ? high : Dense ? slope * high : low;
    ones[d] += s;
    products[d] += s * centred;
  }
}

template <class A>
PIXCONTRAST_TARGET void leaky_sums(const A* x, const Norm<A>& norm, const A* grad, bool dense, int64_t dim, A* ones,
                                   A* products) {
  dense ? leaky_sums_as<true>(x, norm, grad, dim, ones, products)
        : leaky_sums_as<false>(x, norm, grad, dim, ones, products);
}

template <bool Dense, class A>
PIXCONTRAST_INLINE void leaky_backward_as(const A* x, const Norm<A>& norm, const A* grad, const A* factor,
                                          const A* shift, const A* tilt, int64_t dim, A* __restrict out) {
  const A *const centre = norm.centre, *const scale = norm.scale, *const bias = norm.bias, slope = norm.slope;
  const A one = *grad, low = slope * one;
  for (int64_t d = 0; d < dim; ++d) {
    const A centred = x[d] - centre[d], high = Dense ? grad[d] : one;
    const A s = scale[d] * centred + bias[d] > 0 ? high : Dense ? slope * high : low;
    out[d] = factor[d] * s + shift[d] + tilt[d] * centred;
  }
}

template <class A>
PIXCONTRAST_TARGET void leaky_backward(const A* x, const Norm<A>& norm, const A* grad, bool dense, const A* factor,
                                       const A* shift, const A* tilt, int64_t dim, A* out) {
  dense ? leaky_backward_as<true>(x, norm, grad, factor, shift, tilt, dim, out)
        : leaky_backward_as<false>(x, norm, grad, factor, shift, tilt, dim, out);
}

template <class A>
const RowKernels<A> row_table = {square_and_dot<A>, combine<A>,        accumulate<A>, add_unit_rows<A>,
                                 score<A>,          add_deviations<A>, leaky<A>,      leaky_dot<A>,
                                 leaky_sums<A>,     leaky_backward<A>, transpose<A>};
