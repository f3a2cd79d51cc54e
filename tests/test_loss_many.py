"""`PixelContrastLoss` with InfoNCE on many random cases, each against loops over single pairs in float64.

A case is drawn from its seed: sizes, options, features, labels, predictions, queues. The anchors are those the loss
itself draws (`tests/test_select.py` tests the drawing); the keys are written down here from the definition of both
variants. The last test shows that every odd situation occurs, also those where the released code stops or gives NaN.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from oracle import infonce_pairs
from torch import Tensor
from torch.nn.functional import normalize

from pixcontrast import ClassMemory, PixelContrastLoss
from pixcontrast.loss import Queue
from pixcontrast.reference import as_rows
from pixcontrast.select import labels_at

SEEDS = range(300)


class Case(NamedTuple):
    options: dict[str, Any]
    """Arguments of `PixelContrastLoss`."""
    features: Tensor
    """[B, D, h, w] or [P, D], NaN where the label is ignored."""
    labels: Tensor
    """[B, H, W] or [P]."""
    predict: Tensor | None
    queues: list[Queue]


def make_case(seed: int) -> Case:
    random.seed(seed)
    torch.manual_seed(seed)
    ignore_index, classes, dim = random.choice([-1, 255]), random.choice([1, 2, 4]), random.choice([3, 6, 17])
    options = {
        "temperature": random.choice([0.001, 0.07, 0.1, 1.0]),
        "base_temperature": random.choice([0.07, 1.0]),
        "variant": random.choice(["paper", "released"]),
        "ignore_index": ignore_index,
        "loss_weight": random.choice([1.0, 0.3]),
    }
    if random.random() < 0.2:
        options |= {"max_samples": None, "max_views": None}
    else:
        options |= {"max_samples": random.choice([1, 3, 7, 20]), "max_views": random.choice([1, 2, 3, 5])}
    batch, height, width = random.choice([1, 2]), random.choice([2, 4]), random.choice([3, 6])
    scale = random.choice([1, 3])
    features = torch.randn(batch, dim, height, width, dtype=torch.float64)
    features = normalize(features, dim=1) if random.random() < 0.8 else features * 100
    labels = torch.randint(0, classes, (batch, height * scale, width * scale))
    labels[torch.rand(labels.shape) < random.choice([0, 0, 0.2, 0.2, 0.9])] = ignore_index
    small = labels_at(labels, (height, width))
    predict = random.choice(
        [None, small, torch.randint(0, classes, small.shape), torch.randint(0, classes, labels.shape)]
    )
    features = torch.where((small == ignore_index)[:, None], float("nan"), features)
    if random.random() < 0.2:
        features, labels = as_rows(features).clone(), small.flatten()
        predict = None if predict is None else labels_at(predict, (height, width)).flatten()
    makers: dict[str, tuple[Callable[[int, int], Queue], ...]]
    makers = {"none": (), "tensor": (make_tensor,), "memory": (make_memory,), "two": (make_memory, make_tensor)}
    queues = [make(classes, dim) for make in makers[random.choice(list(makers))]]
    return Case(options, features, labels, predict, queues)


def make_tensor(classes: int, dim: int) -> Tensor:
    return normalize(torch.randn(classes, random.choice([1, 5]), dim, dtype=torch.float64), dim=2)


def make_memory(classes: int, dim: int) -> ClassMemory:
    """Some classes are empty, some partly filled, some full."""
    memory = ClassMemory(classes, 4, dim, dtype=torch.float64)
    count = random.choice([0, 2, 4, 20])
    memory.push(torch.randn(count, dim).double(), torch.randint(0, classes, (count,)))
    return memory


def draw(case: Case) -> tuple[list[int], Tensor, Tensor]:
    """Places, pixels and labels of the anchors that the loss draws with a generator of seed 0."""
    labels = case.labels
    if labels.dim() == 3:
        labels = labels_at(labels, (case.features.shape[2], case.features.shape[3]))
    anchors = PixelContrastLoss(**case.options).loss.anchors(labels, case.predict, torch.Generator().manual_seed(0))
    used = anchors.indices >= 0
    return used.nonzero()[:, 0].tolist(), anchors.indices[used], anchors.labels[used]


def valid_rows(queue: Queue, c: int) -> Tensor:
    return queue.rows[c, : int(queue.counts[c])] if isinstance(queue, ClassMemory) else queue[c]


def make_keys(queues: list[Queue], released: bool) -> tuple[Tensor, Tensor]:
    """All keys and their classes. Released: class 0 comes last, as many zero rows as its queues have room for."""
    first = queues[0].rows if isinstance(queues[0], ClassMemory) else queues[0]
    keys, labels = [], []
    for c in [*range(1, len(first)), 0]:
        for queue in queues:
            rows = valid_rows(queue, c)
            if released and c == 0:
                rows = torch.zeros_like(queue.rows[0] if isinstance(queue, ClassMemory) else queue[0])
            keys.append(rows)
            labels += [c] * len(rows)
    return torch.cat(keys), torch.tensor(labels, dtype=torch.int64)


def truth(case: Case, features: Tensor) -> tuple[Tensor, float]:
    """The loss by single pairs, and the largest absolute logit."""
    places, pixels, labels = draw(case)
    rows = as_rows(features)[pixels]
    released = case.options["variant"] == "released"
    if case.queues:
        keys, key_labels = make_keys(case.queues, released)
        excluded = places if released else [-1] * len(places)  # the mask of the released code: key r for anchor r
    else:
        keys, key_labels, excluded = rows, labels, list(range(len(rows)))
    temperature = case.options["temperature"]
    loss = infonce_pairs(rows, labels, keys, key_labels, excluded, temperature, case.options["base_temperature"])
    logits = (rows.detach() @ keys.detach().t() / temperature).abs()
    return loss * case.options["loss_weight"], float(logits.max()) if logits.numel() else 0.0


@pytest.mark.filterwarnings("ignore:PixelContrastLoss. the loss is 0")  # of some cases it is
@pytest.mark.parametrize("seed", SEEDS)
def test_agrees_with_single_pairs(seed: int) -> None:
    case = make_case(seed)
    features = case.features.requires_grad_()
    expected, largest = truth(case, features)
    (grad,) = torch.autograd.grad(expected, features)
    # a logit z comes with a rounding error of some 1e-16 |z|, whoever computes it
    tolerance = 1e-12 + 1e-14 * largest
    for backend in ("reference", "extension"):
        criterion = PixelContrastLoss(**case.options, backend=backend)
        queue = case.queues[0] if len(case.queues) == 1 else case.queues or None
        loss = criterion(features, case.labels, case.predict, queue, generator=torch.Generator().manual_seed(0))
        (result,) = torch.autograd.grad(loss, features)
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(result, grad, rtol=0, atol=tolerance * max(1.0, float(grad.abs().max())))


def groups(case: Case) -> int:
    """Classes of single images with more than `max_views` pixels at the resolution of the features."""
    labels = case.labels[None, None]
    if case.features.dim() == 4:
        labels = labels_at(case.labels, (case.features.shape[2], case.features.shape[3]))
    found = [(image, c) for image in labels for c in set(image.flatten().tolist()) - {case.options["ignore_index"]}]
    return sum(int((image == c).sum()) > case.options["max_views"] for image, c in found)


def traits(case: Case) -> set[str]:
    """Odd situations of a case."""
    places, _, label = draw(case)
    labels = label.tolist()
    most, views = case.options["max_samples"], case.options["max_views"]
    found = {case.options["variant"], f"{len(case.queues)} queues", f"{case.features.dim()} axes"}
    situations = {
        "temperature 0.001": case.options["temperature"] == 0.001,
        "large features": bool(case.features.nan_to_num().norm(dim=1).max() > 10),
        "ignored pixels": bool(case.features.isnan().any()),
        "no predictions": case.predict is None,
        "every pixel": most is None,
        "one view": views == 1 and len(places) > 0,
        "no anchors": not places,
        "more groups than samples": most is not None and most < groups(case) and len(places) == most,
        "anchor without positive": not case.queues and any(labels.count(c) == 1 for c in labels),
        "no negatives": not case.queues and len(set(labels)) == 1,
    }
    if case.queues:
        counts = [sum(len(valid_rows(queue, c)) for queue in case.queues) for c in set(labels)]
        situations["class without rows"] = 0 in counts and sum(counts) > 0
        situations["queues without rows"] = 0 in counts and sum(counts) == 0
        situations["part of the rows"] = any(isinstance(q, ClassMemory) and 0 < q.fill.sum() < 1 for q in case.queues)
    return found | {name for name, occurs in situations.items() if occurs}


def test_every_odd_situation_occurs_in_both_variants() -> None:
    seen: dict[tuple[str, str], int] = {}
    cases = [make_case(seed) for seed in SEEDS]
    for case in cases:
        for name in traits(case):
            key = (name, case.options["variant"])
            seen[key] = seen.get(key, 0) + 1
    names = {name for name, _ in seen} - {"paper", "released"}
    assert len(names) == 18
    assert all(seen.get((name, variant), 0) >= 2 for name in names for variant in ("paper", "released"))
