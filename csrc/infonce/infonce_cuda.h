// The CUDA form of infonce.h: the same loss, with the gradient written straight to the features. All pointers but those
// of the struct itself are to device memory; the struct has no tensors.
//
// The workspace has as many bytes as infonce_cuda_workspace says for the same arguments, aligned to 256; its contents
// may be anything. Nothing is allocated, waited for or read by the host, so the call can be captured in a CUDA graph,
// and the same `sm_count` gives the same result bit by bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "common/layout.h"

namespace pixcontrast {

constexpr int kMaxQueues = 4;

enum class Storage { kFloat, kBFloat16, kHalf };

struct InfoNCEQueue {
  const void* rows;       // [C, N, D] of queue_type
  int64_t capacity;       // N
  const int64_t* counts;  // [C] valid rows come first
};

struct InfoNCECuda {
  FeatureLayout layout;
  int64_t count;    // R anchors
  int64_t classes;  // C; of no meaning without queues
  int queues;       // 0: the anchors contrast each other
  InfoNCEQueue queue[kMaxQueues];
  Storage feature_type, queue_type;
  double temperature, base_temperature, loss_weight;
  bool allow_tf32;          // float32 products may be rounded to tf32
  int capability;           // of the device: 10 major + minor
  int64_t shared_memory;    // bytes that a block may ask for (sharedMemPerBlockOptin)
  const void* features;     // [P, D] or [B, D, H*W] of feature_type
  const int64_t* index;     // [R] pixel; an anchor with a pixel outside [0, P) takes no part
  const int64_t* labels;    // [R] class; an anchor of class outside [0, C) takes no part (below 0 without queues)
  const int64_t* excluded;  // [R] or null: see infonce.h
  float* loss;              // []
  float* anchor_loss;       // [R]
  int64_t* positives;       // [R]
  void* grad_features;      // like features, or null: no gradient
};

// Tensor cores multiply where features and queues are both bfloat16, both float16, or both float32 with allow_tf32, D
// is a multiple of 16 up to 256, queues are aligned to 16 bytes, and the device has compute capability 8.0 and the
// shared memory (tf32 above D = 128: 192 KB); everything else is multiplied in exact float32. cudaErrorInvalidValue:
// more than kMaxQueues queues, or 2^31 or more anchors, channels or keys.
size_t infonce_cuda_workspace(const InfoNCECuda& args, int sm_count);
cudaError_t infonce_cuda(const InfoNCECuda& args, void* workspace, int sm_count, cudaStream_t stream);

}  // namespace pixcontrast
