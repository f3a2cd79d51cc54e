#include "warp_functions.h"

#include <algorithm>

namespace cusim {
namespace {

constexpr int kLanes = 32;

template <class Operand, class Body>
void for_each(void* const* operands, uint32_t lanes, const Body& body) {
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes >> lane & 1) body(*static_cast<Operand*>(operands[lane]), lane);
  }
}

uint32_t combine(const Reduce& a, uint32_t b) {
  const bool less = a.is_signed ? static_cast<int32_t>(a.value) < static_cast<int32_t>(b) : a.value < b;
  switch (a.kind) {
    case Reduction::add:
      return a.value + b;
    case Reduction::min:
      return less ? a.value : b;
    case Reduction::max:
      return less ? b : a.value;
    case Reduction::bit_and:
      return a.value & b;
    case Reduction::bit_or:
      return a.value | b;
    case Reduction::bit_xor:
      return a.value ^ b;
  }
  __builtin_unreachable();
}

}  // namespace

void shuffle(void* const* operands, uint32_t lanes) {
  for_each<Shuffle>(operands, lanes, [&](Shuffle& mine, int lane) {
    if (!(lanes >> mine.source & 1)) {
      fail("shuffle: lane %d reads lane %d, which takes no part (mask %08x)", lane, mine.source, lanes);
    }
    mine.received = static_cast<const Shuffle*>(operands[mine.source])->sent;
  });
}

void vote(void* const* operands, uint32_t lanes) {
  for_each<Vote>(operands, lanes, [&](Vote& mine, int) {
    mine.lanes = lanes;
    for_each<Vote>(operands, lanes, [&](const Vote& other, int lane) {
      mine.same |= static_cast<uint32_t>(other.value == mine.value) << lane;
    });
  });
}

void reduce(void* const* operands, uint32_t lanes) {
  bool first = true;
  uint32_t result = 0;
  for_each<Reduce>(operands, lanes, [&](const Reduce& operand, int) {
    result = first ? operand.value : combine(operand, result);
    first = false;
  });
  for_each<Reduce>(operands, lanes, [&](Reduce& operand, int) { operand.result = result; });
}

}  // namespace cusim
