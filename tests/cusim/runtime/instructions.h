// The PTX instructions that csrc/common/cuda/device.cuh wraps: asynchronous copies and matrix operations.
#pragma once

#include <cstdint>

#include "report.h"

namespace cusim {

// The destination is NaN from here on; the data land at the wait that covers the copy. Both may happen on the device,
// and together they show a missing wait as well as a missing barrier before the copy.
void copy_async(void* to, const void* from, int valid, Site site);
void commit_copies();
void wait_for_copies(int groups_under_way);
void check_copies_are_done();

void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, Site site);
void multiply_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site);
void multiply_f16(float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site);
void multiply_tf32(float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site);
uint32_t round_to_tf32(float x);

}  // namespace cusim

#define CUSIM_INLINE inline __attribute__((always_inline))

CUSIM_INLINE void cu_cp_async16(void* to, const void* from, int valid = 16, cusim::Site site = cusim::Site::here()) {
  cusim::copy_async(to, from, valid, site);
}
CUSIM_INLINE void cu_cp_async_commit() { cusim::commit_copies(); }
template <int N>
CUSIM_INLINE void cu_cp_async_wait() {
  cusim::wait_for_copies(N);
}
template <int N, bool Transposed>
CUSIM_INLINE void cu_ldmatrix(uint32_t (&r)[N], const void* row, cusim::Site site = cusim::Site::here()) {
  static_assert(N == 2 || N == 4, "two or four matrices");
  cusim::load_matrices(r, N, Transposed, row, site);
}
CUSIM_INLINE void cu_mma_bf16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                                    cusim::Site site = cusim::Site::here()) {
  cusim::multiply_bf16(d, a, b, c, site);
}
CUSIM_INLINE void cu_mma_f16_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                                   cusim::Site site = cusim::Site::here()) {
  cusim::multiply_f16(d, a, b, c, site);
}
CUSIM_INLINE void cu_mma_tf32_1688(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                                   cusim::Site site = cusim::Site::here()) {
  cusim::multiply_tf32(d, a, b, c, site);
}
CUSIM_INLINE uint32_t cu_to_tf32(float x) { return cusim::round_to_tf32(x); }
