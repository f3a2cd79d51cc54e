// The kernels of memory_push for the tests: `type` is 0 for float, 1 for bfloat16, 2 for half.
#include "bindings.h"
#include "memory_push/memory_push.h"

using namespace pixcontrast;

extern "C" int64_t run_segment_topk(const float* scores, int64_t rows, const int64_t* order, int64_t positions,
                                    const int64_t* start, const int64_t* count, int64_t segments, int64_t k,
                                    int64_t* index, int64_t* rejected, uint64_t* workspace) {
  const SegmentTopk<float> args{{positions, segments, start, count}, k, rows, scores, order, index, rejected};
  return segment_topk_cuda(args, workspace, nullptr);
}

extern "C" int64_t run_memory_write(int64_t type, void* rows, int64_t classes, int64_t capacity, int64_t source_type,
                                    const void* source, int64_t pixels, int64_t dim, int64_t map_pixels,
                                    const int64_t* index, int64_t entries, int64_t* counts, int64_t* cursors,
                                    int64_t* rejected, float* workspace) {
  return with_type(type, [&](auto element) {
    return with_type(source_type, [&](auto source_element) -> int64_t {
      using T = decltype(element);
      using Source = decltype(source_element);
      const MemoryWrite<T, Source> args{classes,
                                        capacity,
                                        entries,
                                        {pixels, dim, map_pixels},
                                        static_cast<const Source*>(source),
                                        index,
                                        static_cast<T*>(rows),
                                        counts,
                                        cursors,
                                        rejected};
      return memory_write_cuda(args, workspace, nullptr);
    });
  });
}
