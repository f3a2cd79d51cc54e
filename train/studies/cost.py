"""Time of the contrast, measured alone, and of the whole training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from train.data.batches import Batch
from train.session import Session, Training
from train.step import pseudo_labels, to_float, training_step


@dataclass(frozen=True)
class ContrastCost:
    """Median seconds.

    Attributes:
        step: the whole training step.
        contrast: filling the memory, and both contrast losses forward and backward, down to the features.
        teacher: the teacher's forward on the labelled images, needed for the memory only.
    """

    step: float
    contrast: float
    teacher: float


def contrast_cost(session: Session, rounds: int = 7) -> ContrastCost:
    """Measure on real batches.

    Args:
        session: of the method ``contrast``, past the step at which the contrast begins. It is trained for
            ``rounds + 1`` more steps, so give one that is no longer needed.
        rounds: measurements, of which the medians are taken, after one round to warm up.
    """
    batches = session.batches()
    times = [_measure(session.training, *next(batches)) for _ in range(rounds + 1)][1:]
    return ContrastCost(*(statistics.median(part) for part in zip(*times, strict=True)))


def _measure(training: Training, labelled: Batch, unlabelled: Batch | None) -> tuple[float, float, float]:
    """Seconds of one step, of its contrast, and of its teacher's forward on the labelled images."""
    branch, teacher = training.learner.branch, training.teacher
    assert branch is not None and unlabelled is not None, "needs the method contrast"
    step = _seconds(lambda: training_step(training, labelled, unlabelled))

    images, labels = to_float(labelled[0]), labelled[1]
    views = to_float(unlabelled[0]).repeat(2, 1, 1, 1)
    with torch.no_grad():
        pseudo, _ = pseudo_labels(teacher, views)
        logits, teacher_features = teacher(images)
        teacher_time = _seconds(lambda: teacher(images))
        features, strong_features = training.learner(images)[1], training.learner(views)[1]
    features.requires_grad_()
    strong_features.requires_grad_()

    def contrast() -> None:
        with teacher.autocast():
            branch.remember(teacher_features, logits, labels, teacher=teacher.branch)
            loss: Tensor = branch(features, labels) + branch(strong_features, pseudo)
        loss.backward()

    return step, _seconds(contrast), teacher_time


def _seconds(work: Callable[[], object]) -> float:
    """Wall time of ``work``, including its asynchronous kernels on a GPU."""
    _synchronize()
    start = time.perf_counter()
    work()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
