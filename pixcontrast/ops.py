"""Loads the compiled extension and tells PyTorch the shapes of its operators (fake implementations)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

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


def release_memory() -> None:
    """Give the memory that operators on the CPU keep for large results back to the system."""
    if _C is not None:
        _C.release_memory()


def _accumulation(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _unscaled_grad(features: Tensor) -> Tensor:
    """For the gradient of ``features`` for ``grad_output = 1``: that of float16 is in float32, see ``_scaled``."""
    return torch.empty_like(features, dtype=torch.float32 if features.dtype == torch.float16 else None)


if available():

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
            _unscaled_grad(features) if features_grad else features.new_empty(0),
            features.new_empty(labels.shape if weight_logits_grad else 0, dtype=dtype),
            torch.empty_like(mean) if mean_grad else features.new_empty(0, dtype=dtype),
        )

    @torch.library.register_fake("pixcontrast::project")
    def _(features: Tensor, index: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return features.new_empty((index.shape[0], weight.shape[0]))

    @torch.library.register_fake("pixcontrast::project_backward")
    def _(
        grad: Tensor,
        features: Tensor,
        index: Tensor,
        weight: Tensor,
        features_grad: bool,
        weight_grad: bool,
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        channels_last = features.dim() == 4 and features.is_contiguous(memory_format=torch.channels_last)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        return (
            torch.empty_like(features, memory_format=memory_format) if features_grad else features.new_empty(0),
            weight.new_empty(weight.shape if weight_grad else 0),
            weight.new_empty(weight.shape[:1] if bias_grad else 0),
        )

    @torch.library.register_fake("pixcontrast::scale_")
    def _(tensors: list[Tensor], factor: Tensor) -> None:
        return None

    @torch.library.register_fake("pixcontrast::grouped_linear_cuda")
    def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return rows.new_empty((rows.shape[0], weight.shape[1]))

    @torch.library.register_fake("pixcontrast::grouped_outer_cuda")
    def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
        return left.new_empty((ends.shape[0], left.shape[1], right.shape[1]))

    @torch.library.register_fake("pixcontrast::head_moments")
    def _(hidden: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        mean = hidden.new_empty(hidden.shape[1], dtype=_accumulation(hidden))
        return mean, torch.empty_like(mean), hidden.new_empty((), dtype=torch.int64)

    @torch.library.register_fake("pixcontrast::head")
    def _(
        hidden: Tensor,
        valid: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        return hidden.new_empty((hidden.shape[0], weight.shape[0]))

    @torch.library.register_fake("pixcontrast::head_backward")
    def _(
        grad: Tensor,
        hidden: Tensor,
        valid: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        share: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        of_norm = mean.new_empty(mean.shape), mean.new_empty(mean.shape)
        return (
            hidden.new_empty(hidden.shape),
            *of_norm,
            weight.new_empty(weight.shape),
            mean.new_empty(weight.shape[:1]),
        )

    @torch.library.register_fake("pixcontrast::sort_by_class")
    def _(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        return torch.empty_like(labels), labels.new_empty(classes)

    @torch.library.register_fake("pixcontrast::selector_hidden")
    def _(
        rows: Tensor, order: Tensor, ends: Tensor, first: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden = rows.new_empty((order.shape[0], first.shape[1]), dtype=dtype)
        mean = rows.new_empty(first.shape[:2], dtype=_accumulation(hidden))
        return hidden, mean, torch.empty_like(mean)

    @torch.library.register_fake("pixcontrast::selector")
    def _(
        rows: Tensor,
        order: Tensor,
        ends: Tensor,
        hidden: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bias: Tensor,
    ) -> Tensor:
        return bias.new_empty(rows.shape[:1])

    @torch.library.register_fake("pixcontrast::selector_backward")
    def _(
        grad: Tensor,
        rows: Tensor,
        order: Tensor,
        ends: Tensor,
        first: Tensor,
        hidden: Tensor,
        mean: Tensor,
        rstd: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        own: Tensor,
        rows_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        norm_weight, norm_bias, weight = (mean.new_empty(mean.shape) for _ in range(3))
        of_rows, of_first = rows.new_empty(rows.shape if rows_grad else 0), first.new_empty(first.shape)
        return of_rows, of_first, norm_weight, norm_bias, weight, mean.new_empty(ends.shape)

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
            _unscaled_grad(features) if features_grad else features.new_empty(0),
        )
