// Pixel InfoNCE with one denominator for each positive (Wang et al., ICCV 2021, as their code computes it).
//
// For anchor x_i of class y_i and keys k_j, z_ij = <x_i, k_j> / T:
//   negatives: keys of other classes          lse_i = log sum_neg e^z
//   positives: keys of y_i, P_i of them       l_ij  = log(e^z_ij + e^lse_i)
//   loss_i = 1/P_i sum_pos (l_ij - z_ij)
//   loss   = loss_weight T / T_base * mean_i loss_i    over anchors with P_i > 0
// With s_ij = e^(lse_i - l_ij) = sigma(lse_i - z_ij) and e_in = e^(z_in - lse_i):
//   dloss_i/dx_i = 1/(T P_i) * ( (sum_pos s_ij) sum_neg e_in k_n - sum_pos s_ij k_j )
// Keys are the rows of queues [C, N, D] (constants), or, without a queue, the other anchors (gradient on both sides).
// No torch header: raw pointers and sizes.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

constexpr int kMaxQueues = 8;

struct InfoNCEQueue {
  const void* rows;       // [C, N, D] of dtype
  const int64_t* counts;  // [C] valid rows come first
  int64_t capacity;       // N
  Dtype dtype;
};

struct InfoNCE {
  FeatureLayout layout;
  int64_t count;  // R anchors
  int queues;     // 0: the anchors contrast each other
  InfoNCEQueue queue[kMaxQueues];
  int64_t classes;  // C; without queues above every label
  double temperature, base_temperature, loss_weight;
  Dtype dtype;              // of the features; "sums" below are double for double, else float
  const void* features;     // [P, D] or [B, D, H*W]
  const int64_t* index;     // [R] pixel; an anchor with a pixel outside [0, P) is not valid
  const int64_t* labels;    // [R] class; an anchor of a class outside [0, C) is not valid
  const int64_t* excluded;  // [R] or null: a key of the own class that is no positive (-1: none), counted over the
                            // queues one after the other
  void* loss;               // [] sums
  void* anchor_loss;        // [R] sums: loss_i, 0 for an anchor that is not valid
  int64_t* positives;       // [R] P_i
  void* grad_features;      // like features, but float for half (see GradOf); or null: no gradient
};

#ifdef PIXCONTRAST_WITH_CUDA
struct InfoNCEDevice {
  int sm_count, capability;  // multiprocessors; 10 major + minor
  int64_t shared_memory;     // bytes that a block may ask for (sharedMemPerBlockOptin)
  bool allow_tf32;           // float32 products may be rounded to tf32
};

// Queues must have one dtype, and double is not known. The tensor cores are used where features and queues are both
// bfloat16, both float16, or both float32 with allow_tf32, D is a multiple of 16 up to 256, queues are aligned to 16
// bytes, and the device has compute capability 8.0 and the shared memory (tf32 above D = 128: 192 KB); everything else
// is exact float32. cudaErrorInvalidValue: 2^30 or more keys and anchors, or 2^31 or more channels.
//
// The workspace has as many bytes as the first function says, aligned to 256; its contents may be anything. Nothing is
// allocated, waited for or read by the host, so the call can be captured in a CUDA graph, and the same sm_count gives
// the same result bit by bit.
size_t infonce_cuda_workspace(const InfoNCE& args, const InfoNCEDevice& device);
cudaError_t infonce_cuda(const InfoNCE& args, const InfoNCEDevice& device, void* workspace, cudaStream_t stream);
#endif

}  // namespace pixcontrast
