#include "instructions.h"

#include <cuda_fp16.h>

#include <cstring>
#include <vector>

#include "memory.h"
#include "race_check.h"
#include "scheduler.h"

namespace cusim {
namespace {

constexpr int kLanes = 32, kRowBytes = 16;

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kRowBytes == 0; }

// A thread's copies under way, the oldest first, and how many of them each committed group has.
struct Copies {
  struct Copy {
    void* to;
    const void* from;
    int valid;
  };
  std::vector<Copy> copies;
  std::vector<size_t> groups;
  size_t committed = 0;
};

Copies& my_copies() {
  static std::vector<Copies> of_thread(1024);
  return of_thread[current->number];
}

void need_all_lanes(uint32_t lanes, const char* name) {
  if (lanes != ~0u) fail("%s needs all 32 lanes, has %08x", name, lanes);
}

}  // namespace

void copy_async(void* to, const void* from, int valid, Site site) {
  if (!aligned(to) || !aligned(from)) {
    fail("cp.async at %s:%d: misaligned address, to %p from %p", site.file, site.line, to, from);
  }
  if (valid < 0 || valid > kRowBytes) fail("cp.async at %s:%d: %d valid bytes", site.file, site.line, valid);
  if (!shared_memory().holds(to)) fail("cp.async at %s:%d: not to shared memory", site.file, site.line);
  race::note(race::Access::start_copy, to, kRowBytes, __builtin_return_address(0));
  std::memset(to, 0xff, kRowBytes);
  my_copies().copies.push_back({to, from, valid});
}

void commit_copies() {
  Copies& mine = my_copies();
  mine.groups.push_back(mine.copies.size() - mine.committed);
  mine.committed = mine.copies.size();
}

void wait_for_copies(int groups_under_way) {
  Copies& mine = my_copies();
  if (mine.groups.size() <= static_cast<size_t>(groups_under_way)) return;
  const auto last_group = mine.groups.end() - groups_under_way;
  size_t landing = 0;
  for (auto group = mine.groups.begin(); group != last_group; ++group) landing += *group;
  for (size_t i = 0; i < landing; ++i) {
    const auto& [to, from, valid] = mine.copies[i];
    const void* pc = __builtin_return_address(0);
    if (valid > 0) race::note(race::Access::read, from, valid, pc);
    race::note(race::Access::write, to, kRowBytes, pc);
    std::memset(to, 0, kRowBytes);
    std::memcpy(to, from, valid);
  }
  mine.groups.erase(mine.groups.begin(), last_group);
  mine.copies.erase(mine.copies.begin(), mine.copies.begin() + landing);
  mine.committed -= landing;
}

void check_copies_are_done() {
  if (!my_copies().copies.empty()) fail("exits with %zu cp.async not waited for", my_copies().copies.size());
}

namespace {

struct MatrixLoad {
  uint32_t* registers;
  int count;
  bool transposed;
  uint16_t row[8];
};

void exchange_rows(void* const* operands, uint32_t lanes) {
  need_all_lanes(lanes, "ldmatrix");
  const auto load = [&](int lane) -> const MatrixLoad& { return *static_cast<const MatrixLoad*>(operands[lane]); };
  for (int lane = 0; lane < kLanes; ++lane) {
    const int first = lane / 4, second = lane % 4 * 2;
    for (int m = 0; m < load(lane).count; ++m) {
      const auto number = [&](int row, int column) -> uint32_t {
        if (load(lane).transposed) std::swap(row, column);
        return load(8 * m + row).row[column];
      };
      load(lane).registers[m] = number(first, second) | number(first, second + 1) << 16;
    }
  }
}

}  // namespace

void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, Site site) {
  MatrixLoad load{registers, count, transposed, {}};
  if (current->lane < 8 * count) {
    if (!aligned(row)) fail("ldmatrix at %s:%d: misaligned row %p", site.file, site.line, row);
    if (!shared_memory().holds(row)) fail("ldmatrix at %s:%d: not from shared memory", site.file, site.line);
    race::note(race::Access::read, row, kRowBytes, __builtin_return_address(0));
    std::memcpy(load.row, row, kRowBytes);
  }
  warp_operation(~0u, exchange_rows, &load, "ldmatrix", site);
}

namespace {

struct Multiplication {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};

// Two 16-bit numbers in a register, or one of 32 bits; `float number(register, half)`.
float bf16(uint32_t bits, int half) {
  bits = half ? bits & 0xffff0000u : bits << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
float f16(uint32_t bits, int half) {
  __half_raw raw;
  raw.x = static_cast<uint16_t>(half ? bits >> 16 : bits);
  return __half2float(raw);
}
float tf32(uint32_t bits, int) {
  bits &= ~0x1fffu;  // the tensor cores do not look at these
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

template <int InRegister, float (*Number)(uint32_t, int)>
void multiply(void* const* operands, uint32_t lanes) {
  constexpr int kRows = 16, kColumns = 8, kInner = 8 * InRegister;
  need_all_lanes(lanes, "mma");
  float a[kRows][kInner], b[kInner][kColumns];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& mine = *static_cast<const Multiplication*>(operands[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < InRegister; ++half) {
      const int k = t * InRegister + half;
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][k + i / 2 * kInner / 2] = Number(mine.a[i], half);
      for (int i = 0; i < 2; ++i) b[k + i * kInner / 2][g] = Number(mine.b[i], half);
    }
  }
  float d[kRows][kColumns] = {};
  for (int i = 0; i < kRows; ++i) {
    for (int k = 0; k < kInner; ++k) {
      for (int j = 0; j < kColumns; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& mine = *static_cast<const Multiplication*>(operands[lane]);
    for (int i = 0; i < 4; ++i) mine.d[i] = mine.c[i] + d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

void multiply_bf16(float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site) {
  Multiplication operand{d, a, b, c};
  warp_operation(~0u, multiply<2, bf16>, &operand, "mma.m16n8k16.bf16", site);
}

void multiply_f16(float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site) {
  Multiplication operand{d, a, b, c};
  warp_operation(~0u, multiply<2, f16>, &operand, "mma.m16n8k16.f16", site);
}

void multiply_tf32(float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site) {
  Multiplication operand{d, a, b, c};
  warp_operation(~0u, multiply<1, tf32>, &operand, "mma.m16n8k8.tf32", site);
}

uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
}

}  // namespace cusim
