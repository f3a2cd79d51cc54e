// The CUDA form of positive.h, for float, __nv_bfloat16 and __half. All pointers of the structs are to device memory.
//
// A launcher needs a workspace of as many bytes as its _workspace function says, aligned to 256; the contents may be
// anything. `sm_count` is the number of multiprocessors of the device and must be the same in both calls; sums come out
// the same bit by bit on any device with as many. Nothing is allocated, waited for or read by the host, so the calls
// can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "positive.h"

namespace pixcontrast {

template <class T>
size_t memory_mean_cuda_workspace(const MemoryMean<T>& args);
template <class T>
cudaError_t memory_mean_cuda(const MemoryMean<T>& args, void* workspace, cudaStream_t stream);
template <class T>
cudaError_t memory_mean_backward_cuda(const MemoryMean<T>& args, cudaStream_t stream);

template <class T>
size_t positive_cuda_workspace(const Positive<T>& args, int sm_count);
template <class T>
cudaError_t positive_cuda(const Positive<T>& args, int sm_count, void* workspace, cudaStream_t stream);

}  // namespace pixcontrast
