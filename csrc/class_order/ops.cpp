#include <limits>
#include <utility>
#include <vector>

#include "class_order/class_order.h"
#include "common/tensor.h"

namespace pixcontrast {
namespace {

void run(const LabelsAt& args, const Cpu&) {
  std::vector<int64_t> column(args.width);
  for (int64_t x = 0; x < args.width; ++x) column[x] = x * args.full_width / args.width;
  cpu::Pieces(args.batch * args.height, 16, 64).run([&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t y = row % args.height * args.full_height / args.height;
      const int64_t* const from = args.labels + (row / args.height * args.full_height + y) * args.full_width;
      for (int64_t x = 0; x < args.width; ++x) {
        const int64_t label = from[column[x]];
        const bool valid = label >= 0 && label < args.classes && label != args.ignore_index;
        args.result[row * args.width + x] = valid ? label : -1;
      }
    }
  });
}

void run(const ClassOrder& args, const Cpu&) {
  const int64_t buckets = args.classes + 1;  // the last one for invalid labels
  const auto bucket_of = [&](int64_t row) {
    const int64_t label = args.labels[row];
    return label >= 0 && label < args.classes ? label : args.classes;
  };
  const cpu::Pieces pieces(args.rows, 16, std::max<int64_t>(buckets, 8192));
  std::vector<int64_t> next(pieces.count * buckets);  // [pieces, C + 1] rows of a class, then where the next one goes
  pieces.run([&](int64_t piece, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) ++next[piece * buckets + bucket_of(row)];
  });
  int64_t before = 0;
  for (int64_t c = 0; c < buckets; ++c) {
    const int64_t start = before;
    for (int64_t piece = 0; piece < pieces.count; ++piece) {
      before += std::exchange(next[piece * buckets + c], before);
    }
    if (c == args.classes) {
      *args.total = start;
    } else {
      args.start[c] = start;
      args.count[c] = before - start;
    }
  }
  pieces.run([&](int64_t piece, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t c = bucket_of(row), at = next[piece * buckets + c]++;
      args.order[at] = row;
      args.sorted_labels[at] = c < args.classes ? c : -1;
    }
  });
}

#ifdef PIXCONTRAST_WITH_CUDA
void run(const LabelsAt& args, const Cuda& device) { C10_CUDA_CHECK(labels_at_cuda(args, device.stream)); }
void run(const ClassOrder& args, const Cuda& device) {
  const Tensor workspace = device.workspace(class_order_cuda_workspace(args));
  C10_CUDA_CHECK(class_order_cuda(args, workspace.mutable_data_ptr(), device.stream));
}
#endif

// `labels`, contiguous.
Tensor checked_labels(const Tensor& labels, int64_t num_classes) {
  TORCH_CHECK_VALUE(num_classes > 0 && num_classes < std::numeric_limits<int32_t>::max(),
                    "num_classes must be within 1..2^31 - 2, got ", num_classes);
  return checked(labels, "labels", labels.sizes(), at::kLong, labels.device());
}

template <class Device>
Tensor labels_at(const Tensor& labels_, int64_t height, int64_t width, int64_t num_classes, int64_t ignore_index) {
  const Tensor labels = checked_labels(labels_, num_classes);
  TORCH_CHECK_VALUE(labels.dim() == 3, "labels must be [B, H, W], got ", labels.sizes());
  TORCH_CHECK_VALUE(height >= 0 && width >= 0, "height and width must be at least 0, got ", height, " and ", width);
  const auto result = at::empty({labels.size(0), height, width}, labels.options());
  TORCH_CHECK_VALUE(labels.numel() > 0 || result.numel() == 0, "labels must have a pixel for each cell of ", height,
                    " x ", width, ", got ", labels.sizes());
  Device::on(labels, [&](const auto& device) {
    run(LabelsAt{labels.size(0), labels.size(1), labels.size(2), height, width, num_classes, ignore_index,
                 read<int64_t>(labels), write<int64_t>(result)},
        device);
  });
  return result;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> class_order(const Tensor& labels_, int64_t num_classes) {
  const Tensor labels = checked_labels(labels_, num_classes);
  TORCH_CHECK_VALUE(labels.numel() <= std::numeric_limits<int32_t>::max(),
                    "labels must have fewer than 2^31 elements, got ", labels.numel());
  const auto empty = [&](int64_t size) { return at::empty({size}, labels.options()); };
  const Tensor order = empty(labels.numel()), sorted_labels = empty(labels.numel());
  const Tensor start = empty(num_classes), count = empty(num_classes), total = empty(1);
  Device::on(labels, [&](const auto& device) {
    run(ClassOrder{labels.numel(), num_classes, read<int64_t>(labels), write<int64_t>(order),
                   write<int64_t>(sorted_labels), write<int64_t>(start), write<int64_t>(count), write<int64_t>(total)},
        device);
  });
  return {order, sorted_labels, start, count, total};
}

template <class Device>
void implement(torch::Library& library) {
  library.impl("labels_at", &labels_at<Device>);
  library.impl("class_order", &class_order<Device>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pixcontrast, library) {
  library.def("labels_at(Tensor labels, SymInt height, SymInt width, int num_classes, int ignore_index) -> Tensor");
  library.def(
      "class_order(Tensor labels, int num_classes) -> (Tensor order, Tensor sorted_labels, Tensor start, Tensor count, "
      "Tensor total)");
}

PIXCONTRAST_IMPLEMENT(implement)

}  // namespace pixcontrast
