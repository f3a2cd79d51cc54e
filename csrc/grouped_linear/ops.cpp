#include <memory>

#include "common/tensor.h"
#include "grouped_linear/grouped_linear.h"

namespace pixcontrast {
namespace {

// ---- on CPUs. Each thread multiplies blocks of its own, in the dtype of sums or in pairs of bfloat16 (see
// common/cpu/kernels.h). The blocks do not depend on the number of threads.

constexpr int64_t kBlockRows = 384;                   // of grouped_linear: 384 KiB of 256 float32 outputs
constexpr int64_t kPrefetch = 24;                     // rows ahead
constexpr int64_t kSliceOutputs = 128, kDepth = 256;  // of grouped_outer: rows of the result and of what it adds

template <class A>
void multiply(const cpu::Product<A, A>& product) {
  cpu::pair_kernels<A>().product(product);
}
void multiply(const cpu::Product<uint32_t, float>& product) { cpu::bf16_product(product); }

// run(Unit{}): a pair of bfloat16 where the processor multiplies them, else an element in the dtype of sums.
template <class T, class Run>
void with_unit(int64_t dim, int64_t outputs, const Run& run) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (cpu::has_bf16() && dim % cpu::kColumnStep == 0 && outputs % cpu::kColumnStep == 0) return run(uint32_t{});
  }
  run(Acc<T>{});
}

template <class T, class Unit>
constexpr bool kPairs = !std::is_same_v<Unit, Acc<T>>;

// to [dim in units, width] = weight [outputs, dim]^T, zero behind the last output.
template <class T, class Unit>
void transpose(const T* weight, int64_t outputs, int64_t dim, Unit* to, int64_t width) {
  using From = std::conditional_t<kPairs<T, Unit>, Unit, T>;
  const auto* const from = reinterpret_cast<const From*>(weight);
  const int64_t units = kPairs<T, Unit> ? dim / 2 : dim;
  for (int64_t first = 0; first < width; first += cpu::kColumnStep) {
    for (int64_t u = 0; u < units; ++u) {
      for (int64_t e = first; e < first + cpu::kColumnStep; ++e) {
        to[u * width + e] = e < outputs ? static_cast<Unit>(from[e * units + u]) : Unit(0);
      }
    }
  }
}

template <class T, class Unit>
void linear(const GroupedLinear<T>& args) {
  using A = Acc<T>;
  const int64_t dim = args.dim, outputs = args.outputs, width = cpu::padded(outputs);
  const int64_t units = kPairs<T, Unit> ? dim / 2 : dim;
  const std::unique_ptr<Unit[]> weights(new Unit[args.segments.classes * units * width]);
  at::parallel_for(0, args.segments.classes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      transpose(args.weight + c * outputs * dim, outputs, dim, weights.get() + c * units * width, width);
    }
  });
  cpu::for_blocks(cpu::blocks_of(args.segments, kBlockRows), [&](int64_t, const cpu::Block& block) {
    const T* const rows = args.rows + block.begin * dim;
    T* const result = args.result + block.begin * outputs;
    cpu::RowBuffer<T> buffer(kPairs<T, Unit> ? 0 : block.size() * dim);
    const Unit* left;
    if constexpr (kPairs<T, Unit>) {
      left = reinterpret_cast<const Unit*>(rows);
    } else {
      left = buffer.read(rows, block.size() * dim);
    }
    const bool direct = std::is_same_v<T, A> && width == outputs;
    const std::unique_ptr<A[]> sums(direct ? nullptr : new A[block.size() * width]);
    A* const out = direct ? reinterpret_cast<A*>(result) : sums.get();
    multiply(cpu::Product<Unit, A>{block.size(), units, width, left, units, 1, weights.get() + block.c * units * width,
                                   width, out, width, false, kPrefetch * units});
    for (int64_t i = 0; i < block.size() && !direct; ++i) {
      cpu::convert(out + i * width, outputs, result + i * outputs);
    }
  });
}

// Rows as operands of a sum over rows: columns side by side, in units of neighbours of a column.
template <class T, class Unit>
struct Columns {
  const Unit* elements;
  int64_t stride;  // from one unit to the next below it

  // rows [count, columns] are `stride` from each other. Reads as far as the columns are padded.
  Columns(const T* rows, int64_t stride, int64_t count, int64_t columns, std::vector<Unit>& buffer) {
    const int64_t width = cpu::padded(columns);
    if constexpr (kPairs<T, Unit>) {
      buffer.resize((count + 1) / 2 * width);
      cpu::pair_rows(rows, stride, count, columns, buffer.data());
    } else {
      if constexpr (std::is_same_v<T, Unit>) {
        if (columns == width) {
          elements = rows, this->stride = stride;
          return;
        }
      }
      buffer.resize(count * width);
      for (int64_t i = 0; i < count; ++i) cpu::convert(rows + i * stride, columns, buffer.data() + i * width);
    }
    elements = buffer.data(), this->stride = width;
  }
};

// Some rows of the result of a class.
struct Slice {
  int64_t c, first, begin, end;  // the last two: its place in the work of all slices
};

template <class T, class Unit>
void outer(const GroupedOuter<T>& args) {
  using A = Acc<T>;
  const int64_t dim = args.dim, outputs = args.outputs, width = cpu::padded(dim);
  std::vector<Slice> slices;
  for (int64_t c = 0, work = 0; c < args.segments.classes; ++c) {
    for (int64_t first = 0; first < outputs; first += kSliceOutputs) {
      slices.push_back({c, first, work, work + args.segments.count[c] + 1});
      work = slices.back().end;
    }
  }
  cpu::for_blocks(slices, [&](int64_t, const Slice& slice) {
    const int64_t height = std::min(kSliceOutputs, outputs - slice.first), end = args.segments.end(slice.c);
    std::vector<Unit> left_buffer, right_buffer;
    std::vector<A> sums(height * width);
    for (int64_t i = args.segments.begin(slice.c); i < end; i += kDepth) {
      const int64_t depth = std::min(kDepth, end - i), units = kPairs<T, Unit> ? (depth + 1) / 2 : depth;
      const Columns<T, Unit> left(args.left + i * outputs + slice.first, outputs, depth, height, left_buffer);
      const Columns<T, Unit> right(args.right + i * dim, dim, depth, dim, right_buffer);
      multiply(cpu::Product<Unit, A>{height, units, width, left.elements, 1, left.stride, right.elements, right.stride,
                                     sums.data(), width, true});
    }
    T* const result = args.result + (slice.c * outputs + slice.first) * dim;
    for (int64_t e = 0; e < height; ++e) cpu::convert(sums.data() + e * width, dim, result + e * dim);
  });
}

template <class T>
void run(const GroupedLinear<T>& args, const Cpu&) {
  with_unit<T>(args.dim, args.outputs, [&](auto unit) { linear<T, decltype(unit)>(args); });
}
template <class T>
void run(const GroupedOuter<T>& args, const Cpu&) {
  with_unit<T>(args.dim, args.outputs, [&](auto unit) { outer<T, decltype(unit)>(args); });
}

// ---- the operators

#ifdef PIXCONTRAST_WITH_CUDA
template <class T>
void run(const GroupedLinear<T>& args, const Cuda& device) {
  C10_CUDA_CHECK(grouped_linear_cuda(args, device.tensor_cores<T>(), device.stream));
}
template <class T>
void run(const GroupedOuter<T>& args, const Cuda& device) {
  const Tensor workspace = device.workspace(grouped_outer_cuda_workspace(args));
  void* const sums = workspace.mutable_data_ptr();
  C10_CUDA_CHECK(grouped_outer_cuda(args, device.tensor_cores<T>(), sums, device.stream));
}
#endif

void check_rows(const Tensor& rows, const char* name) {
  TORCH_CHECK_VALUE(rows.dim() == 2, name, " must be a matrix, got ", rows.sizes());
}

template <class Device>
Tensor grouped_linear(const Tensor& rows_, const optional<Tensor>& start, const Tensor& count, const Tensor& weight_) {
  check_rows(rows_, "rows");
  const CheckedSegments segments(start, count, rows_.size(0), rows_.device());
  TORCH_CHECK_VALUE(weight_.dim() == 3, "weight must be [C, E, D], got ", weight_.sizes());
  const auto rows = rows_.contiguous();
  const auto weight =
      checked(weight_, "weight", {count.numel(), weight_.size(1), rows.size(1)}, rows.scalar_type(), rows.device());
  const auto result = empty_map({rows.size(0), weight.size(1)}, rows.options());
  Device::dispatch(rows, "grouped_linear", [&](auto element, const auto& device) {
    using T = decltype(element);
    run(GroupedLinear<T>{segments.get(), rows.size(1), weight.size(1), read<T>(rows), read<T>(weight),
                         write<T>(result)},
        device);
  });
  return result;
}

template <class Device>
Tensor grouped_outer(const Tensor& left_, const Tensor& right_, const optional<Tensor>& start, const Tensor& count) {
  check_rows(left_, "left");
  check_rows(right_, "right");
  const CheckedSegments segments(start, count, left_.size(0), left_.device());
  const auto left = left_.contiguous();
  const auto right = checked(right_, "right", {left.size(0), right_.size(1)}, left.scalar_type(), left.device());
  const auto result = at::empty({count.numel(), left.size(1), right.size(1)}, left.options());
  Device::dispatch(left, "grouped_outer", [&](auto element, const auto& device) {
    using T = decltype(element);
    run(GroupedOuter<T>{segments.get(), left.size(1), right.size(1), read<T>(left), read<T>(right), write<T>(result)},
        device);
  });
  return result;
}

// a [.., n, k] b [.., k, m] by the library, the result in memory that is kept: for pixel_linear on CPUs.
template <class Device>
Tensor matmul(const Tensor& a, const Tensor& b) {
  auto sizes = a.sizes().vec();
  sizes.back() = b.size(-1);
  const auto result = empty_map(sizes, a.options());
  gemm<Device>(a, b, {}, result);
  return result;
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("matmul", &matmul<Device>);
  library.impl("grouped_linear", &grouped_linear<Device>);
  library.impl("grouped_outer", &grouped_outer<Device>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("matmul(Tensor a, Tensor b) -> Tensor");
  library.def("grouped_linear(Tensor rows, Tensor? start, Tensor count, Tensor weight) -> Tensor");
  library.def("grouped_outer(Tensor left, Tensor right, Tensor? start, Tensor count) -> Tensor");
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
