// Gradients that are written for an incoming gradient of one, scaled by the one that came.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pixcontrast {

// numbers [count] *= *factor. Both are on the device, so nobody waits to learn that the factor is one, as it mostly is;
// then nothing is read or written.
template <class T>
cudaError_t scale_cuda(T* numbers, int64_t count, const float* factor, int sm_count, cudaStream_t stream);

}  // namespace pixcontrast
