"""The loss that other trainers drop in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .functional import BACKENDS, positive_contrast
from .memory import ClassMemory
from .reference import MIN_ROWS
from .select import labels_at

OBJECTIVES = ("positive",)


class ContrastStats(NamedTuple):
    """What the loss saw; tensors on the device of the features, so that nothing waits for them until they are read."""

    pixels: Tensor
    """``[C]`` int64: valid pixels of each class."""
    similarity: Tensor
    """``[C]``: weighted mean cosine similarity of the pixels of each class with its memory; NaN where it has none."""
    memory_fill: Tensor
    """``[C]`` float32: share of the memory's rows that are valid."""


class PixelContrastLoss(nn.Module):
    """Pixel contrast against a class-wise memory.

    ``objective="positive"``: each pixel is pulled towards the memory rows of its class (Alonso et al., ICCV 2021)::

        criterion = PixelContrastLoss(objective="positive", ignore_index=255)
        loss = criterion(features, labels, queue=memory)

    Args:
        objective: ``"positive"``.
        ignore_index: label of pixels that take no part.
        loss_weight: factor of the loss. Setting it here instead of multiplying the result saves one pass over the
            gradient: the kernel writes the gradient with the factor already in it.
        on_empty: ``"zero"`` gives a zero that is connected to the graph when no class takes part; ``"raise"`` raises
            ``ValueError`` (and waits for the device to know).
        backend: ``"auto"`` takes the compiled kernels where there are some for the device, else plain PyTorch;
            ``"extension"`` and ``"reference"`` insist.

    Raises:
        ValueError: an unknown option.
    """

    def __init__(
        self,
        objective: str,
        *,
        ignore_index: int = 255,
        loss_weight: float = 1.0,
        on_empty: str = "zero",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        options = {"objective": (objective, OBJECTIVES), "on_empty": (on_empty, ("zero", "raise"))}
        options["backend"] = (backend, BACKENDS)
        for name, (given, known) in options.items():
            if given not in known:
                raise ValueError(f"PixelContrastLoss: {name} must be one of {known}, got {given!r}")
        self.objective, self.ignore_index, self.loss_weight = objective, ignore_index, loss_weight
        self.on_empty, self.backend = on_empty, backend

    def extra_repr(self) -> str:
        return f"{self.objective!r}, ignore_index={self.ignore_index}, loss_weight={self.loss_weight}"

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        queue: ClassMemory | Tensor,
        weights: Tensor | None = None,
        queue_weights: Tensor | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, ContrastStats]:
        """Contrast ``features`` with ``queue``.

        Args:
            features: ``[P, D]`` or ``[B, D, h, w]``, any norm (rows are normalised here).
            labels: ``[P]``, or ``[B, H, W]`` at any resolution (brought to ``h, w`` by the nearest rule); int64.
            queue: a :class:`ClassMemory`, or rows ``[C, N, D]`` that are all valid; a constant either way.
            weights: ``[P]`` or ``[B, h, w]`` logits of the pixels' attention weights.
            queue_weights: ``[C, N]`` logits of the memory rows' attention weights.
            return_stats: also return :class:`ContrastStats`.

        Returns:
            A scalar in float32 (float64 for float64 features).

        Raises:
            ValueError, TypeError: arguments that do not fit, named, with what was given and what is expected.
        """
        if features.dim() == 4 and labels.dim() == 3:
            labels = labels_at(labels, (features.shape[2], features.shape[3]))
        rows, counts = (queue.rows, queue.counts) if isinstance(queue, ClassMemory) else (queue, None)
        output = positive_contrast(
            features,
            labels,
            rows,
            queue_counts=counts,
            weights=weights,
            queue_weights=queue_weights,
            ignore_index=self.ignore_index,
            loss_weight=self.loss_weight,
            backend=self.backend,
        )
        if not return_stats and self.on_empty == "zero":
            return output.loss
        counts = torch.full_like(output.pixels, rows.shape[1]) if counts is None else counts
        taking_part = (output.pixels >= MIN_ROWS) & (counts >= MIN_ROWS)
        if self.on_empty == "raise" and not bool(taking_part.any()):
            raise ValueError(
                "PixelContrastLoss: no class takes part: it needs two pixels with its label and two rows in the memory"
            )
        if not return_stats:
            return output.loss
        similarity = torch.where(taking_part, 1 - output.class_loss, float("nan"))
        return output.loss, ContrastStats(output.pixels, similarity, counts / rows.shape[1])
