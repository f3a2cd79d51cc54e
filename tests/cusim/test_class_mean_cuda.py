"""The kernels of the memory mean against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from cusim.kernels import Kernels, Way
from cusim.positive_cases import PLAIN, TYPES, close_enough


@dataclass
class Memory:
    """``queue [C, N, D]``, ``counts [C]``, logits ``weights [C, N]``, ``grad_mean [C, D]``."""

    queue: Tensor
    counts: Tensor
    weights: Tensor | None
    grad_mean: Tensor


def make_memory(dim: int, classes: int, capacity: int, dtype: torch.dtype) -> Memory:
    """With a zero row, an empty class, and NaN in rows that are not valid."""
    g = torch.Generator().manual_seed(dim)
    queue = torch.randn(classes, capacity, dim, generator=g) * 5
    counts = torch.randint(1, capacity + 1, (classes,), generator=g)
    counts[-1] = 0
    counts[0] = capacity + 1  # more than there are
    queue[0, capacity // 2] = 0
    queue[torch.arange(capacity) >= counts[:, None]] = torch.nan
    weights = torch.randn(classes, capacity, generator=g) * 8
    weights[0] -= 200
    return Memory(queue.to(dtype), counts, weights, torch.randn(classes, dim, generator=g))


def memory_formula(memory: Memory, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and gradient of the logits in ``dtype``, class by class."""
    mean = torch.zeros_like(memory.grad_mean, dtype=dtype)
    grad = torch.zeros(memory.queue.shape[:2], dtype=dtype)
    for c, count in enumerate(memory.counts.clamp(max=memory.queue.shape[1]).tolist()):
        rows = memory.queue[c, :count].to(dtype)
        logits = torch.zeros(count, dtype=dtype) if memory.weights is None else memory.weights[c, :count].to(dtype)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        unit = rows * torch.where(norms < 1e-12, 0, 1 / norms)
        v = torch.softmax(torch.nn.functional.logsigmoid(logits), 0)
        mean[c] = v @ unit
        g = unit @ memory.grad_mean[c].to(dtype)
        grad[c, :count] = v * torch.sigmoid(-logits) * (g - v @ g)
    return mean, grad


def run_memory(kernels: Kernels, way: Way, memory: Memory) -> tuple[Tensor, Tensor | None]:
    classes, capacity, dim = memory.queue.shape
    mean = torch.full((classes, dim), torch.nan)
    grad = None if memory.weights is None else torch.full((classes, capacity), torch.nan)
    room = torch.zeros(1, dtype=torch.int64)
    sizes = TYPES.index(memory.queue.dtype), classes, capacity, dim
    inputs = memory.queue, memory.counts, memory.weights
    kernels.run(way, "run_class_mean", *sizes, *inputs, mean, None, None, None, room)
    workspace = np.full(max(int(room), 1), 0xA5, np.uint8)
    kernels.run(way, "run_class_mean", *sizes, *inputs, mean, None, None, workspace, room)
    if grad is not None:
        kernels.run(way, "run_class_mean", *sizes, *inputs, None, memory.grad_mean, grad, None, room)
    return mean, grad


def check_memory(results: tuple[Tensor, Tensor | None], memory: Memory) -> None:
    truths, plains = memory_formula(memory, torch.float64), memory_formula(memory, torch.float32)
    for result, truth, plain in zip(results, truths, plains, strict=True):
        if result is not None:
            close_enough(result, truth, plain)


@pytest.fixture(scope="module")
def class_mean(kernels: Callable[..., Kernels]) -> Kernels:
    return kernels("positive", "class_mean")


@pytest.mark.parametrize(
    ("dim", "capacity"), [(1, 5), (3, 40), (64, 40), (256, 9), (257, 20), (720, 20), (2048, 20), (5, 600), (16, 513)]
)
@pytest.mark.parametrize("dtype", TYPES)
def test_agrees_with_the_formula(class_mean: Kernels, dim: int, capacity: int, dtype: torch.dtype):
    memory = make_memory(dim, 3, capacity, dtype)
    check_memory(run_memory(class_mean, PLAIN, memory), memory)


def test_every_way(class_mean: Kernels, way: Way):
    memory = make_memory(24, 3, 300, torch.float32)
    check_memory(run_memory(class_mean, way, memory), memory)


def test_without_weights(class_mean: Kernels):
    memory = replace(make_memory(64, 3, 30, torch.float16), weights=None)
    check_memory(run_memory(class_mean, PLAIN, memory), memory)


def test_a_class_whose_rows_all_weigh_nothing_is_nan(class_mean: Kernels):
    memory = make_memory(24, 3, 300, torch.float32)
    assert memory.weights is not None
    memory.weights[0, 1:] = -torch.inf  # one row is left
    check_memory(run_memory(class_mean, PLAIN, memory), memory)
    memory.weights[0] = -torch.inf
    mean, grad = run_memory(class_mean, PLAIN, memory)
    assert grad is not None
    assert mean.isnan().all(1).tolist() == [True, False, False]
    assert grad[0].isnan().all() and not grad[1:].isnan().any()


def test_without_room(class_mean: Kernels):
    memory = Memory(torch.zeros(2, 0, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2, 0), torch.ones(2, 8))
    mean, _ = run_memory(class_mean, PLAIN, memory)
    assert not mean.any()


@pytest.mark.parametrize("dim", [24, 2048])
def test_a_norm_beyond_float32_shows_in_its_class_alone(class_mean: Kernels, dim: int):
    memory = make_memory(dim, 3, 40, torch.float32)
    memory.queue[1, 0] = 1e19
    mean, grad = run_memory(class_mean, PLAIN, memory)
    assert grad is not None
    assert mean.isnan().all(1).tolist() == [False, True, False]
    assert grad[1, : memory.counts[1]].isnan().all() and not grad[[0, 2]].isnan().any()
