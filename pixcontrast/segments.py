"""Stand-in for the operator class_order: rows of a class stand together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    order: Tensor
    labels: Tensor
    start: Tensor
    count: Tensor
    total: Tensor


def class_order(labels: Tensor, num_classes: int, backend: str = "auto") -> Segments:
    flat = labels.reshape(-1)
    group = torch.where((flat >= 0) & (flat < num_classes), flat, num_classes)
    order = torch.argsort(group, stable=True)
    bounds = torch.searchsorted(group[order], torch.arange(num_classes + 1, device=flat.device))
    return Segments(order, group[order], bounds[:-1], bounds.diff(), bounds[-1])
