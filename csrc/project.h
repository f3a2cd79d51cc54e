// Some pixels of a feature map through a linear layer, without copying the pixels first.
//
//   y_r = W x_p(r) + b     with p(r) = index[r]; y_r = 0 where p(r) < 0, and then row r passes no gradient
//   dx_p = W^T sum_{r: p(r) = p} dy_r,   dW = sum_r dy_r x_p(r)^T,   db = sum_r dy_r      over rows with p(r) >= 0
//
// No torch header: raw pointers and sizes. T is how all numbers are stored.
#pragma once

#include "common/layout.h"

namespace pixcontrast {

template <class T>
struct Project {
  FeatureLayout layout;  // P pixels, dim = Din
  int64_t rows;          // R
  int64_t outputs;       // Dout
  const T* features;     // [P, Din] or [B, Din, H*W]
  const int64_t* index;  // [R] pixel of each row, -1 for none
  const T* weight;       // [Dout, Din]
  const T* bias;         // [Dout] or null
  T* result;             // [R, Dout]
};

template <class T>
struct ProjectBackward {
  FeatureLayout layout;
  int64_t rows, outputs;
  const T* features;
  const int64_t* index;
  const int64_t* order;  // [R] CUDA, with grad_features: the rows sorted by index, equal ones in their order
  const T* weight;
  const T* grad;     // [R, Dout] dy
  T* grad_features;  // like features, or null
  T* grad_weight;    // [Dout, Din] or null
  T* grad_bias;      // [Dout] or null
};

template <class T>
void project_cpu(const Project<T>& args);
template <class T>
void project_backward_cpu(const ProjectBackward<T>& args);

}  // namespace pixcontrast
