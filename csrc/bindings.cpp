// The Python module pixcontrast._C: loading it registers the operators; what else it has needs no dispatcher.
#include <pybind11/pybind11.h>

#include "common/cpu/work.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled operators of pixcontrast; see torch.ops.pixcontrast.";
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["torch"] = PIXCONTRAST_TORCH_VERSION;
        info["cuda"] = PIXCONTRAST_CUDA_VERSION;
        info["compiler"] = __VERSION__;
        info["cpu_capability"] = pixcontrast::cpu::capability();
        return info;
      },
      "What the extension was built with, and the instruction set that it uses on this machine.");
  module.def("release_memory", &pixcontrast::cpu::release_kept_memory,
             "Gives the memory that operators on the CPU keep for large results back to the system.");
}
