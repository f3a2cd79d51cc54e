// What the bindings of operators share.
#pragma once

#include "common/cuda/device.cuh"

// body(T()) for the type of that number: 0 float, 1 bfloat16, 2 half.
template <class Body>
int64_t with_type(int64_t type, const Body& body) {
  if (type == 0) return body(float());
  if (type == 1) return body(__nv_bfloat16());
  return body(__half());
}
