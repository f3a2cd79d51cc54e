"""The positive objective of Alonso et al. (ICCV 2021) from rows, memory and weight logits: ways to compute it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from pixcontrast.functional import memory_mean, positive_contrast

from .problem import (
    Contender,
    Results,
    SettledProblem,
    Step,
    Work,
    capturable,
    differentiate,
    forward_and_backward,
    normal,
    random_labels,
)


@dataclass
class Positive(SettledProblem):
    """Pixels and a full memory."""

    features: Tensor  # [P, D], or a map [B, D, h, w]
    labels: Tensor  # [P] int64, every one a class
    queue: Tensor  # [C, N, D], unit rows
    weight_logits: Tensor  # [P] logits
    queue_weight_logits: Tensor | None  # [C, N] logits, or None: all rows weigh the same, as in the released code

    def __post_init__(self) -> None:
        self.dtype = self.features.dtype
        self.leaves = {"features": self.features, "weight_logits": self.weight_logits}
        if self.queue_weight_logits is not None:
            self.leaves["queue_weight_logits"] = self.queue_weight_logits
        for leaf in self.leaves.values():
            leaf.requires_grad_()

    @staticmethod
    def random(
        pixels: int,
        dim: int = 256,
        classes: int = 19,
        rows: int = 256,
        weighted_rows: bool = False,
        maps: int = 0,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> Positive:
        """Rows, or so many square maps."""
        side = math.isqrt(pixels // max(maps, 1))
        return Positive(
            normal(device, *((maps, dim, side, side) if maps else (pixels, dim))).to(dtype),
            random_labels(device, classes, pixels),
            normalize(normal(device, classes, rows, dim, seed=1), dim=-1).to(dtype),
            normal(device, pixels, seed=2),
            normal(device, classes, rows, seed=3) if weighted_rows else None,
        )

    @property
    def rows(self) -> Tensor:
        """``[P, D]``; of a map, a copy of it"""
        return self.features if self.features.dim() == 2 else self.features.permute(0, 2, 3, 1).flatten(0, 2)

    def in_place(self, values: Tensor) -> Tensor:
        """``values [P]`` in the shape of the pixels."""
        return values.view(self.features[:, 0].shape)

    def work(self) -> Work:
        rows, size = self.features.numel(), self.features.element_size()
        # the norm, the similarity with the class mean, and both terms of the gradient
        return Work(bytes=2 * rows * size + self.queue.numel() * size, flops=7 * rows, dtype=torch.float32)

    def truth(self) -> Results:
        features, queue, weight_logits = (t.detach().double() for t in (self.features, self.queue, self.weight_logits))
        queue_weight_logits = None if self.queue_weight_logits is None else self.queue_weight_logits.detach().double()
        return differentiate(all_pairs, Positive(features, self.labels, queue, weight_logits, queue_weight_logits))


def extension(problem: Positive) -> Tensor:
    """The compiled operators of this project."""
    return _pixcontrast(problem, "extension")


def reference(problem: Positive) -> Tensor:
    """The readable PyTorch of this project."""
    return _pixcontrast(problem, "reference")


def _pixcontrast(problem: Positive, backend: str) -> Tensor:
    return positive_contrast(
        problem.features,
        problem.in_place(problem.labels),
        problem.queue,
        weight_logits=problem.in_place(problem.weight_logits),
        queue_weight_logits=problem.queue_weight_logits,
        backend=backend,
        ignore_index=-1,  # class 255 of a thousand is a class like any other
    ).loss


def kept_means(problem: Positive) -> Step:
    """The compiled operator alone, where a trainer keeps the class means of its memory."""
    classes, rows = problem.queue.shape[:2]
    counts = torch.full((classes,), rows, device=problem.queue.device)
    mean = memory_mean(problem.queue, counts)
    labels, logits = problem.in_place(problem.labels), problem.in_place(problem.weight_logits)

    def step() -> Results:
        loss, _, _, _, features, weight_logits, _ = torch.ops.pixcontrast.positive(
            problem.features, labels, logits, mean, counts, 1.0, -1, True, True, False
        )
        return {"loss": loss, "features": features, "weight_logits": weight_logits.flatten()}

    return step


def all_pairs(problem: Positive) -> Tensor:
    """The formula as it stands: for each class a masked copy of its rows, and all pairs of rows and memory."""
    classes, rows = problem.queue.shape[0], problem.rows
    loss = rows.new_zeros(())
    for c in range(classes):
        mask = problem.labels == c
        queue_weight_logits = None if problem.queue_weight_logits is None else problem.queue_weight_logits[c]
        loss = loss + class_pairs(rows[mask], problem.queue[c], problem.weight_logits[mask], queue_weight_logits)
    return loss / classes


def class_pairs(rows: Tensor, memory: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    """Weighted mean distance of all pairs of one class: ``rows [M, D]``, ``memory [N, D]``, logits ``[M]``, ``[N]``."""
    if len(rows) < 2 or len(memory) < 2:
        return rows.new_zeros(())
    w = torch.sigmoid(a)
    pairs = (1 - normalize(rows, dim=1) @ normalize(memory, dim=1).t()) * (len(rows) * w / w.sum())[:, None]
    if b is not None:
        v = torch.sigmoid(b)
        pairs = pairs * (len(memory) * v / v.sum())[None, :]
    return pairs.mean()


class OneHot(torch.autograd.Function):
    """Factorised, with class sums as products with a one-hot matrix and the backward written by hand."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, labels: Tensor, queue: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
        classes = queue.shape[0]
        one_hot = torch.nn.functional.one_hot(labels, classes).to(features.dtype)
        s = torch.sigmoid(a)
        t = queue.new_ones(queue.shape[:2]) if b is None else torch.sigmoid(b)
        w = s / (s @ one_hot)[labels]
        v = t / t.sum(1, keepdim=True)
        norm = torch.linalg.vector_norm(features, dim=1).clamp_min(1e-12)
        memory = queue / torch.linalg.vector_norm(queue, dim=2, keepdim=True).clamp_min(1e-12)
        mean = torch.bmm(v[:, None], memory)[:, 0]
        cosine = (features @ mean.t()).gather(1, labels[:, None])[:, 0] / norm
        class_cosine = (w * cosine) @ one_hot
        sums = one_hot.t() @ (features * (w / norm)[:, None]) if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(features, labels, memory, s, t, w, v, norm, mean, cosine, class_cosine, sums)
        return (w * (1 - cosine)).sum() / classes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, labels, memory, s, t, w, v, norm, mean, cosine, class_cosine, sums = ctx.saved_tensors
        scale = grad / memory.shape[0]
        towards = -scale * w / norm
        d_features = torch.addcmul(mean[labels] * towards[:, None], features, (-towards * cosine / norm)[:, None])
        d_a = scale * w * (1 - s) * (class_cosine[labels] - cosine)
        if sums is None:
            return d_features, None, None, d_a, None
        of_rows = torch.bmm(memory, sums[:, :, None])[:, :, 0]
        d_b = -scale * v * (1 - t) * (of_rows - (sums * mean).sum(1, keepdim=True))
        return d_features, None, None, d_a, d_b


def one_hot(problem: Positive) -> Tensor:
    """The best eager PyTorch known."""
    return OneHot.apply(problem.rows, problem.labels, problem.queue, problem.weight_logits, problem.queue_weight_logits)


def _index_add(features: Tensor, labels: Tensor, queue: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    classes = queue.shape[0]
    s = torch.sigmoid(a)
    t = queue.new_ones(queue.shape[:2]) if b is None else torch.sigmoid(b)
    w = s / s.new_zeros(classes).index_add(0, labels, s)[labels]
    mean = torch.einsum("cn,cnd->cd", t / t.sum(1, keepdim=True), normalize(queue, dim=2))
    cosine = (normalize(features, dim=1) * mean[labels]).sum(1)
    return (w * (1 - cosine)).sum() / classes


def compiled(problem: Positive) -> Step:
    """The factorised form written for the compiler, under ``torch.compile``."""
    loss = torch.compile(_index_add, dynamic=False)
    return forward_and_backward(lambda p: loss(p.rows, p.labels, p.queue, p.weight_logits, p.queue_weight_logits))(
        problem
    )


CONTENDERS: dict[str, Contender] = {
    "pixcontrast": capturable(forward_and_backward(extension)),
    "pixcontrast, means kept": capturable(kept_means),
    "pixcontrast reference": forward_and_backward(reference),
    "best eager": forward_and_backward(one_hot),
    "torch.compile": compiled,
    "formula as it stands": forward_and_backward(all_pairs),
}
