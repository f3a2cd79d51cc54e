"""Ways to compute the positive objective, all from the same inputs: rows, labels, memory and both weight logits.

Each takes a :class:`Case` and returns the loss with its gradients in ``case.features.grad`` and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from pixcontrast.functional import positive_contrast


@dataclass
class Case:
    """Inputs of one measurement."""

    features: Tensor  # [P, D]
    labels: Tensor  # [P] int64, every one a class
    queue: Tensor  # [C, N, D]
    weights: Tensor  # [P]
    queue_weights: Tensor | None  # [C, N], or None: all rows weigh the same, as in the released code

    @staticmethod
    def random(pixels: int, dim: int, classes: int, rows: int, weighted_rows: bool = True) -> Case:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        return Case(
            normal(pixels, dim).requires_grad_(),
            torch.randint(0, classes, (pixels,), generator=generator),
            normalize(normal(classes, rows, dim), dim=-1),
            normal(pixels).requires_grad_(),
            normal(classes, rows).requires_grad_() if weighted_rows else None,
        )

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype, with fresh gradients."""
        features, queue, weights = (t.detach().to(dtype) for t in (self.features, self.queue, self.weights))
        queue_weights = None if self.queue_weights is None else self.queue_weights.detach().to(dtype).requires_grad_()
        return Case(features.requires_grad_(), self.labels, queue, weights.requires_grad_(), queue_weights)

    def step(self, loss: Callable[[Case], Tensor]) -> tuple[Tensor, ...]:
        """Loss and gradients of features, weights and, if there are any, queue weights."""
        leaves = [leaf for leaf in (self.features, self.weights, self.queue_weights) if leaf is not None]
        for leaf in leaves:
            leaf.grad = None
        value = loss(self)
        value.backward()
        return value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


def extension(case: Case) -> Tensor:
    """The compiled operators of this project."""
    return positive_contrast(
        case.features, case.labels, case.queue, weights=case.weights, queue_weights=case.queue_weights,
        backend="extension",
    ).loss  # fmt: skip


def reference(case: Case) -> Tensor:
    """The readable PyTorch of this project."""
    return positive_contrast(
        case.features, case.labels, case.queue, weights=case.weights, queue_weights=case.queue_weights,
        backend="reference",
    ).loss  # fmt: skip


def masked_pairs(case: Case) -> Tensor:
    """The formula as it stands: for each class a masked copy of its rows, and all pairs of rows and memory."""
    classes = case.queue.shape[0]
    loss = case.features.new_zeros(())
    for c in range(classes):
        mask = case.labels == c
        rows, memory = case.features[mask], case.queue[c]
        if len(rows) < 2 or len(memory) < 2:
            continue
        w = torch.sigmoid(case.weights[mask])
        pairs = (1 - normalize(rows, dim=1) @ normalize(memory, dim=1).t()) * (len(rows) * w / w.sum())[:, None]
        if case.queue_weights is not None:
            v = torch.sigmoid(case.queue_weights[c])
            pairs = pairs * (len(memory) * v / v.sum())[None, :]
        loss = loss + pairs.mean()
    return loss / classes


class _OneHot(torch.autograd.Function):
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
        class_loss = (w * (1 - cosine)) @ one_hot
        sums = one_hot.t() @ (features * (w / norm)[:, None]) if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(features, labels, memory, s, t, w, v, norm, mean, cosine, class_loss, sums)
        return class_loss.sum() / classes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        features, labels, memory, s, t, w, v, norm, mean, cosine, class_loss, sums = ctx.saved_tensors
        scale = grad / memory.shape[0]
        towards = -scale * w / norm
        d_features = torch.addcmul(mean[labels] * towards[:, None], features, (-towards * cosine / norm)[:, None])
        d_a = scale * w * (1 - s) * (1 - cosine - class_loss[labels])
        if sums is None:
            return d_features, None, None, d_a, None
        of_rows = torch.bmm(memory, sums[:, :, None])[:, :, 0]
        d_b = -scale * v * (1 - t) * (of_rows - (sums * mean).sum(1, keepdim=True))
        return d_features, None, None, d_a, d_b


def one_hot(case: Case) -> Tensor:
    """The best eager PyTorch known."""
    return _OneHot.apply(case.features, case.labels, case.queue, case.weights, case.queue_weights)


def _index_add(features: Tensor, labels: Tensor, queue: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    classes = queue.shape[0]
    s = torch.sigmoid(a)
    t = queue.new_ones(queue.shape[:2]) if b is None else torch.sigmoid(b)
    w = s / torch.zeros(classes, dtype=s.dtype).index_add(0, labels, s)[labels]
    mean = torch.einsum("cn,cnd->cd", t / t.sum(1, keepdim=True), normalize(queue, dim=2))
    cosine = (normalize(features, dim=1) * mean[labels]).sum(1)
    return (w * (1 - cosine)).sum() / classes


compiled_index_add = torch.compile(_index_add, dynamic=False)


def compiled(case: Case) -> Tensor:
    """The factorised form written for the compiler, under ``torch.compile``."""
    return compiled_index_add(case.features, case.labels, case.queue, case.weights, case.queue_weights)


CONTENDERS: dict[str, Callable[[Case], Tensor]] = {
    "pixcontrast": extension,
    "pixcontrast reference": reference,
    "eager, one-hot matmul": one_hot,
    "torch.compile": compiled,
    "masked, all pairs": masked_pairs,
}
