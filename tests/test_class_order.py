"""Label maps at another size and in class order: against loops over single labels, exact in every element."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICES, without_waiting
from torch import Tensor

from pixcontrast.ops.class_order import Segments, class_order, valid_labels_at
from pixcontrast.select import labels_at

BACKENDS = ("reference", "extension")
SIZES = [(0, 3), (1, 1), (7, 1), (300, 19), (5000, 150), (20_000, 3), (70_000, 19), (20_000, 1000), (400, 30_000)]


def expected_order(labels: Tensor, num_classes: int) -> Segments:
    """Positions dealt out to the lists of their classes, one after the other."""
    lists: list[list[int]] = [[] for _ in range(num_classes + 1)]
    for position, label in enumerate(labels.reshape(-1).tolist()):
        lists[label if 0 <= label < num_classes else num_classes].append(position)
    count = [len(of_class) for of_class in lists]
    classes = [c if c < num_classes else -1 for c, of_class in enumerate(lists) for _ in of_class]
    order = [position for of_class in lists for position in of_class]
    start = [sum(count[:c]) for c in range(num_classes + 1)] if num_classes < 2000 else [0]
    for c in range(len(start), num_classes + 1):
        start.append(start[-1] + count[c - 1])
    total = [len(order) - count[-1]]
    return Segments(*(torch.tensor(values).long() for values in (order, classes, start[:-1], count[:-1], total)))


def random_labels(rows: int, num_classes: int) -> Tensor:
    """Some labels of every kind that is not valid; classes of very different sizes."""
    labels = (torch.rand(rows) ** 2 * num_classes).long()
    for value in (-1, num_classes, 255 + num_classes, -(2**40), 2**40):
        labels[torch.rand(rows) < 0.05] = value
    return labels


def check(found: Segments, labels: Tensor, num_classes: int) -> None:
    expected = expected_order(labels.cpu(), num_classes)
    for name, value in expected._asdict().items():
        result = getattr(found, name)
        assert result.dtype == torch.int64 and torch.equal(result.cpu(), value), name


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "num_classes"), SIZES)
def test_order_agrees_with_lists_of_positions(rows: int, num_classes: int, backend: str, device: str) -> None:
    labels = random_labels(rows, num_classes).to(device)
    with without_waiting(device):
        found = class_order(labels, num_classes, backend)
    check(found, labels, num_classes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_labels_of_one_class_or_of_none(backend: str, device: str) -> None:
    for value in (0, 2, 4, -1, 5):
        labels = torch.full((40_000,), value, device=device)
        check(class_order(labels, 5, backend), labels, 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_and_other_strides(backend: str) -> None:
    labels = random_labels(2 * 30 * 40, 7).view(2, 30, 40)
    check(class_order(labels, 7, backend), labels, 7)
    check(class_order(labels.transpose(1, 2), 7, backend), labels.transpose(1, 2).contiguous(), 7)
    check(class_order(labels[:, ::2, 1::3], 7, backend), labels[:, ::2, 1::3].contiguous(), 7)


def test_order_is_the_same_with_any_number_of_threads() -> None:
    labels = random_labels(200_000, 19)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            check(class_order(labels, 19, "extension"), labels, 19)
    finally:
        torch.set_num_threads(before)


def expected_labels(labels: Tensor, size: tuple[int, int], num_classes: int, ignore_index: int) -> Tensor:
    """Cell by cell."""
    result = torch.empty(len(labels), *size, dtype=torch.int64)
    for b in range(len(labels)):
        for y in range(size[0]):
            for x in range(size[1]):
                label = int(labels[b, y * labels.shape[1] // size[0], x * labels.shape[2] // size[1]])
                result[b, y, x] = label if 0 <= label < num_classes and label != ignore_index else -1
    return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("full", [(1, 1), (7, 10), (64, 33), (130, 9)])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (64, 33), (40, 50), (0, 4), (3, 0)])
def test_labels_at_agree_cell_by_cell(full: tuple[int, int], size: tuple[int, int], backend: str, device: str) -> None:
    labels = random_labels(3 * full[0] * full[1], 6).view(3, *full)
    for ignore_index in (255, 3, -1):
        with without_waiting(device):
            found = valid_labels_at(labels.to(device), size, 6, ignore_index, backend)
        assert torch.equal(found.cpu(), expected_labels(labels, size, 6, ignore_index))


def test_labels_at_picks_the_pixels_that_select_picks() -> None:
    labels = torch.arange(2 * 129 * 65).view(2, 129, 65)
    for size in ((33, 17), (129, 65), (200, 3)):
        assert torch.equal(valid_labels_at(labels, size, labels.numel(), -1, "extension"), labels_at(labels, size))


def test_labels_of_no_image() -> None:
    for backend in BACKENDS:
        assert valid_labels_at(torch.zeros(0, 5, 5).long(), (3, 2), 4, 255, backend).shape == (0, 3, 2)
        assert valid_labels_at(torch.zeros(2, 0, 5).long(), (0, 2), 4, 255, backend).shape == (2, 0, 2)


def test_opcheck() -> None:
    labels = random_labels(2 * 8 * 9, 5).view(2, 8, 9)
    for given in (labels, labels.transpose(1, 2), labels[:0]):
        torch.library.opcheck(torch.ops.pixcontrast.class_order.default, (given, 5))
        torch.library.opcheck(torch.ops.pixcontrast.labels_at.default, (given, 4, 3, 5, 255))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend: str) -> None:
    def function(labels: Tensor) -> tuple[Tensor, ...]:
        segments = class_order(valid_labels_at(labels, (8, 12), 5, 255, backend), 5, backend)
        return segments.order + 0, segments.labels + 0, segments.start + 0, segments.count + 0, segments.total + 0

    labels = random_labels(2 * 20 * 30, 5).view(2, 20, 30)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(labels)
    check(Segments(*compiled), expected_labels(labels, (8, 12), 5, 255), 5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments_are_named(backend: str) -> None:
    labels = torch.zeros(2, 4, 4).long()
    for call in (
        lambda labels, classes: class_order(labels, classes, backend),
        lambda labels, classes: valid_labels_at(labels, (2, 2), classes, 255, backend),
    ):
        with pytest.raises(TypeError, match="labels must be int64, got torch.int32"):
            call(labels.int(), 3)
        for classes in (0, -1, 2**31 - 1):
            with pytest.raises(ValueError, match=rf"num_classes must be within 1\.\.2\^31 - 2, got {classes}"):
                call(labels, classes)
        with pytest.raises(ValueError, match=r"labels must have fewer than 2\^31 elements, got 2147483648"):
            call(labels[:1, :1, :1].expand(1, 2**16, 2**15), 3)
    with pytest.raises(ValueError, match=r"labels must be \[B, H, W\], got \(4, 4\)"):
        valid_labels_at(labels[0], (2, 2), 3, 255, backend)
    with pytest.raises(ValueError, match=r"labels must have a pixel for each cell of 2 x 3, got \(2, 0, 4\)"):
        valid_labels_at(labels[:, :0], (2, 3), 3, 255, backend)
    with pytest.raises(ValueError, match="backend must be one of"):
        class_order(labels, 3, "cuda")


def test_the_operators_themselves_refuse_what_would_leave_the_memory() -> None:
    library = torch.ops.pixcontrast
    labels = torch.zeros(2, 4, 4).long()
    for classes in (0, 2**31 - 1):
        with pytest.raises(ValueError, match="num_classes must be within"):
            library.class_order(labels, classes)
    with pytest.raises(TypeError, match="labels must be Long, got Int"):
        library.class_order(labels.int(), 3)
    with pytest.raises(ValueError, match=r"labels must be \[B, H, W\]"):
        library.labels_at(labels[0], 2, 2, 3, 255)
    with pytest.raises(ValueError, match="labels must have a pixel for each cell"):
        library.labels_at(labels[:, :, :0], 2, 2, 3, 255)
    with pytest.raises(ValueError, match="height and width must be at least 0"):
        library.labels_at(labels, -1, 2, 3, 255)
