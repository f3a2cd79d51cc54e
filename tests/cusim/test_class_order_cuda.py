"""The kernels of class_order against a stable sort and loops over cells, exact in every element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cusim.build import BUILDS
from cusim.kernels import WAYS, Kernels, Way

PLAIN = WAYS[0]
BUILD_WAYS = [Way(build, 0) for build in BUILDS]

# csrc/class_order/cuda.cu: 1024 classes are a tile, 128 rows x 8 warps the least of a block, 2^20 counts and 1024
# blocks the most, and a block of the scan takes 1024 counts up to 256 blocks in all, then several times as many
SIZES = [
    (0, 3),
    (1, 1),
    (31, 2),
    (33, 2),
    (129, 19),
    (1024, 19),
    (1025, 19),  # two blocks
    (3000, 150),  # several blocks of the scan
    (700, 1022),
    (700, 1023),
    (1030, 1024),  # two tiles, the last one for labels that are not valid
    (2500, 2500),
]


@pytest.fixture(scope="module")
def room(kernels) -> Kernels:
    return kernels("class_order")


def random_labels(rows: int, classes: int) -> Tensor:
    labels = (torch.rand(rows) ** 2 * classes).long()
    for value in (-1, classes, 255 + classes, -(2**40), 2**40):
        labels[torch.rand(rows) < 0.05] = value
    return labels


def run(room: Kernels, way: Way, labels: Tensor, classes: int) -> tuple[dict[str, Tensor], int]:
    """The results, and the bytes of the workspace."""
    rows, sizes = len(labels), {"order": len(labels), "labels": len(labels), "start": classes, "count": classes}
    results = {name: torch.full((size,), -7) for name, size in (sizes | {"total": 1}).items()}
    size = torch.zeros(1, dtype=torch.int64)
    room.run(way, "run_class_order", rows, classes, labels, *results.values(), None, size)
    workspace = torch.full((int(size),), 0xFF, dtype=torch.uint8)
    room.run(way, "run_class_order", rows, classes, labels, *results.values(), workspace, None)
    return results, int(size)


def check(room: Kernels, way: Way, labels: Tensor, classes: int) -> int:
    results, size = run(room, way, labels, classes)
    valid = (labels >= 0) & (labels < classes)
    bucket = torch.where(valid, labels, classes)
    order = torch.argsort(bucket, stable=True)
    count = torch.bincount(bucket, minlength=classes + 1)
    expected = {
        "order": order,
        "labels": torch.where(valid, labels, -1)[order],
        "start": torch.cat([torch.zeros(1).long(), count.cumsum(0)])[:classes],
        "count": count[:classes],
        "total": valid.sum()[None],
    }
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
    return size


@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_every_build_and_order(room: Kernels, way: Way, rows: int, classes: int) -> None:
    check(room, way, random_labels(rows, classes), classes)


@pytest.mark.parametrize("way", BUILD_WAYS, ids=lambda way: way.build)
def test_one_class_only(room: Kernels, way: Way) -> None:
    for value in (0, 3, 6, 7, -1):  # of seven classes
        check(room, way, torch.full((2100,), value), 7)


@pytest.mark.parametrize("way", BUILD_WAYS, ids=lambda way: way.build)
def test_labels_in_runs(room: Kernels, way: Way) -> None:
    check(room, way, torch.arange(2600) // 70, 30)


@pytest.mark.parametrize("way", BUILD_WAYS, ids=lambda way: way.build)
def test_so_many_classes_that_a_block_scans_several_times(room: Kernels, way: Way) -> None:
    size = check(room, way, random_labels(900, 33_000), 33_000)
    assert size > 256 * 1024 * 4


def test_workspace_stays_small_for_many_classes(room: Kernels) -> None:
    """1024 splits of few rows where there are few classes, fewer splits of more rows where there are many."""
    sizes = []
    for rows, classes in ((131_072, 19), (20_000, 30_000), (300_000, 100)):
        size = torch.zeros(1, dtype=torch.int64)
        room.run(PLAIN, "run_class_order", rows, classes, *[None] * 7, size)
        sizes.append(int(size))
    assert sizes[0] == 20 * 1024 * 4 + 256  # 131072 rows in splits of 128; 20 chunks of the scan
    assert all(size <= (4 << 20) + 1024 for size in sizes)


def test_splits_of_more_rows_than_the_least(room: Kernels) -> None:
    """With 30000 classes there may be 32 splits, of 188 rows here: the second round of a warp is not full."""
    check(room, PLAIN, random_labels(6000, 30_000), 30_000)


def at_size(labels: Tensor, size: tuple[int, int], classes: int, ignore_index: int) -> Tensor:
    result = torch.empty(len(labels), *size, dtype=torch.int64)
    for b in range(len(labels)):
        for y in range(size[0]):
            for x in range(size[1]):
                label = int(labels[b, y * labels.shape[1] // size[0], x * labels.shape[2] // size[1]])
                result[b, y, x] = label if 0 <= label < classes and label != ignore_index else -1
    return result


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (33, 17), (40, 21), (0, 3)])
@pytest.mark.parametrize("full", [(1, 1), (33, 17), (50, 9)])
def test_labels_at(room: Kernels, way: Way, full: tuple[int, int], size: tuple[int, int]) -> None:
    labels, result = random_labels(2 * full[0] * full[1], 6).view(2, *full), torch.full((2, *size), -7)
    room.run(way, "run_labels_at", 2, *full, *size, 6, 3, labels, result)
    assert torch.equal(result, at_size(labels, size, 6, 3))
