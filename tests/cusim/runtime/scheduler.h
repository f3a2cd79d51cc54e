// Runs a launch: the blocks one after the other, the threads of a block in turn, each until it has to wait.
//
// All barriers and warp operations check what CUDA leaves undefined: threads of one block at different barriers, lanes
// of one mask in different operations, threads that have exited while others count on them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "report.h"

namespace cusim {

// What a kernel knows of its thread.
struct Thread {
  uint3 index;
  int number, lane, warp;
};

extern Thread* current;  // null outside of kernels
extern uint3 block_index;
extern dim3 block_size, grid_size;

// 0: first ready, first run; 1: last ready, first run, which lets one warp go as far ahead as it can, and the blocks
// backwards; larger numbers: random, with that seed.
void set_order(unsigned order);

// Launches, copies and fills so far.
extern int64_t launches;

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*), const void* context);

enum class Count { none, sum, all, any };
int block_barrier(Count count, bool vote, const char* name, Site site);

// Done once for all lanes of a mask, when the last has come: operands[lane] is what each lane brought.
using WarpOperation = void (*)(void* const* operands, uint32_t lanes);
void warp_operation(uint32_t mask, WarpOperation operation, void* operand, const char* name, Site site);
void warp_barrier(uint32_t mask, const char* name, Site site);

}  // namespace cusim
