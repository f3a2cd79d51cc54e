"""Calls that must be refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from pixcontrast import ClassMemory, PixelContrastLoss
from pixcontrast.functional import class_order

from .draw import Draw


def refusals(draw: Draw) -> list[str]:
    """Arguments that do not fit: ``ValueError`` or ``TypeError``, from either backend."""
    classes, dim = draw.number("C", 1), draw.number("D", 1)
    features, labels = torch.randn(6, dim), torch.zeros(6, dtype=torch.int64)
    memory, queue = ClassMemory(classes, 3, dim), torch.randn(classes, 3, dim)
    backend = draw.pick("reference", "extension")
    positive = PixelContrastLoss(objective="positive", backend=backend)
    infonce = PixelContrastLoss(max_samples=None, max_views=None, backend=backend)
    wrong: list[Callable[[], object]] = [
        lambda: positive(features, labels.int(), queue=queue),
        lambda: positive(features, labels + classes, queue=queue),
        lambda: positive(features, labels[:5], queue=queue),
        lambda: positive(features, labels, queue=torch.randn(classes, 3, dim + 1)),
        lambda: positive(features.long(), labels, queue=queue),
        lambda: infonce(features, labels + classes, queue=queue),
        lambda: infonce(features, labels + (1 << 40)),
        lambda: PixelContrastLoss(temperature=draw.pick(0.0, -1.0, torch.nan)),
        lambda: PixelContrastLoss(loss_weight=draw.bad()),
        lambda: memory.push(features, labels, torch.ones(5), backend=backend),
        lambda: memory.push(features, labels, images=labels + 1, backend=backend),
        lambda: memory.push(features, labels, quota=0, backend=backend),
        lambda: memory.push(torch.randn(6, dim + 1), labels, backend=backend),
        lambda: memory.write(features, torch.zeros(classes + 1, 2, dtype=torch.int64), backend=backend),
        lambda: class_order(labels, draw.pick(0, -1, 2**31), backend),
        lambda: class_order(labels.float(), classes, backend),
    ]
    number = draw.random.randrange(len(wrong))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = wrong[number]()
    except (ValueError, TypeError):
        return []
    return [f"wrong call {number} is not refused, it gives {result}"]
