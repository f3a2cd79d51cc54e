"""``python tests/leaks.py``: 10,000 steps of every operator; the process must not grow, nor the memory that is kept.

A leak of a kilobyte a step, planted in Python, must be noticed.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from pixcontrast import ClassMemory, PixelContrastLoss
from pixcontrast import functional as F
from pixcontrast.heads import ClassSelectors, MLPHead
from pixcontrast.ops.unit_rows import unit_rows

ALLOWED = 2 << 20  # bytes that the process may grow in all steps: what allocators do
PLANTED = 1 << 10


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def operators() -> dict[str, Callable[[], object]]:
    """A forward and backward of each."""
    features, labels = torch.randn(2, 16, 5, 6, requires_grad=True), torch.randint(0, 4, (2, 5, 6))
    queue, logits = torch.randn(4, 9, 16), torch.randn(4, 9, requires_grad=True)
    anchors = F.Anchors(torch.arange(20), torch.arange(20) % 4)
    memory, rows = ClassMemory(4, 9, 16), torch.randn(60, 16)
    infonce = PixelContrastLoss(max_samples=16, max_views=2)

    head, selectors = MLPHead(16, 8), ClassSelectors(4, 16)
    start, count = torch.arange(0, 60, 15), torch.full((4,), 15)
    wide = rows.clone().requires_grad_()

    def backward(result: Tensor) -> None:
        result.sum().backward()
        for leaf in (features, logits, wide, *head.parameters(), *selectors.parameters()):
            leaf.grad = None

    return {
        "positive_contrast": lambda: backward(
            F.positive_contrast(features, labels, queue, queue_weight_logits=logits).loss
        ),
        "memory_mean": lambda: backward(F.memory_mean(queue, torch.full((4,), 9), logits)),
        "infonce_contrast": lambda: backward(F.infonce_contrast(features, anchors, [queue]).loss),
        "infonce_contrast of anchors": lambda: backward(F.infonce_contrast(features, anchors).loss),
        "gather_pixels": lambda: backward(F.gather_pixels(features, anchors.indices)),
        "class_order": lambda: F.class_order(labels, 4),
        "norm_linear": lambda: backward(head(wide, F.class_order(labels, 4))),
        "grouped_linear": lambda: backward(selectors(wide, start, count)),
        "unit_rows": lambda: unit_rows(rows),
        "ClassMemory.push": lambda: memory.push(rows, labels.flatten(), quota=3),
        "PixelContrastLoss": lambda: backward(infonce(features, labels, None, queue)),
    }


def growth(step: Callable[[], object], steps: int) -> int:
    for _ in range(steps // 5):  # until allocators have what they need
        step()
    before = resident()
    for _ in range(steps):
        step()
    return resident() - before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    torch.manual_seed(0)
    leaking = []
    for name, step in operators().items():
        grown = growth(step, steps)
        leaking += [name] * (grown > ALLOWED)
        print(f"{name}: {steps:,} steps, {grown / 1024:,.0f} KiB more", flush=True)
    hoard: list[bytearray] = []
    planted = growth(lambda: hoard.append(bytearray(PLANTED)), steps) > ALLOWED
    print(f"leaks: {', '.join(leaking) or 'none'}; the planted one is {'noticed' if planted else 'NOT noticed'}")
    return int(bool(leaking) or not planted)


if __name__ == "__main__":
    sys.exit(main())
