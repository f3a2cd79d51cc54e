"""The class memory against plain Python lists."""

from __future__ import annotations

import io
import math
import random

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pixcontrast import ClassMemory, ops
from pixcontrast.ops.class_order import class_order
from pixcontrast.reference import unit_rows

BACKENDS = ["extension", "reference"]


class ListMemory:
    """Newest first, as the authors' code keeps it: ``memory[c] = (best new rows + memory[c])[:capacity]``."""

    def __init__(self, classes: int, capacity: int) -> None:
        self.rows: list[list[Tensor]] = [[] for _ in range(classes)]
        self.capacity = capacity

    def push(self, rows: Tensor, labels: Tensor, scores, quota: int | None, images=None) -> None:
        for c, stored in enumerate(self.rows):
            members = [i for i in range(len(labels)) if labels[i] == c]
            if scores is not None:
                members.sort(key=lambda i: -float(scores[i]))
            taken: dict[int, int] = {}
            kept = []
            for i in members:
                image = 0 if images is None else int(images[i])
                taken[image] = taken.get(image, 0) + 1
                if quota is None or taken[image] <= quota:
                    kept.append(rows[i])
            self.rows[c] = (kept + stored)[: self.capacity]


def stored(memory: ClassMemory, c: int) -> list[list[float]]:
    """Rows of class c, newest first."""
    count, cursor = int(memory.counts[c]), int(memory.cursors[c])
    return [memory.rows[c, (cursor - 1 - k) % memory.capacity].tolist() for k in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_lists(seed: int, backend: str) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    classes, capacity, dim = random.choice([1, 3, 7]), random.choice([1, 2, 5, 16]), 3
    memory, lists = ClassMemory(classes, capacity, dim), ListMemory(classes, capacity)
    quota, images_count = random.choice([None, 1, 2, 4]), random.choice([1, 3])
    for _ in range(7):
        count = random.choice([0, 1, 6, 40])
        rows, labels = torch.randn(count, dim), torch.randint(-1, classes + 2, (count,))
        scores = random.choice([None, torch.randn(count), torch.randint(-2, 3, (count,)).double()])
        images = torch.randint(0, images_count, (count,)) if random.random() < 0.5 else None
        memory.push(rows, labels, scores, quota, images, images_count, backend=backend)
        lists.push(unit_rows(rows), labels, scores, quota, images)
        for c in range(classes):
            assert int(memory.counts[c]) == len(lists.rows[c])
            for mine, theirs in zip(stored(memory, c), lists.rows[c], strict=True):  # in this order they are dropped
                torch.testing.assert_close(torch.tensor(mine), theirs)


def chosen_by_loops(labels, scores, quota: int | None, images, classes: int, width: int) -> list[list[int]]:
    """Rows of each class by falling score, of equal scores the first, at most ``quota`` of an image."""
    table = []
    for c in range(classes):
        taken: dict[int, int] = {}
        kept = []
        for row in sorted((i for i in range(len(labels)) if labels[i] == c), key=lambda i: (-scores[i], i)):
            taken[images[row]] = taken.get(images[row], 0) + 1
            if (quota is None or taken[images[row]] <= quota) and len(kept) < width:
                kept.append(row)
        table.append(kept + [-1] * (width - len(kept)))
    return table


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(40))
def test_choice_among_ties_is_that_of_loops(seed: int, backend: str) -> None:
    g = random.Random(seed)
    torch.manual_seed(seed)
    classes, capacity, count, num_images = g.choice([1, 4]), g.choice([1, 3, 50]), g.choice([1, 20, 200]), 3
    quota = g.choice([None, 1, 2, 30])
    labels, images = torch.randint(-2, classes + 2, (count,)), torch.randint(0, num_images, (count,))
    scores = torch.randint(-1, 2, (count,)) * torch.tensor(g.choice([0.5, -0.0]))
    memory = ClassMemory(classes, capacity, 2)
    index, kept = memory.choose(labels, scores, quota, images, num_images, backend=backend)
    width = min(capacity, count, capacity if quota is None else quota * num_images)
    expected = chosen_by_loops(labels.tolist(), scores.tolist(), quota, images.tolist(), classes, width)
    assert index.tolist() == expected
    assert kept.tolist() == [width - row.count(-1) for row in expected]


@pytest.mark.parametrize("quota", [None, 1, 3])
@pytest.mark.parametrize("num_images", [1, 4])
@pytest.mark.parametrize("with_scores", [True, False])
def test_rows_in_class_order_are_pushed_alike(quota: int | None, num_images: int, with_scores: bool) -> None:
    torch.manual_seed(0)
    rows, labels = torch.randn(90, 4), torch.randint(-1, 4, (90,))
    images = torch.arange(90) * num_images // 90
    scores = torch.randint(0, 5, (90,)).float() if with_scores else None
    memory, by_order, expected = (ClassMemory(3, 7, 4) for _ in range(3))
    expected.push(rows, labels, scores, quota, images, num_images)
    segments = class_order(torch.where(labels < 0, -1, labels * num_images + images), 3 * num_images)
    in_order = None if scores is None else scores[segments.order]
    memory.push_sorted(rows[segments.order], segments._replace(order=None), in_order, quota, num_images)
    by_order.push_sorted(rows, segments, scores, quota, num_images)
    for mine in (memory, by_order):
        assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), expected.buffers(), strict=True))
    assert memory.counts.sum() > 0


def test_map_and_rows_are_the_same() -> None:
    features, labels = torch.randn(2, 4, 3, 5), torch.randint(0, 3, (2, 3, 5))
    scores = torch.randn(2, 3, 5)
    by_map, by_rows = ClassMemory(3, 6, 4), ClassMemory(3, 6, 4)
    by_map.push(features, labels.repeat_interleave(4, 1).repeat_interleave(3, 2), scores, quota=4)  # full resolution
    by_rows.push(features.permute(0, 2, 3, 1).reshape(-1, 4), labels.reshape(-1), scores.reshape(-1), quota=4)
    assert torch.equal(by_map.rows, by_rows.rows) and torch.equal(by_map.counts, by_rows.counts)


def test_state_dict_brings_everything_back() -> None:
    memory, other = ClassMemory(3, 4, 2), ClassMemory(3, 4, 2)
    memory.push(torch.randn(20, 2), torch.randint(0, 3, (20,)))
    buffer = io.BytesIO()
    torch.save(memory.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    rows, labels = torch.randn(9, 2), torch.randint(0, 3, (9,))
    for m in (memory, other):
        m.push(rows, labels, quota=2)
    assert all(torch.equal(a, b) for a, b in zip(memory.buffers(), other.buffers(), strict=True))


def test_rows_are_stored_normalised_and_clear_forgets() -> None:
    memory = ClassMemory(2, 3, 5)
    memory.push(torch.randn(4, 5) * 100, torch.tensor([0, 0, 0, 0]))
    torch.testing.assert_close(memory.rows[0].norm(dim=1), torch.ones(3))
    assert memory.fill.tolist() == [1.0, 0.0]
    memory.clear()
    assert memory.counts.sum() == 0 and memory.rows.abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_scores_that_are_not_finite_stay_out_and_count(backend: str) -> None:
    rows = torch.tensor([[1.0, 0], [math.nan, 1], [0, 2], [math.inf, 0], [-3, 0], [0, -4], [5, 5]])
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1])
    memory = ClassMemory(2, 4, 2)
    memory.push(rows, labels, torch.tensor([1.0, 2, 3, 4, math.nan, math.inf, -math.inf]), backend=backend)
    assert memory.counts.tolist() == [2, 0] and memory.cursors.tolist() == [2, 0]
    assert memory.rejected == 5  # two rows and three scores
    assert stored(memory, 0) == [[0, 1], [1, 0]]  # without holes
    assert memory.rows.isfinite().all()
    memory.push(torch.full((9, 2), math.nan), torch.zeros(9, dtype=torch.int64), backend=backend)
    assert memory.counts.tolist() == [2, 0]
    assert memory.rejected == 9  # the four that were chosen
    assert memory.rejected.dtype == torch.int64 and "rejected" not in memory.state_dict()
    memory.clear()
    assert memory.rejected == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_no_class_may_be_anything(backend: str) -> None:
    memory = ClassMemory(2, 4, 2)
    rows, scores = torch.tensor([[1.0, 0], [math.nan, 1]]), torch.tensor([0.5, math.nan])
    memory.push(rows, torch.tensor([1, -1]), scores, 1, torch.tensor([0, 1]), 2, backend=backend)
    assert memory.counts.tolist() == [0, 1] and memory.rejected == 0


def test_push_has_no_shape_that_depends_on_the_data() -> None:
    memory = ClassMemory(3, 4, 2)
    compiled = torch.compile(memory.push, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = ClassMemory(3, 4, 2)
    for _ in range(3):
        rows, labels, scores = torch.randn(20, 2), torch.randint(-1, 3, (20,)), torch.randn(20)
        images = torch.randint(0, 2, (20,))
        compiled(rows, labels, scores, 2, images, 2)
        expected.push(rows, labels, scores, 2, images, 2)
    assert torch.equal(memory.rows, expected.rows) and torch.equal(memory.cursors, expected.cursors)


@pytest.mark.parametrize("image", [-1, 2, -(2**62), 2**62])
def test_rows_of_no_image_are_left_out_where_checking_would_wait(monkeypatch: pytest.MonkeyPatch, image: int) -> None:
    monkeypatch.setattr("pixcontrast.memory.check_range", lambda *arguments: None)  # as on CUDA
    memory = ClassMemory(3, 4, 2)
    labels, images = torch.tensor([1, 1, 2**62, -(2**62)]), torch.tensor([0, image, 0, 1])
    memory.push(torch.ones(4, 2), labels, None, 1, images, 2)
    assert memory.counts.tolist() == [0, 1, 0]


class DeviceNodes(TorchDispatchMode):
    """Lists the operators that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.namespace != "prim":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_images", [1, 4])
def test_a_push_is_a_few_device_nodes(monkeypatch: pytest.MonkeyPatch, num_images: int) -> None:
    monkeypatch.setattr(ops, "missing_kernel", lambda device, dtype: None)
    with FakeTensorMode(), torch.device("cuda"):
        memory = ClassMemory(19, 256, 64)
        rows, scores, labels = torch.randn(4000, 64), torch.rand(4000), torch.zeros(4000, dtype=torch.int64)
        segments = class_order(labels, 19 * num_images)
        with DeviceNodes() as nodes:
            memory.push_sorted(rows, segments, scores, 3, num_images)
        assert "pixcontrast::memory_write" in nodes.names and len(nodes.names) <= (2 if num_images == 1 else 5)
        with DeviceNodes() as nodes:
            memory.push(rows, labels, scores, 3, torch.zeros_like(labels), num_images)
        assert len(nodes.names) <= 12  # class_order is three launches


NONE = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.randn(4, 3)}, ValueError, r"rows must be \[P, 2\].*got \(4, 3\)"),
        ({"rows": torch.zeros(4, 2).long()}, TypeError, "push: rows must be float32.*got torch.int64"),
        ({"labels": NONE[:3]}, ValueError, r"push: labels must have shape \(4,\), got \(3,\)"),
        ({"labels": NONE.int()}, TypeError, "push: labels must be int64, got torch.int32"),
        ({"scores": torch.zeros(3)}, ValueError, r"push: scores must have shape \(4,\), got \(3,\)"),
        ({"scores": NONE}, TypeError, "push: scores must be float32.*got torch.int64"),
        ({"scores": torch.zeros(4, device="meta")}, ValueError, "push: scores is on meta, expected cpu"),
        ({"rows": torch.zeros(4, 2, device="meta")}, ValueError, "push: rows is on meta, expected cpu"),
        ({"images": NONE.float()}, TypeError, "push: images must be int64, got torch.float32"),
        (
            {"images": torch.tensor([0, 2, 1, -3]), "num_images": 2},
            ValueError,
            "push: images: 2 of 4 are outside 0..1: -3, 2",
        ),
        ({"num_images": 0}, ValueError, "num_images must be at least 1, got 0"),
        ({"quota": 0}, ValueError, "quota must be at least 1 or None, got 0"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"rows": torch.randn(4, 2), "labels": NONE} | change
    with pytest.raises(error, match=message):
        ClassMemory(3, 4, 2).push(**arguments)


@pytest.mark.parametrize(
    ("rows", "classes", "scores", "message"),
    [
        (torch.randn(1, 2, 2, 2), 3, None, r"push_sorted: rows must be \[P, 2\], got \(1, 2, 2, 2\)"),
        (torch.randn(4, 2), 2, None, r"push_sorted: segments.start must have shape \(3,\), got \(2,\)"),
        (torch.randn(4, 2), 3, torch.zeros(5), r"push_sorted: scores must have shape \(4,\), got \(5,\)"),
    ],
)
def test_wrong_arguments_of_sorted_rows_are_named(rows, classes: int, scores, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassMemory(3, 4, 2).push_sorted(rows, class_order(NONE, classes), scores)


def test_wrong_index_to_write_is_named() -> None:
    memory = ClassMemory(3, 4, 2)
    with pytest.raises(ValueError, match=r"write: index must have shape \(3, 1\), got \(4, 1\)"):
        memory.write(torch.randn(4, 2), NONE[:, None])
    with pytest.raises(TypeError, match=r"write: index must be int64, got torch.int32"):
        memory.write(torch.randn(4, 2), NONE[:3, None].int())


def test_wrong_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        ClassMemory(3, 0, 2)
    with pytest.raises(TypeError, match="labels must be int64, got torch.float32"):
        ClassMemory(3, 4, 2).push(torch.randn(4, 2), torch.zeros(4))


def _gather_worker(rank: int, world: int, store: str, results: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    memory = ClassMemory(3, 4, 2, sync="gather")
    generator = torch.Generator().manual_seed(rank)
    for step in range(3):
        count = 0 if (rank, step) == (1, 1) else 9  # a rank without any pixel must not hang the others
        rows = torch.randn(count, 2, generator=generator)
        rows[3:5] = math.nan
        memory.push(rows, torch.randint(0, 3, (count,), generator=generator), quota=2)
    torch.save(memory.state_dict() | {"rejected": memory.rejected}, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gather_gives_every_rank_the_same_rows_in_rank_order(tmp_path) -> None:
    arguments = (2, str(tmp_path / "store"), str(tmp_path))
    torch.multiprocessing.start_processes(_gather_worker, arguments, nprocs=2, start_method="forkserver")
    expected = ClassMemory(3, 4, 2)
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for step in range(3):
        for rank, generator in enumerate(generators):
            count = 0 if (rank, step) == (1, 1) else 9
            rows = torch.randn(count, 2, generator=generator)
            rows[3:5] = math.nan
            expected.push(rows, torch.randint(0, 3, (count,), generator=generator), quota=2)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(state[name], value) for name, value in expected.named_buffers())
    assert expected.rejected > 0
