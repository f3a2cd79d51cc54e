"""Hard anchors of a batch, and the pixel contrast among them (Wang et al., ICCV 2021): ways to compute it.

Anchors are drawn at random, so no two contenders have the same. But the pixels with a gradient are the ones that a
contender has drawn: they are counted against the rule, and loss and gradient against the formula for these pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pixcontrast import PixelContrastLoss
from pixcontrast.functional import gather_pixels
from pixcontrast.select import hard_anchors, labels_at

from .problem import (
    Contender,
    Problem,
    Results,
    Work,
    capturable,
    deviation,
    forward_and_backward,
    normal,
    random_labels,
)

TEMPERATURE, BASE_TEMPERATURE = 0.1, 0.07  # as in the released configuration without a memory


@dataclass
class Sampling(Problem):
    """A map of unit features, its labels at full resolution, and the prediction.

    ``contrast=False``: the loss is the sum over anchors of ``<x_r, g_c>`` with a given vector of each class, so that
    drawing and gathering is all there is to pay for; ``True``: InfoNCE of the anchors with each other.
    """

    features: Tensor  # [B, D, h, w]
    labels: Tensor  # [B, H, W] int64, every one a class
    predict: Tensor  # [B, h, w] int64
    pulls: Tensor  # [C, D], g_c
    contrast: bool
    max_samples: int = 1024
    max_views: int = 100

    def __post_init__(self) -> None:
        self.dtype = self.features.dtype
        self.leaves = {"features": self.features.requires_grad_()}

    @staticmethod
    def random(
        batch: int,
        height: int,
        width: int,
        dim: int = 256,
        classes: int = 19,
        contrast: bool = False,
        device: str = "cpu",
    ) -> Sampling:
        """Labels in blocks of 8 x 8 cells, at four times the size; an eighth of the pixels predicted at random."""
        blocks = random_labels(device, classes, batch, height // 8, width // 8)
        cells = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
        guesses = random_labels(device, 8 * classes, *cells.shape, seed=1)
        return Sampling(
            normalize(normal(device, batch, dim, *cells.shape[1:]), dim=1),
            cells.repeat_interleave(4, 1).repeat_interleave(4, 2),
            torch.where(guesses < classes, guesses, cells),
            normal(device, classes, dim, seed=2),
            contrast,
        )

    @property
    def cells(self) -> Tensor:
        """Labels ``[B, h, w]`` at the size of the features."""
        return labels_at(self.labels, (self.features.shape[2], self.features.shape[3]))

    def work(self) -> Work:
        pairs = self.max_samples**2 if self.contrast else 0
        moved = self.features.numel() * self.features.element_size() + 2 * 8 * self.predict.numel()
        return Work(bytes=moved, flops=6 * pairs * self.features.shape[1], dtype=self.dtype)

    def error(self, results: Results) -> float:
        cells, drawn = self.cells.reshape(-1), (results["features"] != 0).any(1).reshape(-1)
        if not self._counts_are_right(cells, drawn):
            return float("inf")
        pixels = drawn.nonzero()[:, 0]
        rows = self.features.detach().permute(0, 2, 3, 1).flatten(0, 2)[pixels].double().requires_grad_()
        loss = self.loss_of(rows, cells[pixels])
        (true,) = torch.autograd.grad(loss, rows)
        found = results["features"].permute(0, 2, 3, 1).flatten(0, 2)[pixels]
        truth = {"loss": loss.detach(), "features": true}
        return deviation({"loss": results["loss"], "features": found}, truth)

    def _counts_are_right(self, cells: Tensor, drawn: Tensor) -> bool:
        """Whether each class of each image gave as many wrongly and rightly predicted pixels as the rule says."""
        classes = len(self.pulls)
        image = torch.arange(len(self.labels), device=cells.device).repeat_interleave(cells.numel() // len(self.labels))
        kind = (image * classes + cells) * 2 + (self.predict.reshape(-1) == cells).long()
        there, given = (
            torch.bincount(kind, weights=mask.double(), minlength=2 * classes * len(self.labels)).view(-1, 2).tolist()
            for mask in (torch.ones_like(drawn), drawn)
        )
        groups = sum(wrong + right > self.max_views for wrong, right in there)
        views = min(self.max_samples // max(groups, 1), self.max_views)
        for (wrong, right), counted in zip(there, given, strict=True):
            expected = [0, 0]
            if wrong + right > self.max_views:
                few_right, few_wrong = right < views / 2, wrong < views / 2
                hard = views - right if few_right else wrong if few_wrong else views // 2
                expected = [hard, views - hard]
            if counted != expected:
                return False
        return True

    def loss_of(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Loss of anchors ``[R, D]`` with ``labels [R]``, of any of them -1 without effect."""
        if not self.contrast:
            pulls = torch.where(labels[:, None] >= 0, self.pulls[labels], 0)
            return (rows * pulls.to(rows.dtype)).sum()
        return self_contrast(rows, labels)


def self_contrast(anchors: Tensor, labels: Tensor) -> Tensor:
    """The formula as it stands: InfoNCE of unit anchors ``[R, D]`` of classes ``[R]`` with each other."""
    z = anchors @ anchors.t() / TEMPERATURE
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    e = torch.exp(z)
    log_share = z - torch.log(e + (e * ~same).sum(1, keepdim=True))
    return -(TEMPERATURE / BASE_TEMPERATURE) * ((log_share * positive).sum(1) / positive.sum(1)).mean()


def pixcontrast(backend: str) -> Contender:
    """The loss of this project, or its choice of anchors and a gather."""
    criterion = PixelContrastLoss(TEMPERATURE, BASE_TEMPERATURE, backend=backend)

    def loss(problem: Sampling) -> Tensor:
        if problem.contrast:
            return criterion(problem.features, problem.labels, problem.predict)
        anchors = hard_anchors(
            problem.cells, problem.predict,
            max_samples=problem.max_samples, max_views=problem.max_views, ignore_index=-1,
        )  # fmt: skip
        return problem.loss_of(gather_pixels(problem.features, anchors.indices, backend), anchors.labels)

    return forward_and_backward(loss)


def gather(features: Tensor, pixels: Tensor) -> Tensor:
    """Rows ``[R, D]`` of ``pixels [R]`` of a map ``[B, D, h, w]``, without a copy of the map."""
    size = features.shape[2] * features.shape[3]
    return features.flatten(2)[pixels // size, :, pixels % size]


def looped(problem: Sampling) -> Tensor:
    """Good eager PyTorch: lists of pixels class by class, one gather at the end."""
    cells, right = problem.cells.flatten(1), problem.cells.flatten(1) == problem.predict.flatten(1)
    counts = [torch.bincount(image, minlength=len(problem.pulls)) for image in cells]
    groups = [(b, c) for b, count in enumerate(counts) for c in (count > problem.max_views).nonzero()[:, 0].tolist()]
    views = min(problem.max_samples // max(len(groups), 1), problem.max_views)
    lists, labels = [], []
    for b, c in groups:
        member = cells[b] == c
        hard, easy = (_shuffled((member & kind).nonzero()[:, 0]) for kind in (~right[b], right[b]))
        keep = views - len(easy) if len(easy) < views / 2 else min(len(hard), views // 2)
        lists += [hard[:keep] + b * cells.shape[1], easy[: views - keep] + b * cells.shape[1]]
        labels += [c] * views
    return problem.loss_of(
        gather(problem.features, torch.cat(lists)), torch.tensor(labels, device=problem.features.device)
    )


def _shuffled(pixels: Tensor) -> Tensor:
    return pixels[torch.randperm(len(pixels), device=pixels.device)]


def contenders(contrast: bool) -> dict[str, Contender]:
    found: dict[str, Callable] = {"pixcontrast": capturable(pixcontrast("extension"))}
    if contrast:
        found["pixcontrast reference"] = pixcontrast("reference")
    return found | {"best eager": forward_and_backward(looped)}
