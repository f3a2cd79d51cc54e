// Pixel InfoNCE with one denominator for each positive (Wang et al., ICCV 2021, as their code computes it).
//
// For anchor x_i of class y_i and keys k_j, z_ij = <x_i, k_j> / T:
//   negatives: keys of other classes          L_i  = log sum_neg e^z
//   positives: keys of y_i, P_i of them       l_ij = log(e^z_ij + e^L_i)
//   loss_i = 1/P_i sum_pos (l_ij - z_ij)      loss = loss_weight T / T_base * mean_i loss_i   over anchors with P_i > 0
// With s_ij = e^(L_i - l_ij) = sigma(L_i - z_ij) and e_in = e^(z_in - L_i):
//   dloss_i/dx_i = 1/(T P_i) * ( (sum_pos s_ij) sum_neg e_in k_n - sum_pos s_ij k_j )
// Keys are the rows of queues [C, N, D] (constants), or, without a queue, the other anchors (gradient on both sides).
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace pixcontrast {

struct InfoNCE {
  at::Tensor anchors;           // [R, D] float32 or float64, contiguous
  at::ScalarType feature_type;  // that they came in
  at::Tensor labels;  // [R] int64; an anchor with a label outside [0, C) takes no part (below 0 without queue)
  std::vector<at::Tensor> queues;  // [C, N_q, D] each, any float dtype, contiguous; none: anchors against each other
  std::vector<at::Tensor> counts;  // [C] int64 each: valid rows, first in the queue
  at::Tensor excluded;  // [R] int64 or undefined: a key of the own class that is no positive (-1: none), counted
                        // over the queues one after the other
  double temperature, base_temperature, loss_weight;
  bool needs_grad;
};

struct InfoNCEResult {
  at::Tensor loss;         // []
  at::Tensor anchor_loss;  // [R] loss_i, 0 where an anchor takes no part
  at::Tensor positives;    // [R] int64 P_i
  at::Tensor grad;         // [R, D] dloss/danchors, or [0]
};

InfoNCEResult infonce_cpu(const InfoNCE& args);

}  // namespace pixcontrast
