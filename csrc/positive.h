// Class-wise memory contrast, positives only (Alonso et al., ICCV 2021, Eq. 8), in its factorised form.
//
//   m_c  = sum_j v_j z_j/|z_j|           v_j = sigma(b_j) / sum_k sigma(b_k)      over the memory rows of class c
//   L_c  = sum_i w_i (1 - <f_i/|f_i|, m_c>)   w_i = sigma(a_i) / sum_k sigma(a_k)  over the pixels of class c
//   loss = loss_weight / C * sum_c L_c   over classes with at least two pixels and two memory rows
//
// No torch header: raw pointers and sizes. T is how rows are stored, Acc<T> what sums are kept in.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pixcontrast {

constexpr double kNormFloor = 1e-12;  // rows of a smaller norm count as the zero vector
constexpr int64_t kMinRows = 2;       // of pixels and of memory, for a class to take part

template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How a feature matrix of P pixels and D channels lies in memory.
struct FeatureLayout {
  int64_t pixels;      // P in all
  int64_t dim;         // D
  int64_t map_pixels;  // 0: rows [P, D] (also channels_last maps); else H*W of maps [B, D, H*W]
};

template <class T>
struct MemoryMean {
  int64_t classes, capacity, dim;
  const T* queue;           // [C, N, D]
  const int64_t* counts;    // [C]  valid rows come first
  const Acc<T>* weights;    // [C, N] logits b, or null: all alike
  Acc<T>* mean;             // [C, D] m; forward only
  const Acc<T>* grad_mean;  // [C, D] backward only
  Acc<T>* grad_weights;     // [C, N] backward only
};

template <class T>
struct Positive {
  FeatureLayout layout;
  int64_t classes;
  int64_t ignore_index;
  double loss_weight;
  const T* features;             // [P, D] or [B, D, H*W]
  const int64_t* labels;         // [P]
  const Acc<T>* weights;         // [P] logits a, or null: all alike
  const Acc<T>* mean;            // [C, D] m
  const int64_t* memory_counts;  // [C]
  Acc<T>* loss;                  // []
  Acc<T>* class_loss;            // [C] L, 0 where a class takes no part
  int64_t* pixels;               // [C] valid pixels
  int64_t* unknown;              // []  labels that are neither a class nor ignore_index
  T* grad_features;              // like features, or null
  Acc<T>* grad_weights;          // [P] or null
  Acc<T>* grad_mean;             // [C, D] or null
};

template <class T>
void memory_mean_cpu(const MemoryMean<T>& args);
template <class T>
void memory_mean_backward_cpu(const MemoryMean<T>& args);
template <class T>
void positive_cpu(const Positive<T>& args);

}  // namespace pixcontrast
