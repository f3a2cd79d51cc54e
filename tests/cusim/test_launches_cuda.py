"""As many launches as the count of device nodes (``benchmarks/nodes.py``) says that each operator makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from memory_push_cases import make_topk, make_write
from norm_cases import make_case as norm_case

from benchmarks.nodes import LAUNCHES
from cusim import positive_cases
from cusim import test_class_mean_cuda as test_class_mean
from cusim import test_class_order_cuda as test_class_order
from cusim import test_gather_pixels_cuda as test_gather_pixels
from cusim import test_memory_push_cuda as test_memory_push
from cusim import test_norm_linear_cuda as norm
from cusim.build import BUILDS
from cusim.kernels import WAYS, Kernels

PLAIN = WAYS[0]
pytestmark = pytest.mark.skipif("gpu" in BUILDS, reason="the emulation counts launches, a GPU does not")


def of(kernels: Kernels, run: Callable[[], object]) -> list[int]:
    """Launches of each call that makes any."""
    before = len(kernels.launches)
    run()
    return [count for count in kernels.launches[before:] if count]


def test_launches_are_those_that_are_counted(kernels: Callable[..., Kernels]) -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 5, (3000,), generator=g)
    room = kernels("class_order")
    *_, launches = of(room, lambda: test_class_order.run(room, PLAIN, labels, 5))
    assert launches == LAUNCHES["class_order"]
    maps, out = torch.zeros(2, 8, 8, dtype=torch.int64), torch.zeros(2, 4, 4, dtype=torch.int64)
    assert of(room, lambda: room.run(PLAIN, "run_labels_at", 2, 8, 8, 4, 4, 6, 3, maps, out)) == [LAUNCHES["labels_at"]]

    room = kernels("gather_pixels")
    case = test_gather_pixels.Case(70, 40, torch.float32, "maps")
    assert of(room, lambda: test_gather_pixels.check(room, PLAIN, case))[0] == LAUNCHES["gather_pixels"]

    room = kernels("norm_linear")
    stats, activations, backward = of(room, lambda: norm.run(room, PLAIN, norm_case([150, 3], [9, 0], 40)))
    assert stats == LAUNCHES["norm_stats"]
    assert activations == LAUNCHES["norm_dot"] == LAUNCHES["norm_linear"] - 1  # and a product
    assert backward == LAUNCHES["norm_dot_backward"]
    # dense: the activations again, two products, and the sum of the bias
    assert LAUNCHES["norm_linear_backward"] == activations + 2 + 1 + backward

    room = kernels("positive", "class_mean")
    positive = positive_cases.make_case(64, 5, torch.float32, pixels=300)
    *_, launches = of(room, lambda: positive_cases.run(room, PLAIN, positive))
    assert launches == LAUNCHES["positive"]
    memory = test_class_mean.make_memory(24, 3, 300, torch.float32)
    counts = of(room, lambda: test_class_mean.run_memory(room, PLAIN, memory))
    assert counts[-2:] == [LAUNCHES["class_mean"], LAUNCHES["class_mean_backward"]]  # before: the size of the workspace

    room = kernels("memory_push")
    assert set(of(room, lambda: test_memory_push.check_topk(room, PLAIN, make_topk(2)))) == {LAUNCHES["segment_topk"]}
    assert set(
        of(room, lambda: test_memory_push.check_write(room, PLAIN, make_write(2, torch.float32, torch.float32)))
    ) == {LAUNCHES["memory_write"]}

    room = kernels("grouped_linear")
    rows, weight, count = torch.randn(15, 8), torch.randn(3, 4, 8), torch.tensor([3, 0, 5])
    result, sums, space = torch.zeros(15, 4), torch.zeros(3, 4, 8), torch.zeros(4096, dtype=torch.uint8)
    where = (0, False, 15, 3, None, count)
    assert of(room, lambda: room.run(PLAIN, "run_grouped_linear", *where, 8, 4, rows, weight, result)) == [
        LAUNCHES["grouped_linear"]
    ]
    outer = (*where, 4, 8, result, rows, space, len(space), sums)
    assert of(room, lambda: room.run(PLAIN, "run_grouped_outer", *outer)) == [LAUNCHES["grouped_outer"]]

    room = kernels("scale")
    assert of(room, lambda: room.run(PLAIN, "run_unit_rows", 0, 15, 8, rows, torch.zeros(15, 8))) == [
        LAUNCHES["unit_rows"]
    ]
    values = (torch.ones(100), 0, 100, 0, torch.ones(7), 7, torch.tensor([2.0]))
    assert of(room, lambda: room.run(PLAIN, "run_scale", 0, *values)) == [LAUNCHES["scale_"]]
