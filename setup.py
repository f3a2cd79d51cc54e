"""Build of the extension ``pixcontrast._C``, and what depends on the PyTorch that it is built against; everything else
is in pyproject.toml.

A source distribution needs no PyTorch and does not depend on the machine: MANIFEST.in lists its files.

Environment:
    PIXCONTRAST_CUDA: ``auto`` (default) builds the CUDA kernels if this PyTorch has CUDA and nvcc is found; ``1``
        insists; ``0`` leaves them out. Whether the machine has a GPU does not matter.
    TORCH_CUDA_ARCH_LIST, MAX_JOBS: as for every PyTorch extension. Without the first, the kernels are built for the GPU
        of this machine or, where there is none, for all that are supported.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

OLDEST_TORCH = (2, 10)


def find_cuda() -> None:
    """Sets CUDA_HOME, unless it is set, to the toolkit that nvcc on the path belongs to, or the usual place: one with
    headers. PyTorch takes the folder above nvcc, which may be a link."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parent.parent] if nvcc else []
    for place in [*places, Path("/usr/local/cuda")]:
        if (place / "bin" / "nvcc").exists() and (place / "include" / "cuda_runtime.h").exists():
            os.environ.setdefault("CUDA_HOME", str(place))


find_cuda()  # before PyTorch looks
try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    torch = None  # type: ignore[assignment]
    BuildExtension = object  # type: ignore[assignment,misc]


def check_torch() -> None:
    """Ends the build if PyTorch is not there or too old."""
    if torch is None:
        sys.exit(
            "pixcontrast builds against the PyTorch that it will run with, and none is installed here.\n"
            "Install torch first, then: pip install --no-build-isolation ."
        )
    if torch_release() < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        sys.exit(f"pixcontrast needs torch {oldest} or newer, {torch.__version__} is installed; upgrade torch first")


def torch_release() -> tuple[int, ...]:
    return tuple(int(number) for number in torch.__version__.split(".")[:2])


def missing_for_cuda() -> str | None:
    """What keeps the CUDA kernels from being built, if anything does."""
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA; install a CUDA build of it"
    nvcc, header = (Path(CUDA_HOME or "") / name for name in ("bin/nvcc", "include/cuda_runtime.h"))
    if not nvcc.exists() or not header.exists():
        needed = f"install the CUDA toolkit {torch.version.cuda} or set CUDA_HOME"
        return f"no nvcc with its headers (CUDA_HOME is {CUDA_HOME}); {needed}"
    version = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        return f"{nvcc} is not of CUDA {torch.version.cuda}, which PyTorch was built with; set CUDA_HOME to one that is"
    return None


def with_cuda() -> bool:
    """Whether to build the CUDA kernels."""
    wish = os.environ.get("PIXCONTRAST_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"PIXCONTRAST_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return False
    missing = missing_for_cuda()
    if missing and wish == "1":
        sys.exit(f"PIXCONTRAST_CUDA=1, but {missing}; or build with PIXCONTRAST_CUDA=0")
    if missing:
        print(f"pixcontrast: building without CUDA kernels: {missing}")
    return missing is None


def compiler_flags() -> list[str]:
    """Without ``-std``: BuildExtension adds the one that the headers of this PyTorch need."""
    flags = ["-O3", "-fvisibility=hidden", "-Wall"]
    if sys.platform.startswith("linux"):
        # at::parallel_for needs it. At compile time only: the OpenMP library is the one that torch has already loaded,
        # linking another would give the process two thread pools.
        flags.append("-fopenmp")
    return flags


ARCHITECTURES = "7.5;8.0;9.0+PTX"  # 8.0 also runs on 8.6 and 8.9; the PTX on whatever comes later


def extension():
    cuda = with_cuda()
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    sources = [str(path) for path in Path("csrc").rglob("*.cpp")]
    if cuda:
        sources += [str(path) for path in Path("csrc").rglob("*.cu")]
    macros = [
        ("PIXCONTRAST_TORCH_VERSION", f'"{torch.__version__}"'),
        ("PIXCONTRAST_CUDA_VERSION", f'"{torch.version.cuda}"' if cuda else '""'),
    ]
    return (CUDAExtension if cuda else CppExtension)(
        "pixcontrast._C",
        sorted(sources),
        depends=sorted(str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern)),
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[*macros, ("PIXCONTRAST_WITH_CUDA", None)] if cuda else macros,
        extra_compile_args={"cxx": compiler_flags(), "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden"]},
    )


class Build(BuildExtension):
    """Writes beside the extension what it was built against, because an extension that does not load cannot say so."""

    def run(self) -> None:
        super().run()
        place = Path(self.get_ext_fullpath("pixcontrast._C")).with_name("_built.py")
        place.write_text(
            f'"""What the extension was built against; written by setup.py."""\n\nTORCH = "{torch.__version__}"\n'
        )


def main() -> None:
    torch_range = f"torch>={'.'.join(map(str, OLDEST_TORCH))}"
    if {"sdist", "egg_info"} & set(sys.argv):
        setup(install_requires=[torch_range, "numpy"])
        return
    check_torch()
    setup(
        # an extension loads only with the release of torch that it was built against
        install_requires=[f"torch=={'.'.join(map(str, torch_release()))}.*", "numpy"],
        ext_modules=[extension()],
        cmdclass={"build_ext": Build},
    )


if __name__ == "__main__":
    main()
