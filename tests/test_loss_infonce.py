"""`PixelContrastLoss` with InfoNCE as its users call it; `test_loss_many.py` compares its numbers with the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pixcontrast import ClassMemory, PixelContrastLoss
from pixcontrast.reference import as_rows
from pixcontrast.select import labels_at

BACKENDS = ("reference", "extension")
CLASSES = 4


def make_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Unit features, labels at four times their resolution, predictions that are right for about half of the pixels."""
    torch.manual_seed(seed)
    features = normalize(torch.randn(2, 6, 5, 7, dtype=torch.float64), dim=1)
    labels = torch.randint(0, CLASSES, (2, 20, 28))
    labels[:, :4] = -1
    small = labels[:, ::4, ::4]
    predict = torch.where(torch.rand(small.shape) < 0.5, small, 0)
    return features.requires_grad_(), labels, predict


def drawn(criterion: PixelContrastLoss, labels: Tensor, predict: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels and labels of the anchors that `forward` draws with a generator of seed 0, without unused places."""
    anchors = criterion.loss.anchors(labels[:, ::4, ::4], predict, torch.Generator().manual_seed(0))
    used = anchors.indices >= 0
    return anchors.indices[used], anchors.labels[used]


@pytest.mark.parametrize("backend", BACKENDS)
def test_queues_in_parts_are_one_queue(backend: str) -> None:
    features, labels, predict = make_batch()
    pixel, region = ClassMemory(CLASSES, 5, 6, dtype=torch.float64), ClassMemory(CLASSES, 3, 6, dtype=torch.float64)
    pixel.push(torch.randn(30, 6).double(), torch.randint(0, CLASSES, (30,)))
    region.push(torch.randn(4, 6).double(), torch.arange(4))
    criterion = PixelContrastLoss(max_samples=16, max_views=3, backend=backend)
    loss = criterion(features, labels, predict, [region, pixel], generator=torch.Generator().manual_seed(0))
    whole = torch.cat([region.rows[:, :1], pixel.rows], dim=1)
    expected = criterion(features, labels, predict, whole, generator=torch.Generator().manual_seed(0))
    assert pixel.fill.min() == 1  # so that all rows of `whole` are valid
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_rows_and_maps_predictions_at_any_resolution_and_every_pixel() -> None:
    features, labels, predict = make_batch()
    criterion = PixelContrastLoss(max_samples=None, max_views=None)
    loss = criterion(features, labels)
    rows = criterion(as_rows(features), labels[:, ::4, ::4].reshape(-1))
    torch.testing.assert_close(loss, rows)
    some = PixelContrastLoss(max_samples=16, max_views=3)
    full = predict.repeat_interleave(4, 1).repeat_interleave(4, 2)
    results = [some(features, labels, p, generator=torch.Generator().manual_seed(3)) for p in (predict, full)]
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:PixelContrastLoss. the loss is 0")  # some of them are
def test_what_stops_the_released_code_gives_a_finite_loss() -> None:
    features, labels, predict = make_batch()
    for criterion, label in (
        (PixelContrastLoss(max_views=1000), labels),  # no class is large enough
        (PixelContrastLoss(), torch.full_like(labels, -1)),
        (PixelContrastLoss(max_samples=3, max_views=2), labels),  # more classes than samples
        (PixelContrastLoss(max_samples=8, max_views=1), labels),  # one view: some classes have no positive
        (PixelContrastLoss(max_views=3), torch.zeros_like(labels)),  # one class: no negatives
    ):
        loss = criterion(features, label, predict)
        (grad,) = torch.autograd.grad(loss, features)
        assert loss.isfinite() and grad.isfinite().all()
    with pytest.raises(ValueError, match="no class takes part: it needs an anchor with its label"):
        PixelContrastLoss(on_empty="raise")(features, torch.full_like(labels, -1), predict)


@pytest.mark.parametrize("with_queue", [True, False])
def test_statistics(with_queue: bool) -> None:
    features, labels, predict = make_batch()
    queue = normalize(torch.randn(CLASSES, 3, 6, dtype=torch.float64), dim=2) if with_queue else None
    criterion = PixelContrastLoss(max_samples=16, max_views=3)
    generator = torch.Generator().manual_seed(0)
    loss, stats = criterion(features, labels, predict, queue, generator=generator, return_stats=True)
    pixels, label = drawn(criterion, labels, predict)
    used = stats.labels >= 0
    assert int(stats.anchors) == len(pixels) and torch.equal(stats.labels[used], label)
    torch.testing.assert_close(stats.loss[used].mean() * criterion.loss.temperature / 0.07, loss.detach())
    rows = as_rows(features.detach())[pixels]
    keys, key_labels = (rows, label) if queue is None else (queue.flatten(0, 1), torch.arange(4).repeat_interleave(3))
    for i in range(len(rows)):
        similarity = keys @ rows[i]
        torch.testing.assert_close(stats.positive_similarity[used][i], similarity[key_labels == label[i]].mean())
        torch.testing.assert_close(stats.negative_similarity[used][i], similarity[key_labels != label[i]].mean())
    for c in range(CLASSES):
        torch.testing.assert_close(stats.class_loss(CLASSES)[c], stats.loss[used][label == c].mean(), equal_nan=True)


@pytest.mark.parametrize("with_queue", [True, False])
def test_compiles_into_one_graph(with_queue: bool) -> None:
    torch._dynamo.reset()
    features, labels, predict = make_batch()
    memory = ClassMemory(CLASSES, 3, 6, dtype=torch.float64)
    memory.push(torch.randn(12, 6).double(), torch.arange(12) % CLASSES)
    criterion = PixelContrastLoss(max_samples=None, max_views=None)  # no chance involved
    results = []
    for function in (criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager")):
        loss = function(features, labels, predict, memory if with_queue else None)
        results.append((loss.detach(), torch.autograd.grad(loss * 2, features)[0]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predict": torch.zeros(2, 5).long()}, r"predict must be like labels \(2, 5, 7\), got \(2, 5\)"),
        (
            {"weight_logits": torch.zeros(2, 5, 7)},
            'weight_logits and queue_weight_logits are for objective="positive" alone',
        ),
        ({"queue": torch.zeros(4, 3, 5)}, r"queue must be \[C, N, D=6\], got \(4, 3, 5\)"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    features, labels, predict = make_batch()
    with pytest.raises(ValueError, match=message):
        PixelContrastLoss()(features, labels, **{"predict": predict} | change)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0 and finite, got 0"):
        PixelContrastLoss(temperature=0)
    with pytest.raises(ValueError, match="must both be numbers or both be None, got None and 100"):
        PixelContrastLoss(max_samples=None)
    with pytest.raises(ValueError, match='objective="positive" needs queue'):
        PixelContrastLoss(objective="positive")(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_once_for_all_shapes(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    criterion, graphs = PixelContrastLoss(max_samples=16, max_views=3), []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(criterion, fullgraph=True, dynamic=dynamic, backend=count)
    for height in (5, 7, 9):
        features = normalize(torch.randn(2, 6, height, 7), dim=1).requires_grad_()
        labels = torch.randint(0, CLASSES, (2, 4 * height, 28))
        loss = compiled(features, labels, labels[:, ::4, ::4])
        (grad,) = torch.autograd.grad(loss, features)
        assert loss > 0 and grad.any()
    assert len(graphs) == (1 if dynamic else 2)  # by default the second shape makes sizes dynamic


@pytest.mark.parametrize("max_samples", [16, None])
def test_labels_that_are_no_class_are_named(max_samples: int | None) -> None:
    features, labels, predict = make_batch()
    criterion = PixelContrastLoss(max_samples=max_samples, max_views=max_samples and 3)
    labels[0, 4, 0] = 200
    queue = torch.randn(CLASSES, 3, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="labels: 1 of 70 labels are outside 0..3 and are not ignore_index=255: 200"):
        criterion(features, labels, predict, queue)
    with pytest.raises(ValueError, match="outside 0..3"):
        criterion(features, labels, predict, [ClassMemory(CLASSES, 5, 6, dtype=torch.float64)])
    assert criterion(features, labels, predict).isfinite()  # without a queue any number may be a class


@pytest.mark.parametrize("ignored", [255, -1, -100])
def test_ignored_and_negative_labels_are_never_a_class(ignored: int) -> None:
    features, labels, _ = make_batch()
    labels[0, 4] = ignored
    queue = torch.randn(CLASSES, 3, 6, dtype=torch.float64)
    for criterion in (PixelContrastLoss(max_samples=None, max_views=None), PixelContrastLoss(objective="positive")):
        _, stats = criterion(features, labels, queue=queue, return_stats=True)
        counted = stats.counts.sum() if criterion.objective == "positive" else (stats.labels >= 0).sum()
        at_features = labels_at(labels, features.shape[2:])
        assert 0 < counted == ((at_features >= 0) & (at_features != 255)).sum() < at_features.numel()
