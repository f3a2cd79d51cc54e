"""The operators behind ``ClassMemory.push`` against loops: choices exactly, rows in float64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from memory_push_cases import TopkCase, WriteCase, make_topk, make_write, topk_by_loops, write_by_loops
from on_device import DEVICES, without_waiting
from torch import Tensor

from pixcontrast import ops
from pixcontrast.ops.memory_push import memory_write, segment_topk

BACKENDS = ["extension", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check_topk(case: TopkCase, backend: str, device: str = "cpu") -> None:
    rejected = torch.tensor(5, device=device)
    moved = [value.to(device) if isinstance(value, Tensor) else value for value in case]
    with without_waiting(device):
        index = segment_topk(*moved, rejected=rejected, backend=backend)
    expected, not_finite = topk_by_loops(*case)
    assert index.dtype == torch.int64 and index.tolist() == expected
    assert rejected == 5 + not_finite
    assert segment_topk(*moved, backend=backend).tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(60))
def test_topk_agrees_with_loops(seed: int, backend: str, device: str) -> None:
    check_topk(make_topk(seed), backend, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 64, 3000])
def test_topk_of_many_scores(k: int, device: str) -> None:
    scores, order = torch.randn(150_000), torch.randperm(150_000)
    check_topk(TopkCase(scores, order, torch.tensor([0, 131_072]), torch.tensor([131_072, 9]), k), "extension", device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 64, 1024, 3000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_of_long_segments_full_of_ties(k: int, dtype: torch.dtype, backend: str) -> None:
    scores = torch.randint(-2, 3, (5000,)).to(dtype)
    check_topk(TopkCase(scores, torch.randperm(5000), torch.tensor([0, 100]), torch.tensor([100, 4900]), k), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_takes_zeros_of_both_signs_for_equal(backend: str) -> None:
    scores = torch.tensor([-0.0, 0.0, -0.0, 1e-45, -1e-45, 0.0])
    index = segment_topk(scores, None, torch.tensor([0]), torch.tensor([6]), 6, backend=backend)
    assert index.tolist() == [[3, 0, 1, 2, 5, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_of_strided_inputs(backend: str) -> None:
    scores, order = torch.rand(40)[::2], torch.randperm(20).repeat_interleave(2)[::2]
    start, count = torch.tensor([[0, 4], [7, 9]]).unbind(1)  # segments 0..3 and 7..15
    check_topk(TopkCase(scores, order, start, count, 3), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("segments", "rows", "k"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_topk_of_nothing(segments: int, rows: int, k: int, backend: str) -> None:
    nothing = torch.zeros(segments, dtype=torch.int64)
    for scores in (torch.rand(rows), None):
        for order in (torch.arange(rows), None):
            index = segment_topk(scores, order, nothing, nothing, k, backend=backend)
            assert index.tolist() == [[-1] * k] * segments


def check_write(case: WriteCase, backend: str, device: str = "cpu") -> None:
    expected = write_by_loops(case)
    plain = case.copy()
    memory_write(*plain, backend="reference")
    moved = [value.to(device) for value in case]
    with without_waiting(device):
        memory_write(*moved, backend=backend)
    for value, result in zip(case, moved, strict=True):
        value.copy_(result)
    for name in ("counts", "cursors", "rejected"):
        assert torch.equal(getattr(case, name), getattr(expected, name)), name
    assert case.rows.isfinite().all()
    error, allowed = (case.rows.double() - expected.rows).abs(), (plain.rows.double() - expected.rows).abs().max()
    assert error.max() <= 4 * allowed + torch.finfo(case.rows.dtype).eps
    untouched = expected.rows == case.before.double()
    assert torch.equal(case.rows[untouched], case.before[untouched])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(40))
def test_write_agrees_with_loops(seed: int, backend: str, device: str) -> None:
    dtypes = DTYPES if device == "cpu" else DTYPES[:3]
    case = make_write(seed, random.Random(seed).choice(dtypes), random.Random(seed + 1).choice(dtypes))
    check_write(case, backend, device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source_dtype", DTYPES)
def test_write_in_all_dtypes(dtype: torch.dtype, source_dtype: torch.dtype, backend: str) -> None:
    check_write(make_write(1, dtype, source_dtype, sizes=(3, 4, 6, 257)), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (150, 3, 2, 4), (2, 5, 13, 3), (1, 300, 200, 2), (3, 2, 0, 4)])
@pytest.mark.parametrize("layout", ["rows", "strided", "map", "channels_last"])
def test_write_of_all_sizes_and_layouts(sizes: tuple[int, int, int, int], layout: str, backend: str) -> None:
    check_write(make_write(2, torch.float32, torch.float32, layout, sizes), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_rows_of_a_finite_norm_are_stored(backend: str) -> None:
    source = torch.tensor(
        [[3.0, 4.0], [math.nan, 1.0], [0.0, 0.0], [1.0, math.inf], [1e-20, 0.0], [-math.inf, 0.0], [1e30, 1e30]]
    )
    rows, counts, cursors = torch.full((1, 4, 2), 9.0), torch.tensor([2]), torch.tensor([2])
    rejected = torch.tensor(0)
    memory_write(rows, counts, cursors, rejected, source, torch.arange(7)[None], backend=backend)
    assert rejected == 4  # the last one's norm overflows
    assert (counts.item(), cursors.item()) == (4, 1)
    torch.testing.assert_close(rows[0], torch.tensor([[0.6, 0.8], [9.0, 9.0], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_write_from(backend: str) -> None:
    memory = torch.full((2, 3, 4), 9.0), torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor(0)
    memory_write(*memory, torch.zeros(0, 4), torch.tensor([[-1], [0]]), backend=backend)
    assert (memory[0] == 9).all() and [t.tolist() for t in memory[1:]] == [[1, 2], [1, 2], 0]


def test_auto_runs_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object) -> None:
        raise AssertionError("the extension was called")

    monkeypatch.setattr(ops, "missing_kernel", lambda device, dtype: "there is none")
    monkeypatch.setattr(torch.ops.pixcontrast, "segment_topk", forbidden)
    monkeypatch.setattr(torch.ops.pixcontrast, "memory_write", forbidden)
    check_topk(make_topk(0), "auto")
    check_write(make_write(0, torch.float32, torch.float32), "auto")


def test_operators_hold_what_their_schemas_say() -> None:
    two = torch.tensor([0, 3]), torch.tensor([3, 4])
    for scores, order, rejected in (
        (torch.rand(7), None, torch.tensor(0)),
        (torch.rand(7), torch.arange(7), None),
        (None, None, None),
    ):
        torch.library.opcheck(torch.ops.pixcontrast.segment_topk.default, (scores, order, *two, 2, rejected))
    memory = torch.zeros(2, 3, 4), torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor(0)
    arguments = (*memory, torch.randn(5, 4), torch.tensor([[0, 2], [4, -1]]))
    torch.library.opcheck(torch.ops.pixcontrast.memory_write.default, arguments)


INDEX = torch.zeros(2, 1, dtype=torch.int64)


def call_topk(**changed: object) -> Tensor:
    arguments = {
        "scores": torch.rand(7),
        "order": None,
        "start": torch.tensor([0, 3]),
        "count": torch.tensor([3, 4]),
        "k": 2,
        "rejected": None,
    }
    return torch.ops.pixcontrast.segment_topk(*(arguments | changed).values())


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"scores": torch.rand(7, 1)}, ValueError, r"scores must be \[P\], got \[7, 1\]"),
        ({"scores": torch.rand(7).half()}, TypeError, "scores must be float32 .*got Half"),
        ({"scores": torch.arange(7)}, TypeError, "Long"),
        ({"order": torch.zeros(7)}, TypeError, "order must be Long, got Float"),
        ({"count": torch.tensor([3])}, ValueError, r"start must be \[1\], got \[2\]"),
        ({"count": torch.tensor([3, 5])}, ValueError, "segments must ascend within 0..7, got 3 and 5 for class 1"),
        ({"k": -1}, ValueError, "k must not be negative, got -1"),
        ({"rejected": torch.zeros(())}, TypeError, "rejected must be Long, got Float"),
    ],
)
def test_topk_names_wrong_arguments(changed: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call_topk(**changed)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"rows": torch.zeros(2, 3)}, ValueError, r"rows must be \[C, N, D\], got \[2, 3\]"),
        ({"rows": torch.zeros(2, 4, 3).transpose(1, 2)}, ValueError, "rows must be contiguous"),
        ({"rows": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "Long"),
        ({"counts": torch.zeros(3, dtype=torch.int64)}, ValueError, r"counts must be \[2\], got \[3\]"),
        ({"cursors": torch.zeros(2)}, TypeError, "cursors must be Long, got Float"),
        ({"source": torch.randn(5, 3)}, ValueError, r"source must have 4 channels and be on cpu, got \[5, 3\] on cpu"),
        ({"index": INDEX[:1]}, ValueError, r"index must be \[2, 1\], got \[1, 1\]"),
        ({"index": INDEX[0]}, ValueError, r"index must be \[C, K\], got \[1\]"),
    ],
)
def test_write_names_wrong_arguments(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "rows": torch.zeros(2, 3, 4),
        "counts": INDEX[:, 0].clone(),
        "cursors": INDEX[:, 0].clone(),
        "rejected": torch.tensor(0),
        "source": torch.randn(5, 4),
        "index": INDEX,
    }
    with pytest.raises(error, match=message):
        torch.ops.pixcontrast.memory_write(*(arguments | changed).values())
