"""The losses of ContrastiveSeg under their own names and calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import infonce_pairs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

import pixcontrast
from pixcontrast import ClassMemory
from pixcontrast.compat.contrastive_seg import ContrastAuxCELoss, ContrastCELoss, PixelContrastLoss
from pixcontrast.reference import as_rows

CLASSES = 4
CONTRAST = {"temperature": 0.3, "base_temperature": 0.07, "max_samples": 16, "max_views": 3, "loss_weight": 0.1}


class Configer:
    """Nested dictionaries, read as theirs."""

    def __init__(self, **sections: Any) -> None:
        self.sections = {"contrast": CONTRAST, "loss": {"params": {"ce_ignore_index": 255}}} | sections

    def get(self, *key: str) -> Any:
        value: Any = self.sections
        for part in key:
            value = value[part]
        return value

    def exists(self, *key: str) -> bool:
        value: Any = self.sections
        for part in key:
            if part not in value:
                return False
            value = value[part]
        return True


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch() -> tuple[dict[str, Any], Tensor]:
    """Logits and a unit embedding at a quarter of the resolution of the target."""
    embed = normalize(torch.randn(2, 6, 5, 7, dtype=torch.float64), dim=1)
    target = torch.randint(0, CLASSES, (2, 20, 28))
    target[:, :4] = 255
    seg = torch.randn(2, CLASSES, 5, 7, dtype=torch.float64)
    return {"seg": seg.requires_grad_(), "embed": embed.requires_grad_()}, target


def make_queues() -> tuple[Tensor, Tensor]:
    """A segment and a pixel queue."""
    segment, pixel = (normalize(torch.randn(CLASSES, size, 6, dtype=torch.float64), dim=2) for size in (2, 3))
    return segment, pixel


def test_options_come_from_the_configer() -> None:
    criterion = PixelContrastLoss(Configer())
    loss = criterion.loss
    assert (loss.temperature, loss.base_temperature, criterion.ignore_label) == (0.3, 0.07, 255)
    assert (loss.max_samples, loss.max_views, criterion.variant) == (16, 3, "paper")
    assert isinstance(criterion, pixcontrast.PixelContrastLoss)
    assert PixelContrastLoss(Configer(loss={})).ignore_label == -1
    assert PixelContrastLoss(Configer(loss={"params": {}})).ignore_label == -1
    options = PixelContrastLoss(Configer(), variant="released", skip_class0=False, loss_weight=2.0)
    assert options.loss.diagonal and not options.loss.skip_class0 and options.loss.loss_weight == 2


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("with_queue", [True, False])
def test_the_call_is_ours(variant: str, with_queue: bool) -> None:
    preds, target = make_batch()
    predict = preds["seg"].argmax(1)
    queue = list(make_queues()) if with_queue else None
    ours = pixcontrast.PixelContrastLoss(0.3, 0.07, 16, 3, 255, variant)
    expected = ours(preds["embed"], target, predict, queue, generator=seeded())
    criterion = PixelContrastLoss(Configer(), variant=variant)
    for labels in (target, target.double(), target.int()):
        assert torch.equal(criterion(preds["embed"], labels, predict, queue, generator=seeded()), expected)
    loss, stats = criterion(preds["embed"], target, predict.int(), queue, generator=seeded(), return_stats=True)
    assert torch.equal(loss, expected) and stats.anchors > 0
    assert criterion(preds["embed"], target).isfinite()
    with pytest.raises(ValueError, match="labels are needed, got None"):
        criterion(preds["embed"])


def test_two_queues_in_the_released_variant_are_the_joined_buffer_of_their_code() -> None:
    preds, target = make_batch()
    segment, pixel = make_queues()
    criterion = PixelContrastLoss(Configer(), variant="released")
    predict = preds["seg"].argmax(1)
    loss = criterion(preds["embed"], target, predict, [segment, pixel], generator=seeded())
    (result,) = torch.autograd.grad(loss, preds["embed"])
    anchors = criterion.loss.anchors(target[:, ::4, ::4], predict, seeded())
    used = anchors.indices >= 0
    rows, labels = as_rows(preds["embed"])[anchors.indices[used]], anchors.labels[used]
    # classes 1, 2, ... with segment rows before pixel rows, then as many zero rows, which are labelled 0
    joined = torch.cat([segment, pixel], dim=1)
    keys = torch.cat([joined[1:].flatten(0, 1), torch.zeros_like(joined[0])])
    key_labels = torch.cat([torch.arange(1, CLASSES).repeat_interleave(5), torch.zeros(5, dtype=torch.int64)])
    truth = infonce_pairs(rows, labels, keys, key_labels, list(range(len(rows))), 0.3, 0.07)
    (grad,) = torch.autograd.grad(truth, preds["embed"])
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(result, grad, rtol=0, atol=1e-12 * float(grad.abs().max()))


def upsampled_ce(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    full = interpolate(logits, target.shape[1:], mode="bilinear", align_corners=True)
    return cross_entropy(full, target, weight, ignore_index=255)


@pytest.mark.parametrize("queue", ["none", "tensors", "memories"])
def test_wrapper_adds_the_weighted_contrast(queue: str) -> None:
    preds, target = make_batch()
    parts: list[Any] = [] if queue == "none" else list(make_queues())
    if queue == "memories":
        parts = [ClassMemory(CLASSES, 5, 6, dtype=torch.float64) for _ in range(2)]
        for part in parts:
            part.push(torch.randn(9, 6).double(), torch.arange(9) % CLASSES)
    preds |= dict(zip(("segment_queue", "pixel_queue"), parts, strict=False))
    criterion = ContrastCELoss(Configer())
    contrast = criterion.contrast_criterion(
        preds["embed"], target, preds["seg"].argmax(1), parts or None, generator=seeded()
    )
    loss = criterion(preds, target, with_embed=True, generator=seeded())
    torch.testing.assert_close(loss, upsampled_ce(preds["seg"], target) + 0.1 * contrast)
    torch.testing.assert_close(criterion(preds, target), upsampled_ce(preds["seg"], target))


def test_wrapper_with_memory_waits_for_both_queues() -> None:
    preds, target = make_batch()
    criterion = ContrastCELoss(Configer(contrast=CONTRAST | {"with_memory": False}))  # the key alone switches it on
    segment, pixel = make_queues()
    expected = upsampled_ce(preds["seg"], target)
    for queues in ({}, {"segment_queue": segment}, {"segment_queue": segment, "pixel_queue": None}):
        torch.testing.assert_close(criterion(preds | queues, target, with_embed=True), expected)
    assert criterion(preds | {"segment_queue": segment, "pixel_queue": pixel}, target, with_embed=True) > expected


def test_contrast_that_does_not_count_cannot_do_harm() -> None:
    preds, target = make_batch()
    preds["embed"] = torch.full_like(preds["embed"], float("nan"), requires_grad=True)
    loss = ContrastCELoss(Configer())(preds, target, with_embed=False)
    grad_seg, grad_embed = torch.autograd.grad(loss, [preds["seg"], preds["embed"]])  # connected to both
    assert loss.isfinite() and grad_seg.abs().sum() > 0 and torch.equal(grad_embed, torch.zeros_like(grad_embed))


@pytest.mark.filterwarnings("ignore:PixelContrastLoss. the loss is 0")  # nothing is labelled
@pytest.mark.parametrize("with_embed", [False, True])
def test_a_batch_without_labels_gives_a_connected_zero(with_embed: bool) -> None:
    preds, target = make_batch()
    loss = ContrastCELoss(Configer())(preds, torch.full_like(target, 255), with_embed)
    grads = torch.autograd.grad(loss, [preds["seg"], preds["embed"]])
    assert loss == 0 and all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_class_weights_reduction_and_auxiliary_logits() -> None:
    preds, target = make_batch()
    preds["seg_aux"] = torch.randn_like(preds["seg"])
    weights = [1.0, 2.0, 0.5, 1.5]
    params = {"ce_ignore_index": 255, "ce_weight": weights, "ce_reduction": "elementwise_mean"}
    configer = Configer(loss={"params": params}, network={"loss_weights": {"seg_loss": 1.0, "aux_loss": 0.4}})
    seg, aux = (upsampled_ce(preds[name], target, torch.tensor(weights).double()) for name in ("seg", "seg_aux"))
    torch.testing.assert_close(ContrastCELoss(configer).double()(preds, target), seg)
    torch.testing.assert_close(ContrastAuxCELoss(configer).double()(preds, target), seg + 0.4 * aux)
    own = ContrastCELoss(configer, nn.CrossEntropyLoss(ignore_index=255, label_smoothing=0.1))
    assert own(preds, target) != seg
    for name in ("use_rmi", "use_lovasz"):
        with pytest.raises(ValueError, match=f"ContrastCELoss: the configer sets {name}; pass that loss as seg_crit"):
            ContrastCELoss(Configer(contrast=CONTRAST | {name: True}))
        ContrastCELoss(Configer(contrast=CONTRAST | {name: True}), nn.CrossEntropyLoss())


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.seg, self.embed = nn.Conv2d(8, CLASSES, 1), nn.Conv2d(8, 6, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images)
        return {"seg": self.seg(features), "embed": normalize(self.embed(features), dim=1)}


def train(step_loss: Any, steps: int = 30) -> list[float]:
    """Losses of every step of a small network on random images; the same network and images for every ``step_loss``."""
    torch.manual_seed(0)
    network, losses = Segmenter(), []
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        target = torch.randint(0, CLASSES, (2, 8, 8)).repeat_interleave(4, 1).repeat_interleave(4, 2)
        target[:, :3] = 255
        images = torch.randn(2, 3, 32, 32) + target[:, None]
        loss = step_loss(network(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("with_queue", [False, True])
def test_training_by_their_call_and_by_ours_gives_the_same_losses(with_queue: bool) -> None:
    queues = [queue.float() for queue in make_queues()] if with_queue else []
    theirs, ours = seeded(), seeded()
    wrapper = ContrastCELoss(Configer(), variant="released")
    criterion = pixcontrast.PixelContrastLoss(0.3, 0.07, 16, 3, ignore_index=255, variant="released")

    def their_loss(preds: dict[str, Tensor], target: Tensor) -> Tensor:
        preds |= dict(zip(("segment_queue", "pixel_queue"), queues, strict=False))
        return wrapper(preds, target, with_embed=True, generator=theirs)

    def our_loss(preds: dict[str, Tensor], target: Tensor) -> Tensor:
        contrast = criterion(preds["embed"], target, preds["seg"].argmax(1), queues or None, generator=ours)
        return upsampled_ce(preds["seg"], target) + CONTRAST["loss_weight"] * contrast

    first, second = train(their_loss), train(our_loss)
    assert first == second
    assert sum(first[-5:]) < sum(first[:5])


@pytest.mark.parametrize("given", ["memory", "array", "list"])
def test_what_is_no_tensor_is_one_clear_error(given: str) -> None:
    preds, target = make_batch()
    wrong = {"memory": ClassMemory(CLASSES, 2, 6), "array": target.numpy(), "list": target.tolist()}[given]
    criterion = PixelContrastLoss(Configer())
    with pytest.raises(TypeError, match="predict, the third argument, must hold predicted classes"):
        criterion(preds["embed"], target, wrong)
    with pytest.raises(TypeError, match="labels must be a tensor, got"):
        criterion(preds["embed"], wrong)
