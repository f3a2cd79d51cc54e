"""The operators, one file each: public function, ``autograd.Function``, fake implementation. This file loads them."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
BACKENDS = ("auto", "extension", "reference")

REBUILD = "pip install --no-build-isolation ."


def check_build(built: str, installed: str) -> None:
    """Refuses an extension that was built against another release of torch, which would fail to load or crash.

    Raises:
        ImportError: naming both versions.
    """
    if built.split(".")[:2] != installed.split(".")[:2]:
        raise ImportError(
            f"the compiled kernels of pixcontrast were built against torch {built}, and torch {installed} is "
            f"installed: rebuild them (`{REBUILD}` in a checkout) or install that torch again"
        )


try:
    from .._built import TORCH as _torch_version  # written by setup.py
except ImportError:
    _torch_version = ""
if _torch_version and find_spec("pixcontrast._C"):
    check_build(_torch_version, torch.__version__)

try:
    import pixcontrast._C as _C

    load_error: str | None = None
    _cuda_version = _C.build_info()["cuda"]  # now, because torch.compile cannot look into the extension
except ImportError as error:
    _C = None  # type: ignore[assignment]
    if isinstance(error, ModuleNotFoundError) and error.name == "pixcontrast._C":
        load_error = f"there is no pixcontrast/_C for Python {platform.python_version()}"
    else:
        built = f"built against torch {_torch_version}" if _torch_version else "built against an unknown torch"
        load_error = f"{error}; it was {built}, torch {torch.__version__} is installed"
    _cuda_version = ""
    warnings.warn(
        f"pixcontrast: the compiled kernels did not load ({load_error}); everything runs, slower, on plain PyTorch. "
        f"To build them, in a checkout: {REBUILD}",
        stacklevel=2,
    )


def available() -> bool:
    """Whether the compiled extension could be loaded."""
    return _C is not None


def fake(operator: str) -> Callable[[Function], Function]:
    """Makes the decorated function the fake implementation of an operator of the extension, if that could be loaded."""
    return torch.library.register_fake(f"pixcontrast::{operator}") if available() else lambda function: function


def missing_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no compiled kernel for tensors of ``dtype`` on ``device``, and what to do; ``None`` if there is."""
    rebuild = f"rebuild with `{REBUILD}`"
    if _C is None:
        return f"the extension did not load ({load_error}); {rebuild}"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "it has no kernel inside of torch.func (vmap, grad, jvp, ...)"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it has no kernel for {device.type}; move the tensors to cpu or cuda"
    if not _cuda_version:
        return f"it was built without CUDA kernels; {rebuild} where nvcc is found"
    return "it has no float64 kernel for cuda; use float32" if dtype == torch.float64 else None


def uses_extension(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``backend`` means the compiled kernels for tensors of ``dtype`` on ``device``.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: ``"extension"`` was asked for and there is no kernel.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    if backend == "reference":
        return False
    missing = missing_kernel(device, dtype)
    if backend == "extension" and missing:
        raise RuntimeError(f'backend="extension": {missing}; or use backend="auto", which then runs on plain PyTorch')
    return missing is None


def release_memory() -> None:
    """Give the memory that operators on the CPU keep for large results back to the system."""
    if _C is not None:
        _C.release_memory()
