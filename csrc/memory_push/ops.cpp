
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/tensor.h"
#include "memory_push/memory_push.h"

namespace pixcontrast {
namespace {

template <class T>
void run(const SegmentTopk<T>& args, const Cpu&) {
  std::vector<int64_t> not_finite(args.segments.classes);
  at::parallel_for(0, args.segments.classes, 1, [&](int64_t first, int64_t last) {
    std::vector<std::pair<T, int64_t>> ranked;  // (-score, row), so that the best pair is the smallest
    for (int64_t s = first; s < last; ++s) {
      ranked.clear();
      for (int64_t i = args.segments.start[s]; i < args.segments.end(s); ++i) {
        const int64_t row = args.order ? args.order[i] : i;
        if (row < 0 || row >= args.rows) continue;
        const T score = args.scores ? args.scores[row] : T(0);
        std::isfinite(score) ? void(ranked.emplace_back(-score, row)) : void(++not_finite[s]);
      }
      const int64_t count = std::min<int64_t>(args.k, ranked.size());
      std::nth_element(ranked.begin(), ranked.begin() + count, ranked.end());
      std::sort(ranked.begin(), ranked.begin() + count);
      int64_t* const index = args.index + s * args.k;
      for (int64_t i = 0; i < args.k; ++i) index[i] = i < count ? ranked[i].second : -1;
    }
  });
  if (args.rejected) {
    for (const int64_t count : not_finite) *args.rejected += count;
  }
}

template <class T, class Source>
void run(const MemoryWrite<T, Source>& args, const Cpu&) {
  using A = Acc<Source>;
  const int64_t dim = args.layout.dim, capacity = args.capacity;
  std::vector<int64_t> not_finite(args.classes);
  at::parallel_for(0, args.classes, 1, [&](int64_t first, int64_t last) {
    std::vector<A> row(dim);
    const auto read = [&](int64_t pixel) {
      const Source* const from = args.source + args.layout.offset(pixel);
      for (int64_t d = 0; d < dim; ++d) row[d] = static_cast<A>(from[d * args.layout.channel_stride()]);
    };
    for (int64_t c = first; c < last; ++c) {
      std::vector<std::pair<int64_t, A>> stored;  // pixels and their norms
      for (int64_t k = 0; k < args.entries; ++k) {
        const int64_t pixel = args.index[c * args.entries + k];
        if (pixel < 0 || pixel >= args.layout.pixels) continue;
        read(pixel);
        A square, unused;
        cpu::row_kernels<A>().square_and_dot(row.data(), row.data(), dim, &square, &unused);
        std::isfinite(square) ? void(stored.emplace_back(pixel, std::sqrt(square))) : void(++not_finite[c]);
      }
      const int64_t count = stored.size(), cursor = args.cursors[c];
      for (int64_t r = 0; r < std::min(count, capacity); ++r) {
        const auto [pixel, norm] = stored[r];
        T* const to = args.rows + (c * capacity + (cursor + count - 1 - r) % capacity) * dim;
        read(pixel);
        for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(norm < A(kNormFloor) ? A(0) : row[d] / norm);
      }
      args.counts[c] = std::min(args.counts[c] + count, capacity);
      args.cursors[c] = (cursor + count) % capacity;
    }
  });
  for (const int64_t count : not_finite) *args.rejected += count;
}

#ifdef PIXCONTRAST_WITH_CUDA
void run(const SegmentTopk<float>& args, const Cuda& device) {
  const Tensor workspace = device.workspace(args.segments.classes * args.k * sizeof(uint64_t));
  C10_CUDA_CHECK(segment_topk_cuda(args, write<uint64_t>(workspace), device.stream));
}
template <class T, class Source>
void run(const MemoryWrite<T, Source>& args, const Cuda& device) {
  const Tensor workspace = device.workspace(args.classes * args.entries * sizeof(float));
  C10_CUDA_CHECK(memory_write_cuda(args, write<float>(workspace), device.stream));
}
#endif

// A tensor that is written to: what checked() would copy is refused.
Tensor written(const Tensor& t, const char* name, at::IntArrayRef sizes, at::ScalarType type,
               const c10::Device& device) {
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous");
  return checked(t, name, sizes, type, device);
}

template <class Device>
Tensor segment_topk(const optional<Tensor>& scores_, const optional<Tensor>& order_, const Tensor& start,
                    const Tensor& count, int64_t k, const optional<Tensor>& rejected) {
  TORCH_CHECK_VALUE(k >= 0, "k must not be negative, got ", k);
  TORCH_CHECK_VALUE(!scores_ || scores_->dim() == 1, "scores must be [P], got ", scores_->sizes());
  TORCH_CHECK_VALUE(!order_ || order_->dim() == 1, "order must be a list, got ", order_->sizes());
  const Tensor scores = scores_ ? scores_->contiguous() : at::empty({0}, start.options().dtype(at::kFloat));
  const int64_t rows = scores_ ? scores.numel() : kMostRows;
  TORCH_CHECK_VALUE(rows <= kMostRows, "scores may have 2^32 elements, got ", rows);
  TORCH_CHECK_VALUE(scores.device() == start.device(), "scores must be on ", start.device(), ", got ", scores.device());
  Tensor order;
  if (order_) order = checked(*order_, "order", order_->sizes(), at::kLong, start.device());
  const CheckedSegments segments(start, count, order_ ? order.numel() : rows, start.device());
  if (rejected) written(*rejected, "rejected", {}, at::kLong, start.device());
  const auto index = at::empty({start.numel(), k}, start.options());
  Device::dispatch(scores, "segment_topk", [&](auto element, const auto& device) {
    using T = decltype(element);
    if constexpr (std::is_same_v<T, Acc<T>>) {
      run(SegmentTopk<T>{segments.get(), k, rows, scores_ ? read<T>(scores) : nullptr, read<int64_t>(order),
                         write<int64_t>(index), rejected ? write<int64_t>(*rejected) : nullptr},
          device);
    } else {
      TORCH_CHECK_TYPE(false, "scores must be float32 (on a CPU, float64 as well), got ", scores.scalar_type());
    }
  });
  return index;
}

template <class Device>
void memory_write(const Tensor& rows, const Tensor& counts, const Tensor& cursors, const Tensor& rejected,
                  const Tensor& source_, const Tensor& index_) {
  TORCH_CHECK_VALUE(rows.dim() == 3, "rows must be [C, N, D], got ", rows.sizes());
  const auto source = checked_features(source_);
  const int64_t classes = rows.size(0), capacity = rows.size(1);
  const auto device = rows.device();
  TORCH_CHECK_VALUE(source.size(1) == rows.size(2) && source.device() == device, "source must have ", rows.size(2),
                    " channels and be on ", device, ", got ", source.sizes(), " on ", source.device());
  TORCH_CHECK_VALUE(index_.dim() == 2, "index must be [C, K], got ", index_.sizes());
  const auto index = checked(index_, "index", {classes, index_.size(1)}, at::kLong, device);
  written(rows, "rows", rows.sizes(), rows.scalar_type(), device);
  written(counts, "counts", {classes}, at::kLong, device);
  written(cursors, "cursors", {classes}, at::kLong, device);
  written(rejected, "rejected", {}, at::kLong, device);
  if (capacity == 0) return;
  Device::dispatch(rows, "memory_write", [&](auto element, const auto&) {
    Device::dispatch(source, "memory_write", [&](auto source_element, const auto& device) {
      using T = decltype(element);
      using Source = decltype(source_element);
      run(MemoryWrite<T, Source>{classes, capacity, index.size(1), layout_of(source), read<Source>(source),
                                 read<int64_t>(index), write<T>(rows), write<int64_t>(counts), write<int64_t>(cursors),
                                 write<int64_t>(rejected)},
          device);
    });
  });
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("segment_topk", &segment_topk<Device>);
  library.impl("memory_write", &memory_write<Device>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def(
      "segment_topk(Tensor? scores, Tensor? order, Tensor start, Tensor count, SymInt k, Tensor(a!)? rejected) -> "
      "Tensor");
  library.def(
      "memory_write(Tensor(a!) rows, Tensor(b!) counts, Tensor(c!) cursors, Tensor(d!) rejected, Tensor source, "
      "Tensor index) -> ()");
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
