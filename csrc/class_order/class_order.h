// Positions by class, and label maps at another size: what turns a label map into the Segments of common/layout.h.
//
//   labels_at    result[b, y, x] = label if 0 <= label < C and label != ignore_index, else -1
//                with label = labels[b, floor(y H / h), floor(x W / w)]
//   class_order  a stable counting sort
//                order [P]       the positions of class 0 ascending, then those of class 1, and so on; last those of
//                                invalid labels, which lie outside [0, C)
//                sorted_labels   labels[order[i]], or -1 if that is invalid
//                start, count    where the labels c begin in that order, and how many they are
//                total           how many labels are valid
//
// No torch header: raw pointers and sizes.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

struct LabelsAt {
  int64_t batch, full_height, full_width, height, width;  // B, H, W, h, w
  int64_t classes, ignore_index;
  const int64_t* labels;  // [B, H, W]
  int64_t* result;        // [B, h, w]
};

struct ClassOrder {
  int64_t rows;            // P < 2^31
  int64_t classes;         // C < 2^31 - 1
  const int64_t* labels;   // [P]
  int64_t* order;          // [P]
  int64_t* sorted_labels;  // [P]
  int64_t *start, *count;  // [C]
  int64_t* total;          // [1]
};

#ifdef PIXCONTRAST_WITH_CUDA
// One launch.
cudaError_t labels_at_cuda(const LabelsAt& args, cudaStream_t stream);

// Three launches. The workspace has as many bytes as the first function says, aligned to 256; its contents may be
// anything. It holds at most 4 MB, or 32 (C + 1) bytes where that is more.
size_t class_order_cuda_workspace(const ClassOrder& args);
cudaError_t class_order_cuda(const ClassOrder& args, void* workspace, cudaStream_t stream);
#endif

}  // namespace pixcontrast
