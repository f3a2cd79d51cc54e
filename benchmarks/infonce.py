"""InfoNCE of anchors with a queue (Wang et al., ICCV 2021, one denominator for each positive): ways to compute it.

Two libraries are not among them: ``NTXentLoss`` of pytorch-metric-learning computes the same, but on a matrix of all
positive and all negative pairs, 10^15 numbers at the largest size here; Inf-CL has one positive for each anchor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, normalize

from pixcontrast.functional import infonce_contrast
from pixcontrast.select import Anchors

from .problem import (
    Contender,
    Results,
    SettledProblem,
    Step,
    Work,
    capturable,
    forward_and_backward,
    normal,
    random_labels,
)

TEMPERATURE, BASE_TEMPERATURE = 0.07, 0.07  # as in the released configuration with a memory


@dataclass
class InfoNCE(SettledProblem):
    """Unit anchors and a full queue of unit rows."""

    anchors: Tensor  # [R, D]
    labels: Tensor  # [R] int64
    queue: Tensor  # [C, N, D]

    def __post_init__(self) -> None:
        self.dtype = self.anchors.dtype
        self.leaves = {"anchors": self.anchors.requires_grad_()}

    @staticmethod
    def random(
        anchors: int,
        rows: int,
        dim: int = 256,
        classes: int = 19,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> InfoNCE:
        """``rows``: of each class.

        The released code puts zeros in the place of the rows of class 0, and leaves out one positive of each anchor of
        the first classes it counts, class 1 here. So that it computes the same as all others, there are zeros in class
        0 and no anchors of class 1.
        """
        queue = normalize(normal(device, classes, rows, dim), dim=-1)
        queue[0] = 0
        rows_of_anchors = normalize(normal(device, anchors, dim, seed=1), dim=-1)
        labels = random_labels(device, classes, anchors, lowest=2)
        return InfoNCE(rows_of_anchors.to(dtype), labels, queue.to(dtype))

    def work(self) -> Work:
        pairs = self.anchors.shape[0] * self.queue.shape[0] * self.queue.shape[1]
        moved = (self.queue.numel() + 2 * self.anchors.numel()) * self.queue.element_size()
        return Work(bytes=moved, flops=4 * pairs * self.anchors.shape[1], dtype=self.dtype)

    def truth(self) -> Results:
        """In tiles of anchors, for which room in float64 is found."""
        queue, loss = self.queue.double(), 0.0
        gradients: list[Tensor] = []
        for anchors, labels in zip(self.anchors.detach().split(64), self.labels.split(64), strict=True):
            tile = anchors.double().requires_grad_()
            part = pair_loss(tile, labels, queue) * (len(tile) / len(self.anchors))
            gradients += torch.autograd.grad(part, tile)
            loss += part.item()
        return {"loss": torch.tensor(loss, dtype=torch.float64, device=queue.device), "anchors": torch.cat(gradients)}


def pair_loss(anchors: Tensor, labels: Tensor, queue: Tensor) -> Tensor:
    """The formula as it stands, on the matrix of all anchors and keys: ``[R, D]``, ``[R]``, ``[C, N, D]``."""
    classes, rows = queue.shape[:2]
    positive = labels[:, None] == torch.arange(classes, device=labels.device).repeat_interleave(rows)
    z = anchors @ queue.flatten(0, 1).t() / TEMPERATURE
    z = z - z.detach().amax(1, keepdim=True)
    e = torch.exp(z)
    negatives = (e * ~positive).sum(1, keepdim=True)
    log_share = z - torch.log(e + negatives)
    return -(TEMPERATURE / BASE_TEMPERATURE) * ((log_share * positive).sum(1) / positive.sum(1)).mean()


def all_pairs(problem: InfoNCE) -> Tensor:
    """The formula as it stands."""
    return pair_loss(problem.anchors, problem.labels, problem.queue)


def compiled(problem: InfoNCE) -> Step:
    """The formula as it stands, under ``torch.compile``."""
    loss = torch.compile(pair_loss, dynamic=False)
    return forward_and_backward(lambda p: loss(p.anchors, p.labels, p.queue))(problem)


class Streamed(torch.autograd.Function):
    """Class by class, with the gradient from the same products: no number is kept for a pair.

    Rows are unit, so that no logit passes ``1 / TEMPERATURE`` and no running maximum is needed.
    """

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, labels: Tensor, queue: Tensor) -> Tensor:
        rows, bound = anchors.float(), 1 / TEMPERATURE
        total = rows.new_zeros(len(rows), 1)  # sum over negatives of e^(z - bound)
        away = torch.zeros_like(rows)  # and of e^(z - bound) k
        for c, part in enumerate(queue):
            keys = part.float()
            e = (rows @ keys.t()).div_(TEMPERATURE).sub_(bound).exp_().masked_fill_((labels == c)[:, None], 0)
            total += e.sum(1, keepdim=True)
            away.addmm_(e, keys)
        away.div_(total)
        limit = total.log_().add_(bound)
        order = torch.argsort(labels)
        members = torch.bincount(labels, minlength=len(queue)).tolist()
        loss, gradient = rows.new_zeros(()), torch.empty_like(rows)
        for own, part in zip(order.split(members), queue, strict=True):
            keys = part.float()
            margin = limit[own] - (rows[own] @ keys.t()).div_(TEMPERATURE)
            loss -= logsigmoid(-margin).sum()
            share = margin.sigmoid_()
            gradient[own] = away[own] * share.sum(1, keepdim=True) - share @ keys
        pairs = len(rows) * queue.shape[1]
        ctx.save_for_backward(gradient.div_(BASE_TEMPERATURE * pairs).to(anchors.dtype))
        return loss * (TEMPERATURE / BASE_TEMPERATURE / pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None


def streamed(problem: InfoNCE) -> Tensor:
    """The best eager PyTorch known."""
    return Streamed.apply(problem.anchors, problem.labels, problem.queue)


def extension(problem: InfoNCE) -> Tensor:
    """The compiled operator of this project."""
    return _pixcontrast(problem, "extension")


def reference(problem: InfoNCE) -> Tensor:
    """The readable PyTorch of this project."""
    return _pixcontrast(problem, "reference")


def _pixcontrast(problem: InfoNCE, backend: str) -> Tensor:
    everyone = Anchors(torch.arange(len(problem.labels), device=problem.labels.device), problem.labels)
    return infonce_contrast(
        problem.anchors, everyone, [problem.queue], backend=backend,
        temperature=TEMPERATURE, base_temperature=BASE_TEMPERATURE,
    ).loss  # fmt: skip


CONTENDERS: dict[str, Contender] = {
    "pixcontrast": capturable(forward_and_backward(extension)),
    "pixcontrast reference": forward_and_backward(reference),
    "best eager": forward_and_backward(streamed),
    "torch.compile": compiled,
    "formula as it stands": forward_and_backward(all_pairs),
}
