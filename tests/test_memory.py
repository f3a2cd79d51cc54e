"""The class memory against plain Python lists."""

from __future__ import annotations

import io
import random

import pytest
import torch
from torch import Tensor

from pixcontrast import ClassMemory
from pixcontrast.reference import unit_rows


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


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_lists(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    classes, capacity, dim = random.choice([1, 3, 7]), random.choice([1, 2, 5, 16]), 3
    memory, lists = ClassMemory(classes, capacity, dim), ListMemory(classes, capacity)
    quota, images_count = random.choice([None, 1, 2, 4]), random.choice([1, 3])
    for _ in range(7):
        count = random.choice([0, 1, 6, 40])
        rows, labels = torch.randn(count, dim), torch.randint(-1, classes + 2, (count,))
        scores = torch.randn(count) if random.random() < 0.7 else None
        images = torch.randint(0, images_count, (count,)) if random.random() < 0.5 else None
        memory.push(rows, labels, scores, quota, images, images_count)
        lists.push(unit_rows(rows), labels, scores, quota, images)
        for c in range(classes):
            assert int(memory.counts[c]) == len(lists.rows[c])
            expected = [row.tolist() for row in lists.rows[c]]
            assert sorted(stored(memory, c)) == sorted(expected)
            assert stored(memory, c) == expected  # the same rows will be dropped next


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.randn(4, 3)}, r"rows must be \[P, 2\].*got \(4, 3\)"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels must be \(4,\), got \(5,\)"),
        ({"scores": torch.zeros(3)}, r"scores must be \(4,\), got \(3,\)"),
        ({"quota": 0}, "quota must be at least 1 or None, got 0"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"rows": torch.randn(4, 2), "labels": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        ClassMemory(3, 4, 2).push(**arguments)
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
        memory.push(rows, torch.randint(0, 3, (count,), generator=generator), quota=2)
    torch.save(memory.state_dict(), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_gather_gives_every_rank_the_same_rows_in_rank_order(tmp_path) -> None:
    arguments = (2, str(tmp_path / "store"), str(tmp_path))
    torch.multiprocessing.start_processes(_gather_worker, arguments, nprocs=2, start_method="spawn")
    expected = ClassMemory(3, 4, 2)
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    for step in range(3):
        for rank, generator in enumerate(generators):
            count = 0 if (rank, step) == (1, 1) else 9
            rows = torch.randn(count, 2, generator=generator)
            expected.push(rows, torch.randint(0, 3, (count,), generator=generator), quota=2)
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
