// What csrc/common/cuda/device.cuh includes where there is no nvcc: the CUDA built-ins, for one CPU thread that runs
// all threads of a launch in turn.
#pragma once

// CUDA's own headers first: they have host versions of the vector types, half and bfloat16.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#undef __align__
#undef __constant__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __host__
#undef __launch_bounds__
#undef __noinline__
#undef __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static
#define __device__
#define __forceinline__ inline
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))
#define __shared__ use_CU_SHARED_instead

#include "builtins.h"
#include "instructions.h"
#include "memory.h"
#include "scheduler.h"

// The architecture that the instructions belong to.
#define __CUDA_ARCH__ 900

#define threadIdx (cusim::current->index)
#define blockIdx (cusim::block_index)
#define blockDim (cusim::block_size)
#define gridDim (cusim::grid_size)
#define warpSize 32

#define CU_UNROLL
#define CU_DYN_SHARED(T, name) T* const name = static_cast<T*>(cusim::dynamic_shared_memory())
#define CU_SHARED(T, name, ...)      \
  static char name##_tag;            \
  typedef T name##_type __VA_ARGS__; \
  name##_type& name = *static_cast<name##_type*>(cusim::shared_variable(&name##_tag, sizeof(name##_type), #name))

template <class... P, class... A>
cudaError_t cu_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t, A... args) {
  const auto call = [&] { kernel(static_cast<P>(args)...); };
  const auto body = [](const void* context) { (*static_cast<decltype(&call)>(context))(); };
  return cusim::launch(grid, block, shared, body, &call);
}
