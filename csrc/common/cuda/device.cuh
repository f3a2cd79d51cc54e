// The one header through which kernels reach the machine: launch, shared memory, asynchronous copies, matrix
// instructions. Under nvcc these are the real things; any other compiler takes the same names from tests/cusim, which
// runs the kernels on the CPU. So the rules are:
//   - shared memory only through CU_SHARED and, once a kernel, CU_DYN_SHARED;
//   - launches only through cu_launch; inline PTX only in this file;
//   - no return before a barrier or a full-warp operation that other threads still reach.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

// ---- on the host: errors, dtypes, a workspace in parts, numbers of blocks

// Ends a launcher with the error of the call, if it has one.
#define CU_TRY(call) \
  if (const cudaError_t status = (call); status != cudaSuccess) return status

// INSTANTIATE(T) for the dtypes that kernels are compiled for.
#define CU_FOR_DTYPES(INSTANTIATE) INSTANTIATE(float) INSTANTIATE(__nv_bfloat16) INSTANTIATE(__half)

namespace pixcontrast::cuda {

// Hands out a workspace array by array. On a null workspace it only counts the bytes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<unsigned char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    unsigned char* const here = base_ ? base_ + used_ : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(here);
  }

  size_t bytes() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

// Blocks that take `size` items each.
inline unsigned blocks_for(int64_t items, int64_t size) { return static_cast<unsigned>((items + size - 1) / size); }

// The most dynamic shared memory that each kernel has been allowed on each device: asking the driver again costs more
// than a launch.
class LargestSharedMemory {
 public:
  // Calls set() unless a call for this kernel and device succeeded before with as many bytes or more.
  template <class Set>
  auto raise(const void* kernel, int device, size_t bytes, const Set& set) -> decltype(set()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t& largest = largest_[{kernel, device}];
    if (bytes <= largest) return {};
    const auto status = set();
    if (status == decltype(status){}) largest = bytes;
    return status;
  }

 private:
  std::mutex mutex_;
  std::map<std::pair<const void*, int>, size_t> largest_;
};

}  // namespace pixcontrast::cuda

// ---- on the device

#ifndef __CUDACC__

#include "cusim.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define CU_UNROLL _Pragma("unroll")

// CU_SHARED(float, tile, [4][32]); is a static array, CU_DYN_SHARED(float, tile); the one of the launch's size.
#define CU_SHARED(T, name, ...) __shared__ T name __VA_ARGS__
#define CU_DYN_SHARED(T, name)                                \
  extern __shared__ __align__(16) unsigned char cu_dynamic[]; \
  T* const name = reinterpret_cast<T*>(cu_dynamic)

namespace pixcontrast::cuda {
inline LargestSharedMemory& largest_shared_memory() {
  static LargestSharedMemory largest;
  return largest;
}
}  // namespace pixcontrast::cuda

// Starts a kernel with `shared` bytes of dynamic shared memory; says what went wrong with the launch itself.
template <class... P, class... A>
cudaError_t cu_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, A... args) {
  if (shared > 40 * 1024) {  // 48 KB are free, but static arrays count as well
    int device = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    const auto* const function = reinterpret_cast<const void*>(kernel);
    status = pixcontrast::cuda::largest_shared_memory().raise(function, device, shared, [&] {
      return cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    });
    if (status != cudaSuccess) return status;
  }
  // clang-format off
  kernel<<<grid, block, shared, stream>>>(static_cast<P>(args)...);
  // clang-format on
  return cudaGetLastError();
}

__device__ __forceinline__ uint32_t cu_shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes from global to shared memory in the background; bytes from `valid` on become zero and are not read.
// Both addresses must be multiples of 16.
__device__ __forceinline__ void cu_cp_async16(void* to, const void* from, int valid = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(cu_shared_address(to)), "l"(from), "r"(valid)
               : "memory");
}
// Closes the group of this thread's copies since the last one.
__device__ __forceinline__ void cu_cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most N of this thread's groups are under way; other threads' copies need a barrier as well.
template <int N>
__device__ __forceinline__ void cu_cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

// Loads N 8x8 matrices of 16-bit elements: lane 8m + r gives the address (a multiple of 16) of row r of matrix m; lane
// l gets elements (l/4, 2(l%4)) and the next, of the transposed matrices if Transposed.
template <int N, bool Transposed>
__device__ __forceinline__ void cu_ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 2 || N == 4, "two or four matrices");
  const uint32_t at = cu_shared_address(row);
  if constexpr (N == 4 && !Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (!Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  }
}

// d [16, 8] = a [16, K] b [K, 8] + c. With g = lane / 4 and t = lane % 4: d and c hold (g, 2t), (g, 2t+1), (g+8, 2t),
// (g+8, 2t+1). For 16-bit elements (K = 16, two in a register): a (g, 2t..), (g+8, 2t..), (g, 2t+8..), (g+8, 2t+8..), b
// (2t.., g), (2t+8.., g). For tf32 (K = 8): a (g, t), (g+8, t), (g, t+4), (g+8, t+4), b (t, g), (t+4, g).
__device__ __forceinline__ void cu_mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                  const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
__device__ __forceinline__ void cu_mma_f16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                 const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
__device__ __forceinline__ void cu_mma_tf32_1688(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                 const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};\n"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
// Rounds to the 10-bit mantissa of tf32, ties away from zero.
__device__ __forceinline__ uint32_t cu_to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}

#endif
