"""Build of the extension ``pixcontrast._C``; everything else is in pyproject.toml.

Environment:
    PIXCONTRAST_CUDA: ``auto`` (default) builds the CUDA kernels if this PyTorch has CUDA and nvcc is found; ``1``
        insists; ``0`` leaves them out. Whether the machine has a GPU does not matter.
    TORCH_CUDA_ARCH_LIST, MAX_JOBS: as for every PyTorch extension.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "pixcontrast builds against the PyTorch that it will run with, and none is installed here.\n"
        "Install torch first, then: pip install --no-build-isolation ."
    )


def with_cuda() -> bool:
    """Whether to build the CUDA kernels."""
    wish = os.environ.get("PIXCONTRAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"PIXCONTRAST_CUDA must be auto, 0 or 1, got {wish!r}")
    possible = torch.version.cuda is not None and CUDA_HOME is not None and (Path(CUDA_HOME) / "bin/nvcc").exists()
    if wish == "1" and not possible:
        sys.exit(
            f"PIXCONTRAST_CUDA=1, but PyTorch has CUDA {torch.version.cuda} and nvcc was looked for in {CUDA_HOME}.\n"
            "Install a CUDA build of PyTorch and the CUDA toolkit (or set CUDA_HOME), or build with PIXCONTRAST_CUDA=0"
        )
    return possible and wish != "0"


def compiler_flags() -> list[str]:
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall"]
    if sys.platform.startswith("linux"):
        # at::parallel_for needs it. At compile time only: the OpenMP library is the one that torch has already loaded,
        # linking another would give the process two thread pools.
        flags.append("-fopenmp")
    return flags


def extension():
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))
    kernels = sorted(str(path) for path in Path("csrc").rglob("*.cu"))
    cuda = bool(kernels) and with_cuda()
    return (CUDAExtension if cuda else CppExtension)(
        "pixcontrast._C",
        sources + (kernels if cuda else []),
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")),
        define_macros=[
            ("PIXCONTRAST_TORCH_VERSION", f'"{torch.__version__}"'),
            ("PIXCONTRAST_CUDA_VERSION", f'"{torch.version.cuda}"' if cuda else '""'),
        ],
        extra_compile_args={"cxx": compiler_flags(), "nvcc": ["-O3", "-std=c++17"]},
    )


with_cuda()  # complain about a wish that cannot be met even while there are no CUDA kernels
setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
