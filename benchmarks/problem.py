"""What is measured: inputs, the step to be timed, and the truth that its result is held against."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Results = dict[str, Tensor]
"""The loss, and the gradient of each leaf by the name of the leaf."""
Step = Callable[[], Results]
Contender = Callable[[Any], Step]
"""Prepares a step for a problem: what it does before it returns the step is not timed."""

# of the largest number of each result: tells a wrong formula from rounding
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1}
TF32_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Work:
    """What no way to solve a problem can do without."""

    bytes: int  # read or written in main memory: inputs once, gradients once
    flops: int
    dtype: torch.dtype  # of the matrix products


class Problem(ABC):
    """Inputs of one measurement.

    Attributes:
        leaves: tensors that want a gradient.
        dtype: of the inputs, which sets the tolerance.
        tf32: whether products of float32 may be rounded to tf32; set by the case.
    """

    leaves: dict[str, Tensor]
    dtype: torch.dtype
    tf32: bool = False

    @abstractmethod
    def work(self) -> Work:
        """The floor of this problem."""

    @abstractmethod
    def error(self, results: Results) -> float:
        """Deviation from float64: the largest, relative to the largest number of each result; infinite for nonsense."""

    def surroundings(self) -> list[tuple[Step, float]]:
        """The rest of a training step: parts of it, and how often each counts in a whole one. Empty: there is none."""
        return []

    def forget_gradients(self) -> None:
        """What an earlier step left in the leaves goes, so that no later one pays for it."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def accepts(self, error: float) -> bool:
        return error <= (TF32_TOLERANCE if self.tf32 else TOLERANCE[self.dtype])


class SettledProblem(Problem):
    """A problem with one right result."""

    @abstractmethod
    def truth(self) -> Results:
        """The result by the formula as it stands, in float64."""

    @functools.cached_property
    def _truth(self) -> Results:
        return self.truth()

    def error(self, results: Results) -> float:
        return deviation(results, self._truth)


def largest(numbers: Tensor) -> Tensor:
    return numbers.abs().max()


def deviation(results: Results, truth: Results, size: Callable[[Tensor], Tensor] = largest) -> float:
    """Size of the difference relative to that of the truth, the worst of all results; infinite where one is missing."""
    worst = 0.0
    for name, true in truth.items():
        if name not in results or results[name].shape != true.shape:
            return float("inf")
        difference = size(results[name].detach().to(true) - true)
        worst = max(worst, float(difference.nan_to_num(float("inf")) / size(true)))
    return worst


def capturable(contender: Contender) -> Contender:
    """Declares that the steps of a contender never wait for the device and have fixed shapes, so that a CUDA graph can
    hold them. Nothing else is ever captured: after a failed capture the process cannot be used any more."""
    contender.capturable = True  # type: ignore[attr-defined]
    return contender


def is_capturable(contender: Contender) -> bool:
    return getattr(contender, "capturable", False)


def forward_and_backward(loss: Callable[[Any], Tensor]) -> Contender:
    """The contender whose step is ``loss(problem)`` and its backward."""

    @functools.wraps(loss)
    def contender(problem: Problem) -> Step:
        return functools.partial(differentiate, loss, problem)

    return contender


def differentiate(loss: Callable[[Any], Tensor], problem: Problem) -> Results:
    """``loss(problem)`` and the gradients of the problem's leaves."""
    problem.forget_gradients()
    value = loss(problem)
    value.backward()
    gradients = {name: leaf.grad for name, leaf in problem.leaves.items() if leaf.grad is not None}
    return {"loss": value.detach(), **gradients}


def normal(device: str, *shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def random_labels(device: str, classes: int, *shape: int, seed: int = 0, lowest: int = 0) -> Tensor:
    """Classes in ``[lowest, classes)``, the same on every device."""
    return torch.randint(lowest, classes, shape, generator=torch.Generator().manual_seed(seed)).to(device)
