"""Which pixels take part, at which resolution: fixed shapes, no waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample


def _positions(size: int, full: int, device: torch.device) -> Tensor:
    """Index ``floor(k * full / size)`` of the pixel that stands for cell k: the nearest rule of ``interpolate``."""
    return torch.arange(size, device=device) * full // size


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Label map ``[B, H, W]`` at ``size = (h, w)`` by the nearest rule; integers stay integers."""
    height, width = labels.shape[-2:]
    if (height, width) == tuple(size):
        return labels
    rows = _positions(size[0], height, labels.device)
    columns = _positions(size[1], width, labels.device)
    return labels[:, rows][:, :, columns]


def logits_at(logits: Tensor, size: tuple[int, int], full: tuple[int, int]) -> Tensor:
    """Logits at the pixels that :func:`labels_at` picks.

    Equals upsampling ``logits [B, C, h', w']`` bilinearly (``align_corners=True``) to ``full = (H, W)`` and then taking
    the nearest pixel for each cell of ``size = (h, w)``, as the released code does, without ever making the full map.

    Returns:
        ``[B, C, h, w]``.
    """
    steps = []
    for cells, pixels in zip(size, full, strict=True):
        at = _positions(cells, pixels, logits.device).to(logits.dtype)
        steps.append(at * (2 / max(pixels - 1, 1)) - 1)
    grid = torch.stack(torch.meshgrid(steps[1], steps[0], indexing="xy"), dim=-1)
    return grid_sample(logits, grid.expand(logits.shape[0], -1, -1, -1), mode="bilinear", align_corners=True)


def confident(logits: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Pixels whose predicted class is the label, with a probability above ``threshold`` (strictly).

    Args:
        logits: ``[B, C, h, w]`` at the resolution of the labels.
        labels: ``[B, h, w]`` int64.

    Returns:
        ``[B, h, w]`` bool.
    """
    probability, predicted = torch.softmax(logits.float(), dim=1).max(dim=1)
    return (predicted == labels) & (probability > threshold)
