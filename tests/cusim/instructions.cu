// One warp does each instruction of device.cuh, and each warp and block function that the CPU has to imitate, on
// numbers in global memory. All matrices are row by row.
#include "common/cuda/device.cuh"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// Two 16-bit numbers of memory in a register, `stride` apart.
__device__ uint32_t pair(const uint16_t* from, int stride = 1) {
  return from[0] | static_cast<uint32_t>(from[stride]) << 16;
}

// d [16, 8] = a [16, K] b [K, 8] + c, with a and b taken to the registers number by number.
template <class Multiply>
__device__ void multiply(const float* c, float* d, const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Multiply instruction) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sums[4], addend[4];
  for (int i = 0; i < 4; ++i) addend[i] = c[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  instruction(sums, a, b, addend);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

template <bool Bfloat16>
__global__ void multiply_16(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto left = [&](int row, int column) { return pair(a + row * 16 + column); };
  const auto right = [&](int row) { return pair(b + row * 8 + g, 8); };
  multiply(c, d, {left(g, 2 * t), left(g + 8, 2 * t), left(g, 2 * t + 8), left(g + 8, 2 * t + 8)},
           {right(2 * t), right(2 * t + 8)},
           [](auto&... operands) { Bfloat16 ? cu_mma_bf16_16816(operands...) : cu_mma_f16_16816(operands...); });
}

__global__ void multiply_tf32(const float* a, const float* b, const float* c, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto left = [&](int row, int column) { return cu_to_tf32(a[row * 8 + column]); };
  const auto right = [&](int row) { return cu_to_tf32(b[row * 8 + g]); };
  multiply(c, d, {left(g, t), left(g + 8, t), left(g, t + 4), left(g + 8, t + 4)}, {right(t), right(t + 4)},
           [](auto&... operands) { cu_mma_tf32_1688(operands...); });
}

__global__ void round_to_tf32(const float* x, uint32_t* bits) { bits[threadIdx.x] = cu_to_tf32(x[threadIdx.x]); }

// registers [N, 32] of N matrices [8, 8], which lie in shared memory with 8 numbers between their rows.
template <int N, bool Transposed>
__global__ void load_matrices(const uint16_t* matrices, uint32_t* registers) {
  CU_SHARED(uint4, rows, [2 * 8 * N]);
  const int lane = threadIdx.x;
  if (lane < 8 * N) rows[2 * lane] = reinterpret_cast<const uint4*>(matrices)[lane];
  __syncthreads();
  uint32_t loaded[N];
  cu_ldmatrix<N, Transposed>(loaded, rows + 2 * (lane % (8 * N)));
  for (int m = 0; m < N; ++m) registers[m * 32 + lane] = loaded[m];
}

// to [3, 32, 8]: three groups of copies of which the last has half of its bytes and the second is waited for last.
__global__ void copy(const uint16_t* from, uint16_t* to) {
  CU_SHARED(uint4, buffer, [3][32]);
  const int lane = threadIdx.x;
  for (int group = 0; group < 3; ++group) {
    cu_cp_async16(&buffer[group][lane], from + (group * 32 + lane) * 8, group == 2 ? 8 : 16);
    cu_cp_async_commit();
  }
  const auto store = [&](int group) { reinterpret_cast<uint4*>(to)[group * 32 + lane] = buffer[group][lane]; };
  cu_cp_async_wait<2>();
  store(0);
  cu_cp_async_wait<0>();
  store(1);
  store(2);
}

// results [16, 32]: what each lane gets for its number and its vote, whether it is above 0.
__global__ void warp_functions(const int* numbers, unsigned* results) {
  const int lane = threadIdx.x, x = numbers[lane];
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int all_same;
  const unsigned found[] = {
      static_cast<unsigned>(__shfl_sync(kAll, x, 35)),
      static_cast<unsigned>(__shfl_sync(kAll, x, lane + 3, 8)),
      static_cast<unsigned>(__shfl_up_sync(kAll, x, 3)),
      static_cast<unsigned>(__shfl_down_sync(kAll, x, 3, 16)),
      static_cast<unsigned>(__shfl_xor_sync(half, x, 5)),
      __ballot_sync(half, x > 0),
      static_cast<unsigned>(__any_sync(kAll, x > 0) != 0),
      static_cast<unsigned>(__all_sync(kAll, x > 0) != 0),
      __match_any_sync(kAll, x),
      __match_all_sync(half, x, &all_same),
      static_cast<unsigned>(__reduce_add_sync(kAll, x)),
      static_cast<unsigned>(__reduce_min_sync(kAll, x)),
      static_cast<unsigned>(__reduce_max_sync(half, x)),
      __reduce_and_sync(kAll, static_cast<unsigned>(x)),
      __reduce_or_sync(kAll, static_cast<unsigned>(x)),
      __reduce_xor_sync(kAll, static_cast<unsigned>(x)),
  };
  for (int i = 0; i < 16; ++i) results[i * 32 + lane] = found[i];
}

// results [4, 2, 32], of a grid of 2 blocks of 4 x 8 threads: the place of each thread, then votes of the block.
__global__ void block_functions(const int* numbers, int* results) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x, at = blockIdx.y * 32 + thread, x = numbers[thread];
  results[at] = blockIdx.y * 1000 + threadIdx.y * 10 + threadIdx.x;
  results[64 + at] = __syncthreads_count(x > 0);
  results[128 + at] = __syncthreads_and(x > 0) != 0;
  results[192 + at] = __syncthreads_or(x > 0) != 0;
}

// All 32 threads change each of the totals [8].
__global__ void atomics(const int* numbers, int* totals) {
  const int x = numbers[threadIdx.x];
  atomicAdd(totals, x);
  atomicSub(totals + 1, x);
  atomicMin(totals + 2, x);
  atomicMax(totals + 3, x);
  atomicAnd(totals + 4, x);
  atomicOr(totals + 5, x);
  atomicXor(totals + 6, x);
  atomicCAS(totals + 7, 0, 5);
}

template <class... P, class... A>
int one_warp(void (*kernel)(P...), A... arguments) {
  return cu_launch(kernel, dim3(1), dim3(32), 0, nullptr, arguments...);
}

}  // namespace

extern "C" {
int run_multiply_bf16(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
  return one_warp(multiply_16<true>, a, b, c, d);
}
int run_multiply_f16(const uint16_t* a, const uint16_t* b, const float* c, float* d) {
  return one_warp(multiply_16<false>, a, b, c, d);
}
int run_multiply_tf32(const float* a, const float* b, const float* c, float* d) {
  return one_warp(multiply_tf32, a, b, c, d);
}
int run_round_to_tf32(const float* x, uint32_t* bits) { return one_warp(round_to_tf32, x, bits); }
int run_load_matrices(int64_t count, int64_t transposed, const uint16_t* matrices, uint32_t* registers) {
  if (count == 2) return one_warp(transposed ? load_matrices<2, true> : load_matrices<2, false>, matrices, registers);
  return one_warp(transposed ? load_matrices<4, true> : load_matrices<4, false>, matrices, registers);
}
int run_copy(const uint16_t* from, uint16_t* to) { return one_warp(copy, from, to); }
int run_warp_functions(const int* numbers, unsigned* results) { return one_warp(warp_functions, numbers, results); }
int run_block_functions(const int* numbers, int* results) {
  return cu_launch(block_functions, dim3(1, 2), dim3(4, 8), 0, nullptr, numbers, results);
}
int run_atomics(const int* numbers, int* totals) { return one_warp(atomics, numbers, totals); }
}
