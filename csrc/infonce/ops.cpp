#include <cmath>
#include <limits>

#include "common/tensor.h"
#include "infonce/cpu.h"

namespace pixcontrast {

// ---- on CPUs: the valid anchors in class order, and their results

namespace {

constexpr int64_t kPanelElements = 1 << 22;  // of z at a time: 16 MiB of float32

// copy(element of the features, element of rows [V, D]) for the channels of all anchors. Each thread has channels of
// its own, so that pixels that occur twice are added in order.
template <class Copy>
void for_elements(const InfoNCE& args, const std::vector<int64_t>& order, const Copy& copy) {
  const int64_t dim = args.layout.dim, stride = args.layout.channel_stride();
  cpu::Pieces(dim, 16, 16).run([&](int64_t, int64_t begin, int64_t end) {
    for (size_t i = 0; i < order.size(); ++i) {
      const int64_t offset = args.layout.offset(args.index[order[i]]), row = static_cast<int64_t>(i) * dim;
      for (int64_t d = begin; d < end; ++d) copy(offset + d * stride, row + d);
    }
  });
}

}  // namespace

template <class A>
SortedAnchors<A>::SortedAnchors(const InfoNCE& args)
    : args(args), inverse_temperature(static_cast<A>(1 / args.temperature)), dim(args.layout.dim) {
  const int64_t* const labels = args.labels;
  for (int64_t i = 0; i < args.count; ++i) {
    if (args.index[i] >= 0 && labels[i] >= 0 && labels[i] < args.classes) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
  for (const int64_t i : order) label.push_back(labels[i]);
  count = static_cast<int64_t>(order.size());
  rows.resize(count * dim);
  if (args.grad_features) grad.resize(count * dim);
  loss.resize(count);
  positives.resize(count);
  with_dtype(args.dtype, [&](auto element) {
    const auto* const features = static_cast<const decltype(element)*>(args.features);
    for_elements(args, order, [&](int64_t from, int64_t to) { rows[to] = static_cast<A>(features[from]); });
  });
}

template <class A>
Range SortedAnchors<A>::of_class(int64_t c) const {
  const auto found = std::equal_range(label.begin(), label.end(), c);
  return {found.first - label.begin(), found.second - label.begin()};
}

template <class A>
std::vector<A> SortedAnchors<A>::grad_scales() const {
  const auto contributing = std::count_if(positives.begin(), positives.end(), [](int64_t p) { return p > 0; });
  std::vector<A> scale(count);
  for (int64_t i = 0; i < count; ++i) {
    if (positives[i] == 0) continue;
    const auto terms = static_cast<double>(contributing * positives[i]);
    scale[i] = static_cast<A>(args.loss_weight / args.base_temperature / terms);
  }
  return scale;
}

template <class A>
void SortedAnchors<A>::finish() const {
  auto* const anchor_loss = static_cast<A*>(args.anchor_loss);
  std::fill_n(anchor_loss, args.count, A(0));
  std::fill_n(args.positives, args.count, 0);
  double sum = 0;
  int64_t contributing = 0;
  for (int64_t i = 0; i < count; ++i) {
    args.positives[order[i]] = positives[i];
    if (positives[i] == 0) continue;
    const double mean = loss[i] / static_cast<double>(positives[i]);
    anchor_loss[order[i]] = static_cast<A>(mean);
    sum += mean;
    ++contributing;
  }
  const double scale = args.loss_weight * args.temperature / args.base_temperature;
  *static_cast<A*>(args.loss) = contributing ? static_cast<A>(scale * sum / static_cast<double>(contributing)) : A(0);
  if (!args.grad_features) return;
  with_dtype(args.dtype, [&](auto element) {
    using T = cpu::GradOf<decltype(element)>;
    auto* const to = static_cast<T*>(args.grad_features);
    cpu::Pieces(args.layout.pixels * dim, 64, 1 << 14).run([&](int64_t, int64_t begin, int64_t end) {
      std::fill(to + begin, to + end, T(0));
    });
    for_elements(args, order, [&](int64_t pixel, int64_t row) { to[pixel] += static_cast<T>(grad[row]); });
  });
}

template struct SortedAnchors<float>;
template struct SortedAnchors<double>;

// ---- anchors against each other: panels of some anchors and all their partners, products by the library

namespace {

// z [V], products of anchor i with all, becomes dloss/dz T. Its negatives are before and behind its own class.
template <class A>
void contrast_row(SortedAnchors<A>& anchors, A* z, int64_t i, A grad_scale) {
  const auto& kernels = cpu::pair_kernels<A>();
  const A inverse = anchors.inverse_temperature;
  const Range own = anchors.of_class(anchors.label[i]);
  const Range sides[] = {{0, own.begin}, {own.end, anchors.count}};
  A row_max = -INFINITY, sum_exp = 0, softplus = 0, sigmoids = 0;
  for (const Range side : sides) {
    if (side.size() > 0) row_max = std::max(row_max, kernels.largest(z + side.begin, side.size()) * inverse);
  }
  for (const Range side : sides) {
    if (side.size() > 0) sum_exp += kernels.exponentials(z + side.begin, side.size(), inverse, row_max);
  }
  const A lse = row_max + std::log(sum_exp);
  for (const Range side : {Range{own.begin, i}, Range{i + 1, own.end}}) {
    if (side.size() > 0) sigmoids += kernels.positives(z + side.begin, side.size(), inverse, lse, &softplus);
  }
  z[i] = 0;
  anchors.loss[i] = softplus;
  const A of_negatives = grad_scale * sigmoids / sum_exp;
  for (const Range side : sides) {
    for (int64_t j = side.begin; j < side.end; ++j) z[j] *= of_negatives;
  }
  for (int64_t j = own.begin; j < own.end; ++j) z[j] *= -grad_scale;
}

template <class A>
void contrast_each_other(SortedAnchors<A>& anchors) {
  const int64_t count = anchors.count;
  const auto as_tensor = [&](std::vector<A>& matrix) {
    return at::from_blob(matrix.data(), {count, anchors.dim}, at::CppTypeToScalarType<A>::value);
  };
  const Tensor rows = as_tensor(anchors.rows);
  for (int64_t i = 0; i < count; ++i) anchors.positives[i] = anchors.of_class(anchors.label[i]).size() - 1;
  if (count == 0 || anchors.of_class(anchors.label[0]).size() == count) return;  // no negatives: the loss is 0
  const std::vector<A> grad_scale = anchors.grad_scales();
  const int64_t height = std::clamp<int64_t>(kPanelElements / count, 1, kPanelElements);
  const Tensor panel = at::empty({std::min(height, count), count}, rows.options());
  for (int64_t first = 0; first < count; first += height) {
    const int64_t size = std::min(height, count - first);
    Tensor z = panel.narrow(0, 0, size);
    at::mm_out(z, rows.narrow(0, first, size), rows.t());
    at::parallel_for(first, first + size, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        contrast_row(anchors, z.data_ptr<A>() + (i - first) * count, i, grad_scale[i]);
      }
    });
    if (anchors.grad.empty()) continue;
    Tensor grad = as_tensor(anchors.grad);
    if (size == count) {  // each pair has a gradient for both of its anchors
      grad.addmm_(z + z.t(), rows);
    } else {
      grad.narrow(0, first, size).addmm_(z, rows);
      grad.addmm_(z.t(), rows.narrow(0, first, size));
    }
  }
}

void run(const InfoNCE& args, const Cpu&) {
  const auto contrast = [&](auto sum) {
    SortedAnchors<decltype(sum)> anchors(args);
    args.queues == 0 ? contrast_each_other(anchors) : contrast_queues(anchors);
    anchors.finish();
  };
  args.dtype == Dtype::kDouble ? contrast(double{}) : contrast(float{});
}

#ifdef PIXCONTRAST_WITH_CUDA
void run(const InfoNCE& args, const Cuda& on) {
  for (int q = 0; q < args.queues; ++q) {
    TORCH_CHECK_TYPE(args.queue[q].dtype == args.queue[0].dtype && args.queue[q].dtype != Dtype::kDouble,
                     "on CUDA, queues must all be float32, all bfloat16 or all float16");
  }
  const int capability =
      10 * on.attribute(cudaDevAttrComputeCapabilityMajor) + on.attribute(cudaDevAttrComputeCapabilityMinor);
  const InfoNCEDevice device{on.sm_count(), capability, on.attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                             Cuda::allow_tf32()};
  const Tensor workspace = on.workspace(infonce_cuda_workspace(args, device));
  C10_CUDA_CHECK(infonce_cuda(args, device, workspace.mutable_data_ptr(), on.stream));
}
#endif

// ---- the operator

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> infonce(const Tensor& features_, const Tensor& index_, const Tensor& labels_,
                                                   at::TensorList queues, at::TensorList counts,
                                                   const optional<Tensor>& excluded_, double temperature,
                                                   double base_temperature, double loss_weight, bool features_grad) {
  const auto features = checked_features(features_);
  const auto device = features.device();
  TORCH_CHECK_VALUE(index_.dim() == 1, "index must be [R], got ", index_.sizes());
  const auto index = checked(index_, "index", index_.sizes(), at::kLong, device);
  const auto labels = checked(labels_, "labels", index.sizes(), at::kLong, device);
  const auto excluded = checked(excluded_, "excluded", index.sizes(), at::kLong, device);
  TORCH_CHECK_VALUE(queues.size() <= kMaxQueues, "at most ", kMaxQueues, " queues, got ", queues.size());
  TORCH_CHECK_VALUE(queues.size() == counts.size(), "each queue needs counts");

  InfoNCE args{};
  args.layout = layout_of(features);
  args.count = index.numel();
  args.classes = queues.empty() ? std::numeric_limits<int64_t>::max() : queues[0].size(0);
  std::vector<Tensor> kept;  // what the pointers in args need
  for (size_t q = 0; q < queues.size(); ++q) {
    TORCH_CHECK_VALUE(queues[q].dim() == 3 && queues[q].size(0) == args.classes &&
                          queues[q].size(2) == args.layout.dim && queues[q].device() == device,
                      "queues must be [", args.classes, ", N, ", args.layout.dim, "] on ", device, ", got ",
                      queues[q].sizes(), " on ", queues[q].device());
    const Tensor& rows = kept.emplace_back(queues[q].contiguous());
    args.queue[args.queues] = {read<void>(rows), nullptr, rows.size(1), dtype_of(rows, "queues")};
    kept.push_back(checked(counts[q], "counts", {args.classes}, at::kLong, device));
    args.queue[args.queues++].counts = read<int64_t>(kept.back());
  }
  if constexpr (std::is_same_v<Device, Cpu>) {  // elsewhere, reading the index would wait for the device
    TORCH_CHECK_VALUE(args.count == 0 || index.max().template item<int64_t>() < args.layout.pixels, "index beyond the ",
                      args.layout.pixels, " pixels");
  }

  const auto sums = features.options().dtype(accumulation(features)).memory_format(at::MemoryFormat::Contiguous);
  const auto loss = at::empty({}, sums), anchor_loss = at::empty({args.count}, sums);
  const auto positives = at::empty({args.count}, index.options());
  Tensor grad_features;
  if (features_grad) grad_features = empty_like_features(features, unscaled_grad(features));
  args.temperature = temperature;
  args.base_temperature = base_temperature;
  args.loss_weight = loss_weight;
  args.dtype = dtype_of(features, "features");
  args.features = read<void>(features);
  args.index = read<int64_t>(index);
  args.labels = read<int64_t>(labels);
  args.excluded = read<int64_t>(excluded);
  args.loss = write<void>(loss);
  args.anchor_loss = write<void>(anchor_loss);
  args.positives = write<int64_t>(positives);
  args.grad_features = write<void>(grad_features);
  Device::dispatch(features, "infonce", [&](auto, const auto& on) { run(args, on); });
  return {loss, anchor_loss, positives, defined_or_empty(grad_features, features)};
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("infonce", &infonce<Device>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def(
      "infonce(Tensor features, Tensor index, Tensor labels, Tensor[] queues, Tensor[] counts, Tensor? excluded, "
      "float temperature, float base_temperature, float loss_weight, bool features_grad) -> "
      "(Tensor loss, Tensor anchor_loss, Tensor positives, Tensor grad_features)");
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
