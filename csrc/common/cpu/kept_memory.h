// Memory for results of the size of feature maps, of which training asks for the same at every step.
//
// malloc hands blocks of more than 32 MB back to the system as soon as they are freed (smaller ones when they lie on
// top of the heap), and the next step takes fresh ones, page by page, each filled with zeros first: for a gradient of
// 134 MB that took longer than computing it.
#pragma once

#include <c10/core/Allocator.h>

namespace pixcontrast::cpu {

// Allocates like PyTorch, but keeps large blocks that are freed and gives them to the next that wants as many bytes.
// What is kept and what is in use is together never more than was once in use.
c10::Allocator* kept_memory();

// Gives all that is kept back to the system.
void release_kept_memory();

}  // namespace pixcontrast::cpu
