"""The contrastive branch of Alonso et al. (ICCV 2021) from the prediction rows on: class selectors, then the loss."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, leaky_relu, linear, normalize

from pixcontrast import ContrastBranch, PixelContrastLoss
from pixcontrast.ops.class_order import class_order

from . import positive
from .problem import (
    Contender,
    Results,
    SettledProblem,
    Work,
    capturable,
    differentiate,
    forward_and_backward,
    normal,
    random_labels,
)

# without the biases: bias1 cancels in the batch statistics and bias2 almost in the weights, so that their gradients are
# rounding noise
PARAMETERS = ("weight1", "norm_weight", "norm_bias", "weight2")


@dataclass
class Selectors(SettledProblem):
    """Prediction rows in class order, a full memory, and the parameters of the selectors of all classes.

    ``autocast``: forward in bfloat16 where PyTorch's autocast does so.
    """

    rows: Tensor  # [P, D]
    labels: Tensor  # [P] int64, every one a class, ascending: so the heads of the branch leave them
    branch: ContrastBranch
    autocast: bool

    def __post_init__(self) -> None:
        self.dtype = torch.bfloat16 if self.autocast else self.rows.dtype
        self.leaves = {"rows": self.rows.requires_grad_()}
        for side in ("features",) if self.released else ("features", "memory"):
            for name in PARAMETERS:
                self.leaves[f"{side}.{name}"] = getattr(self.selectors(side), name)

    @staticmethod
    def random(
        pixels: int,
        dim: int = 256,
        classes: int = 19,
        capacity: int = 256,
        variant: str = "released",
        autocast: bool = False,
        device: str = "cpu",
    ) -> Selectors:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            branch = ContrastBranch(dim, classes, dim=dim, capacity=capacity, variant=variant).to(device)
        branch.memory.rows.copy_(normalize(normal(device, classes, capacity, dim), dim=-1))
        branch.memory.counts.fill_(capacity)
        labels = random_labels(device, classes, pixels).sort().values
        # a seed with which no hidden value is so near to the kink of LeakyReLU that rounding takes it to the other side
        return Selectors(normal(device, pixels, dim, seed=4), labels, branch, autocast)

    @property
    def released(self) -> bool:
        return self.branch.variant == "released"

    @property
    def memory(self) -> Tensor:
        """``[C, N, D]``"""
        return self.branch.memory.rows

    def selectors(self, side: str) -> torch.nn.Module:
        return self.branch.select_features if side == "features" else self.branch.select_memory

    def work(self) -> Work:
        rows, width = self.rows.shape
        rows += 0 if self.released else self.memory[..., 0].numel()
        moved = 4 * (2 * self.rows.numel() + self.memory.numel() + 2 * len(self.memory) * width * width)
        # forward, and the gradient of the weights: the selectors' input is detached
        return Work(bytes=moved, flops=2 * 2 * rows * width * width, dtype=self.dtype)

    def truth(self) -> Results:
        branch = copy.deepcopy(self.branch).double()
        return differentiate(all_pairs, Selectors(self.rows.detach().double(), self.labels, branch, False))

    def in_autocast(self, loss: Callable[[Selectors], Tensor]) -> Tensor:
        """``loss(self)`` under autocast, if this problem says so."""
        device = self.rows.device.type
        with torch.autocast(device, torch.bfloat16) if self.autocast else contextlib.nullcontext():
            return loss(self)


def class_selectors(module: torch.nn.Module) -> Callable[[Tensor, int], Tensor]:
    """The selectors as one small network a class: ``(rows [M, D], c)`` to logits ``[M]``."""
    names = ("weight1", "bias1", "norm_weight", "norm_bias", "weight2", "bias2")
    parts = list(zip(*(getattr(module, name).unbind() for name in names), strict=True))

    def logits(rows: Tensor, c: int) -> Tensor:
        weight1, bias1, norm_weight, norm_bias, weight2, bias2 = parts[c]
        hidden = batch_norm(linear(rows, weight1, bias1), None, None, norm_weight, norm_bias, training=True)
        return linear(leaky_relu(hidden, 0.2), weight2[None], bias2[None])[:, 0]

    return logits


def all_pairs(problem: Selectors) -> Tensor:
    """The formula as it stands: class by class, masked copies, selectors, all pairs of rows and memory."""
    weigh, weigh_memory = (class_selectors(problem.selectors(side)) for side in ("features", "memory"))
    loss = problem.rows.new_zeros(())
    for c, memory in enumerate(problem.memory):
        rows = problem.rows[problem.labels == c]
        if len(rows) < 2:
            continue
        weight_logits = weigh(problem.branch.selector_input(rows.detach()), c)
        queue_weight_logits = None if problem.released else weigh_memory(memory, c).to(rows.dtype)
        loss = loss + positive.class_pairs(rows, memory, weight_logits.to(rows.dtype), queue_weight_logits)
    return loss / len(problem.memory)


def sorted_classes(problem: Selectors) -> Tensor:
    """Good eager PyTorch: rows sorted once, the selectors class by class, then the factorised loss."""
    weigh, weigh_memory = (class_selectors(problem.selectors(side)) for side in ("features", "memory"))
    order = torch.argsort(problem.labels)
    members = torch.bincount(problem.labels, minlength=len(problem.memory)).tolist()
    inputs = problem.branch.selector_input(problem.rows.detach())[order].split(members)
    logits = torch.cat([weigh(part, c) for c, part in enumerate(inputs)]).float()
    weight_logits = torch.zeros_like(logits).scatter(0, order, logits)
    queue_weight_logits = None
    if not problem.released:
        queue_weight_logits = torch.stack([weigh_memory(part, c) for c, part in enumerate(problem.memory)]).float()
    with torch.autocast(problem.rows.device.type, enabled=False):
        return positive.OneHot.apply(problem.rows, problem.labels, problem.memory, weight_logits, queue_weight_logits)


def pixcontrast(backend: str) -> Contender:
    """What :class:`pixcontrast.ContrastBranch` does with its prediction rows."""
    criterion = PixelContrastLoss(objective="positive", ignore_index=255, backend=backend)

    def loss(problem: Selectors) -> Tensor:
        branch = problem.branch
        use_backend(branch, backend)
        segments = class_order(problem.labels, len(problem.memory), backend)
        inputs = branch.selector_input(problem.rows.detach())
        weight_logits = branch.select_features(inputs, segments.start, segments.count)
        queue_weight_logits = None if problem.released else branch.memory_weight_logits()
        return criterion(
            problem.rows,
            problem.labels,
            queue=branch.memory,
            weight_logits=weight_logits,
            queue_weight_logits=queue_weight_logits,
        )

    return _contender(loss)


def use_backend(branch: ContrastBranch, backend: str) -> None:
    """Run all of ``branch`` on this backend."""
    for module in branch.modules():
        if hasattr(module, "backend"):
            setattr(module, "backend", backend)  # noqa: B010 - modules have no such attribute by type


def _contender(loss: Callable[[Selectors], Tensor]) -> Contender:
    return forward_and_backward(lambda problem: problem.in_autocast(loss))


CONTENDERS: dict[str, Contender] = {
    "pixcontrast": capturable(pixcontrast("extension")),
    "pixcontrast reference": pixcontrast("reference"),
    "best eager": _contender(sorted_classes),
    "formula as it stands": _contender(all_pairs),
}
