// Products of bfloat16 in pairs, summed in float32, by the instruction vdpbf16ps. Only where has_bf16() says so.
//
// A pair is 32 bits, the first element below. The left operand of a product has neighbours of a row as pairs, as rows
// lie in memory; the right one neighbours of a column, as pair_rows() makes them.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>

#include "common/cpu/kernels.h"

namespace pixcontrast::cpu {

// Whether the processor has the instruction, and PIXCONTRAST_CPU_CAPABILITY does not ask for less.
bool has_bf16();

void bf16_product(const Product<uint32_t, float>& args);

// to [count] = elements, rounded to the nearest, ties to even; and the way back.
void round(const float* elements, int64_t count, c10::BFloat16* to);
void widen(const c10::BFloat16* elements, int64_t count, float* to);

// to [ceil(count / 2), columns] = pairs of rows [count, columns] that follow each other, `stride` from row to row;
// columns are a multiple of kColumnStep. The last row of an odd count has zeros beside it.
void pair_rows(const c10::BFloat16* rows, int64_t stride, int64_t count, int64_t columns, uint32_t* to);

// The same for rows [count, columns] of float32, which are rounded, in their own place: pairs lie `stride` from each
// other, too. sum [columns], unless it is null, += the rounded elements.
void round_to_pairs(float* rows, int64_t count, int64_t stride, int64_t columns, float* sum);

}  // namespace pixcontrast::cpu
