// The CUDA form of project.h, for float, __nv_bfloat16 and __half. All pointers of the structs are to device memory; an
// index outside [0, P) means no pixel.
//
// `tensor_cores`, from compute capability 8.0 on, multiplies by tensor cores, which rounds float to tf32; otherwise all
// products are float32's. The workspace of project_backward_cuda, of as many bytes as its _workspace function says, is
// aligned to 256 and may hold anything. Nothing is allocated, waited for or read by the host, so the calls can be
// captured in a CUDA graph. Results are the same bit by bit on every device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "project.h"

namespace pixcontrast {

template <class T>
cudaError_t project_cuda(const Project<T>& args, bool tensor_cores, cudaStream_t stream);

template <class T>
size_t project_backward_cuda_workspace(const ProjectBackward<T>& args);
template <class T>
cudaError_t project_backward_cuda(const ProjectBackward<T>& args, bool tensor_cores, void* workspace,
                                  cudaStream_t stream);

}  // namespace pixcontrast
