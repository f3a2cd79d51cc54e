"""``python -m pixcontrast.env``: versions, build and devices, and what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil

import torch

from . import __version__, ops

OPTIONAL = ("torchvision", "timm", "torchmetrics", "tyro", "tensorboard", "matplotlib")


def report() -> dict[str, str]:
    """Everything that a bug report should say, by name."""
    if ops.available():
        info = ops._C.build_info()
        with_cuda = f"with CUDA {info['cuda']} kernels" if info["cuda"] else "CPU only"
        extension = f"{with_cuda}, built against torch {info['torch']}, uses {info['cpu_capability']}"
        if info["torch"] != torch.__version__:
            extension += f"; torch is now {torch.__version__}: rebuild with `pip install --no-build-isolation .`"
    else:
        extension = f"missing, everything runs on the PyTorch reference; it did not load: {ops.load_error}"
    if torch.cuda.is_available():
        devices = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        devices = (
            "none found, everything runs on the CPU" if torch.version.cuda else "none: this is a CPU build of torch"
        )
    versions = {}
    for name in OPTIONAL:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed (only the trainer needs it)"
    return {
        "pixcontrast": __version__,
        "extension": extension,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "GPUs": devices,
        "nvcc": shutil.which("nvcc") or "not found (only needed to build CUDA kernels)",
        **versions,
    }


def main() -> None:
    lines = report()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
