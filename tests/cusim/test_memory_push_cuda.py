"""The kernels that choose rows and write them into the memory, against loops."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from memory_push_cases import TopkCase, WriteCase, make_topk, make_write, topk_by_loops, write_by_loops

from cusim.kernels import Kernels, Way
from cusim.positive_cases import PLAIN, TYPES
from pixcontrast.reference import memory_write


@pytest.fixture(scope="module")
def memory_push(kernels: Callable[..., Kernels]) -> Kernels:
    return kernels("memory_push")


def check_topk(kernels: Kernels, way: Way, case: TopkCase) -> None:
    scores, order, start, count, k = case
    assert scores is None or scores.dtype == torch.float32
    rows = 1 << 32 if scores is None else len(scores)
    index, rejected = torch.full((len(start), k), -7), torch.tensor([5])
    workspace = torch.full((len(start), k), -1)
    arguments = (scores, rows, order, rows if order is None else len(order), start, count, len(start), k, index)
    kernels.run(way, "run_segment_topk", *arguments, rejected, workspace)
    expected, not_finite = topk_by_loops(*case)
    assert index.tolist() == expected
    assert rejected == 5 + not_finite
    kernels.run(way, "run_segment_topk", *arguments, None, workspace)  # nothing counts
    assert index.tolist() == expected and rejected == 5 + not_finite


@pytest.mark.parametrize("seed", range(30))
def test_topk_agrees_with_loops(memory_push: Kernels, seed: int) -> None:
    check_topk(memory_push, PLAIN, make_topk(seed))


@pytest.mark.parametrize("seed", [2, 7])
def test_topk_every_way(memory_push: Kernels, way: Way, seed: int) -> None:
    check_topk(memory_push, way, make_topk(seed))


def long_scores(values: str) -> torch.Tensor:
    """5000 scores that need histograms of many bits, of few, or of the rows alone."""
    generator = torch.Generator().manual_seed(1)
    if values == "normal":
        return torch.randn(5000, generator=generator)
    if values == "ties":
        return torch.randint(-2, 3, (5000,), generator=generator).float()
    return 1 + torch.arange(5000) % 7 * 2.0**-23  # neighbours


@pytest.mark.parametrize("k", [1, 64, 1024, 1500])
@pytest.mark.parametrize("values", ["normal", "ties", "neighbours"])
def test_topk_of_long_segments(memory_push: Kernels, k: int, values: str) -> None:
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(2))
    start, count = torch.tensor([0, 200]), torch.tensor([190, 4800])
    check_topk(memory_push, PLAIN, TopkCase(long_scores(values), order, start, count, k))


@pytest.mark.parametrize("order", [None, torch.arange(5000).flip(0)])
def test_topk_of_equal_rows_is_the_first_ones(memory_push: Kernels, order: torch.Tensor | None) -> None:
    check_topk(memory_push, PLAIN, TopkCase(None, order, torch.tensor([7]), torch.tensor([4900]), 30))


def test_topk_of_rows_that_are_listed_twice(memory_push: Kernels) -> None:
    """Which is wrong; the result then holds rows of the segment, not necessarily the best."""
    order, index = torch.tensor([2, 2, 0, 1, 2, 1]), torch.full((1, 4), -7)
    arguments = torch.rand(3), 3, order, 6, torch.tensor([0]), torch.tensor([6]), 1, 4, index, None
    memory_push.run(PLAIN, "run_segment_topk", *arguments, torch.full((1, 4), -1))
    assert {0, 1, 2} >= set(index[0].tolist())


@pytest.mark.parametrize("order", [None, torch.arange(6)])
def test_topk_leaves_out_what_is_beyond_the_positions(
    memory_push: Kernels, way: Way, order: torch.Tensor | None
) -> None:
    """On a CPU such segments are refused; a GPU would have to wait for them."""
    scores, index, rejected = torch.rand(6), torch.full((2, 3), -7), torch.tensor([0])
    segments = torch.tensor([-2, 4]), torch.tensor([3, 100]), 2
    arguments = (scores, 6, order, 6, *segments, 3, index, rejected, torch.full((2, 3), -1))
    memory_push.run(way, "run_segment_topk", *arguments)
    assert index.tolist() == [[0, -1, -1], [*(scores[4:].argsort(descending=True) + 4).tolist(), -1]]


def check_write(kernels: Kernels, way: Way, case: WriteCase) -> None:
    expected, plain = write_by_loops(case), case.copy()
    memory_write(*plain)
    source, workspace = case.source, torch.full(case.index.shape, 7.0)
    if source.dim() == 2 or source.is_contiguous(memory_format=torch.channels_last):
        source, map_pixels = (source if source.dim() == 2 else source.permute(0, 2, 3, 1)).contiguous(), 0
    else:
        map_pixels = source.shape[2] * source.shape[3]
    classes, capacity, dim = case.rows.shape
    memory = TYPES.index(case.rows.dtype), case.rows, classes, capacity
    of_source = TYPES.index(source.dtype), source, source.numel() // dim, dim, map_pixels
    arguments = (*memory, *of_source, case.index, case.index.shape[1], case.counts, case.cursors, case.rejected)
    kernels.run(way, "run_memory_write", *arguments, workspace)
    for name in ("counts", "cursors", "rejected"):
        assert torch.equal(getattr(case, name), getattr(expected, name)), name
    error, allowed = (case.rows.double() - expected.rows).abs(), (plain.rows.double() - expected.rows).abs().max()
    assert error.max() <= 4 * allowed + torch.finfo(case.rows.dtype).eps
    untouched = expected.rows == case.before.double()
    assert torch.equal(case.rows[untouched], case.before[untouched])


@pytest.mark.parametrize("seed", range(30))
def test_write_agrees_with_loops(memory_push: Kernels, seed: int) -> None:
    g = random.Random(seed)
    check_write(memory_push, PLAIN, make_write(seed, g.choice(TYPES), g.choice(TYPES)))


@pytest.mark.parametrize("layout", ["rows", "map"])
def test_write_every_way(memory_push: Kernels, way: Way, layout: str) -> None:
    check_write(memory_push, way, make_write(3, torch.float32, torch.bfloat16, layout, sizes=(2, 20, 40, 35)))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("source_dtype", TYPES)
def test_write_in_all_dtypes(memory_push: Kernels, dtype: torch.dtype, source_dtype: torch.dtype) -> None:
    check_write(memory_push, PLAIN, make_write(4, dtype, source_dtype, "rows", sizes=(2, 9, 9, 16)))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (150, 3, 2, 4), (2, 5, 13, 257), (1, 300, 200, 2)])
def test_write_of_all_sizes(memory_push: Kernels, sizes: tuple[int, int, int, int]) -> None:
    check_write(memory_push, PLAIN, make_write(5, torch.float32, torch.float32, "map", sizes))
