"""The operators, one file each: public function, ``autograd.Function``, fake implementation. This file loads them."""

from __future__ import annotations

import warnings

import torch

BACKENDS = ("auto", "extension", "reference")

try:
    from .. import _C

    load_error: str | None = None
    _cuda_version = _C.build_info()["cuda"]  # now, because torch.compile cannot look into the extension
except ImportError as error:
    _C = None  # type: ignore[assignment]
    load_error = str(error)
    _cuda_version = ""
    warnings.warn(
        f"pixcontrast: the compiled kernels did not load ({error}); everything runs, slower, on plain PyTorch. "
        "To build them: pip install --no-build-isolation .",
        stacklevel=2,
    )


def available() -> bool:
    """Whether the compiled extension could be loaded."""
    return _C is not None


def missing_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no compiled kernel for tensors of ``dtype`` on ``device``, and what to do; ``None`` if there is."""
    rebuild = "rebuild with `pip install --no-build-isolation .`"
    if _C is None:
        return f"the extension did not load ({load_error}); {rebuild}"
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
