// Functions that the lanes of a warp do together.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "scheduler.h"

namespace cusim {

struct Shuffle {
  uint64_t sent, received;
  int source;
};
void shuffle(void* const* operands, uint32_t lanes);

struct Vote {
  uint64_t value;
  uint32_t same, lanes;  // lanes with the same value, lanes taking part
};
void vote(void* const* operands, uint32_t lanes);

enum class Reduction { add, min, max, bit_and, bit_or, bit_xor };
struct Reduce {
  Reduction kind;
  bool is_signed;
  uint32_t value, result;
};
void reduce(void* const* operands, uint32_t lanes);

template <class T>
T shuffle(uint32_t mask, const T& value, int source, const char* name, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>, "shuffles take up to 8 bytes");
  Shuffle operand{0, 0, source};
  std::memcpy(&operand.sent, static_cast<const void*>(&value), sizeof(T));
  warp_operation(mask, shuffle, &operand, name, site);
  T result;
  std::memcpy(static_cast<void*>(&result), &operand.received, sizeof(T));
  return result;
}

template <class T>
Vote vote(uint32_t mask, const T& value, const char* name, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "votes take up to 8 bytes");
  Vote operand{0, 0, 0};
  std::memcpy(&operand.value, &value, sizeof(T));
  warp_operation(mask, vote, &operand, name, site);
  return operand;
}

template <class T>
T reduce(uint32_t mask, T value, Reduction kind, const char* name, Site site) {
  static_assert(sizeof(T) == sizeof(uint32_t) && std::is_integral_v<T>, "reductions take 32-bit integers");
  Reduce operand{kind, std::is_signed_v<T>, static_cast<uint32_t>(value), 0};
  warp_operation(mask, reduce, &operand, name, site);
  return static_cast<T>(operand.result);
}

}  // namespace cusim

#define CUSIM_SITE cusim::Site site = cusim::Site::here()

inline void __syncwarp(unsigned mask = ~0u, CUSIM_SITE) { cusim::warp_barrier(mask, "__syncwarp", site); }

// A source outside the lane's group of `width` is the lane itself, but for __shfl_sync, which wraps around.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUSIM_SITE) {
  const int group = cusim::current->lane & ~(width - 1);
  return cusim::shuffle(mask, value, group | (source & (width - 1)), "__shfl_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUSIM_SITE) {
  const int lane = cusim::current->lane, source = lane - static_cast<int>(delta), first = lane & ~(width - 1);
  return cusim::shuffle(mask, value, source < first ? lane : source, "__shfl_up_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUSIM_SITE) {
  const int lane = cusim::current->lane, source = lane + static_cast<int>(delta), last = lane | (width - 1);
  return cusim::shuffle(mask, value, source > last ? lane : source, "__shfl_down_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUSIM_SITE) {
  const int lane = cusim::current->lane, source = lane ^ bits, last = lane | (width - 1);
  return cusim::shuffle(mask, value, source > last ? lane : source, "__shfl_xor_sync", site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUSIM_SITE) {
  const cusim::Vote vote = cusim::vote(mask, predicate != 0, "__ballot_sync", site);
  return predicate ? vote.same : vote.lanes & ~vote.same;
}
inline int __any_sync(unsigned mask, int predicate, CUSIM_SITE) {
  const cusim::Vote vote = cusim::vote(mask, predicate != 0, "__any_sync", site);
  return predicate || vote.same != vote.lanes;
}
inline int __all_sync(unsigned mask, int predicate, CUSIM_SITE) {
  const cusim::Vote vote = cusim::vote(mask, predicate != 0, "__all_sync", site);
  return predicate && vote.same == vote.lanes;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUSIM_SITE) {
  return cusim::vote(mask, value, "__match_any_sync", site).same;
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all_same, CUSIM_SITE) {
  const cusim::Vote vote = cusim::vote(mask, value, "__match_all_sync", site);
  *all_same = vote.same == vote.lanes;
  return *all_same ? vote.lanes : 0;
}

#define CUSIM_REDUCE(name, kind)                                            \
  template <class T>                                                        \
  T name(unsigned mask, T value, CUSIM_SITE) {                              \
    return cusim::reduce(mask, value, cusim::Reduction::kind, #name, site); \
  }
CUSIM_REDUCE(__reduce_add_sync, add)
CUSIM_REDUCE(__reduce_min_sync, min)
CUSIM_REDUCE(__reduce_max_sync, max)
CUSIM_REDUCE(__reduce_and_sync, bit_and)
CUSIM_REDUCE(__reduce_or_sync, bit_or)
CUSIM_REDUCE(__reduce_xor_sync, bit_xor)
#undef CUSIM_REDUCE
