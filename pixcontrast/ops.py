"""Loads the compiled extension and tells PyTorch the shapes of its operators (fake implementations)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

BACKENDS = ("auto", "extension", "reference")

try:
    from . import _C

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


def _accumulation(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _empty_like_features(features: Tensor) -> Tensor:
    channels_last = features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(features, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


if available():

    @torch.library.register_fake("pixcontrast::labels_at")
    def _(labels: Tensor, height: int, width: int, num_classes: int, ignore_index: int) -> Tensor:
        return labels.new_empty((labels.shape[0], height, width))

    @torch.library.register_fake("pixcontrast::class_order")
    def _(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        sizes = (labels.numel(), labels.numel(), num_classes, num_classes, 1)
        order, sorted_labels, start, count, total = (labels.new_empty(size) for size in sizes)
        return order, sorted_labels, start, count, total

    @torch.library.register_fake("pixcontrast::gather_pixels")
    def _(features: Tensor, index: Tensor) -> Tensor:
        return features.new_empty((index.shape[0], features.shape[1]))

    @torch.library.register_fake("pixcontrast::scatter_pixels")
    def _(grad: Tensor, index: Tensor, features: Tensor) -> Tensor:
        return _empty_like_features(features)

    @torch.library.register_fake("pixcontrast::class_mean")
    def _(queue: Tensor, counts: Tensor, weight_logits: Tensor | None) -> Tensor:
        return queue.new_empty((queue.shape[0], queue.shape[2]), dtype=_accumulation(queue))

    @torch.library.register_fake("pixcontrast::class_mean_backward")
    def _(grad_mean: Tensor, queue: Tensor, counts: Tensor, weight_logits: Tensor) -> Tensor:
        return torch.empty_like(weight_logits, memory_format=torch.contiguous_format)

    @torch.library.register_fake("pixcontrast::positive")
    def _(
        features: Tensor,
        labels: Tensor,
        weight_logits: Tensor | None,
        mean: Tensor,
        memory_counts: Tensor,
        loss_weight: float,
        ignore_index: int,
        features_grad: bool,
        weight_logits_grad: bool,
        mean_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        classes = mean.shape[0]
        dtype = _accumulation(features)
        return (
            features.new_empty((), dtype=dtype),
            features.new_empty((classes,), dtype=dtype),
            labels.new_empty((classes,)),
            labels.new_empty(()),
            torch.empty_like(features) if features_grad else features.new_empty(0),
            features.new_empty(labels.shape if weight_logits_grad else 0, dtype=dtype),
            torch.empty_like(mean) if mean_grad else features.new_empty(0, dtype=dtype),
        )

    @torch.library.register_fake("pixcontrast::segment_topk")
    def _(
        scores: Tensor | None, order: Tensor | None, start: Tensor, count: Tensor, k: int, rejected: Tensor | None
    ) -> Tensor:
        return start.new_empty((start.shape[0], k))

    @torch.library.register_fake("pixcontrast::memory_write")
    def _(rows: Tensor, counts: Tensor, cursors: Tensor, rejected: Tensor, source: Tensor, index: Tensor) -> None:
        return None

    @torch.library.register_fake("pixcontrast::unit_rows")
    def _(rows: Tensor) -> Tensor:
        return rows.new_empty(rows.shape)

    @torch.library.register_fake("pixcontrast::scale_")
    def _(tensors: list[Tensor], factor: Tensor) -> None:
        return None

    @torch.library.register_fake("pixcontrast::infonce")
    def _(
        features: Tensor,
        index: Tensor,
        labels: Tensor,
        queues: list[Tensor],
        counts: list[Tensor],
        excluded: Tensor | None,
        temperature: float,
        base_temperature: float,
        loss_weight: float,
        features_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = _accumulation(features)
        return (
            features.new_empty((), dtype=dtype),
            features.new_empty(index.shape, dtype=dtype),
            torch.empty_like(index),
            torch.empty_like(features) if features_grad else features.new_empty(0),
        )
