// A tile of bfloat16 keys and its two products with bfloat16 rows, summed in float32 by the instruction vdpbf16ps. Only
// where has_bf16() says so.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <vector>

namespace pixcontrast::cpu {

// Whether the processor has the instruction, and PIXCONTRAST_CPU_CAPABILITY does not ask for less.
bool has_bf16();

class Bf16Tile {
 public:
  // Channels are padded with zeros: this is the number of them in a row of keys or anchors of `dim` channels.
  static int64_t padded(int64_t dim) { return (dim + 31) / 32 * 32; }

  // keys [count, dim], one row after the other, are copied into the two layouts that the products want.
  void pack(const c10::BFloat16* keys, int64_t count, int64_t dim);

  // Numbers from one row of z to the next.
  int64_t stride() const { return (count_ + 31) / 32 * 32; }

  // z [rows, stride()] = <anchor, key>; anchors [rows, padded(dim)].
  void multiply(const c10::BFloat16* anchors, int64_t rows, float* z) const;

  // Rounds a row of z to bfloat16 in its place, as accumulate() wants it; returns the sum of the rounded numbers.
  float round(float* z) const;

  // out [rows, dim] += z keys, for rounded z [rows, stride()].
  void accumulate(const float* z, int64_t rows, float* out) const;

 private:
  struct alignas(64) Pairs {
    uint32_t of[16];  // two bfloat16 each
  };
  int64_t count_ = 0, dim_ = 0;
  // Panels of 32 keys, and of 32 channels: [panel, pair of channels, key] and [panel, pair of keys, channel].
  std::vector<Pairs> channel_pairs_, key_pairs_;
};

}  // namespace pixcontrast::cpu
