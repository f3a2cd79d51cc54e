"""Our training step beside the authors' training loop on one small problem, and the differences after each step.

Everything is computed in float64 (``.float()`` too gives float64), so that rounding stays far below what a difference
in the method makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pixcontrast.compat.semiseg import MemoryRows
from train.augment import AugmentConfig, augment
from train.errors import UserError
from train.paper.released import our_tensor
from train.paper.rows import Row, find_row
from train.paper.small_problem import Problem, fill, our_training, same_arithmetic
from train.paper.their_loop import TheirCode, TheirStep
from train.scores import markdown_table
from train.session import Training
from train.step import training_step

LIMIT = 1e-8
"""A larger relative difference is no rounding."""
STEPS = (0, 1, 2, 1000, 1001, 1999, 2000, *range(2001, 2021))
"""The first steps, those in which memory, full pseudo-labels and contrast begin, and 20 with the contrast."""
LAST_STEPS = range(149_899, 149_905)
"""Steps of the domain adaptation in which the first images of the source are used."""


@dataclass(frozen=True)
class CompareConfig:
    """Take the same steps with the authors' training loop and with ours, and print the largest differences."""

    semiseg: Path
    """Checkout of https://github.com/Shathe/SemiSeg-Contrastive; its code is imported and runs."""
    rows: tuple[str, ...] = ("cityscapes/dv2-imagenet/1-30", "voc/dv2-coco/1-50", "gta5/dv2-imagenet/1-30")
    """Rows of the paper's tables whose settings are compared; see the command rows."""


def compare(config: CompareConfig) -> str:
    """The table of differences.

    Raises:
        UserError: no such checkout or row, or a difference beyond rounding.
    """
    found = {name: compare_row(config.semiseg, find_row(name)) for name in config.rows}
    table = [["largest relative difference", *(f"`{name}`" for name in found)]]
    for quantity in sorted({quantity for comparison in found.values() for quantity in comparison.largest}):
        table.append([quantity, *(f"{c.largest.get(quantity, (0.0, 0))[0]:.0e}" for c in found.values())])
    text = markdown_table(table)
    if beyond := [f"{name}: {comparison.beyond}" for name, comparison in found.items() if comparison.beyond]:
        print(text)
        raise UserError(f"ours differs from the authors' code by more than rounding: {'; '.join(beyond)}")
    return text


def compare_row(
    folder: Path, row: Row, steps: Sequence[int] | None = None, change: Callable[[Training], object] = id
) -> Comparison:
    """Take the same steps with both.

    Args:
        folder: checkout of their code.
        steps: their numbers.
        change: of our training before the first step.

    Raises:
        UserError: not a checkout of their code.
    """
    steps = (*STEPS, *(LAST_STEPS if row.adapts else ())) if steps is None else steps
    with TheirCode(folder, row) as code, same_arithmetic():
        problem = Problem(steps, {})
        training = our_training(row, problem, code.config["ignore_label"])
        fill(problem, training)
        tensors = training.learner.state_dict()
        names = (name for name in code.build(problem.classes).state_dict() if "num_batches" not in name)
        weights = {name: tensor.clone() for name in names if (tensor := our_tensor(tensors, name)) is not None}
        change(training)
        comparison = Comparison(training, problem)
        code.run(problem, weights, comparison.after)
    return comparison


class Comparison:
    """Our training, which takes each step after theirs, and the largest differences so far with their steps."""

    def __init__(self, training: Training, problem: Problem) -> None:
        self.training, self.problem, self.view = training, problem, 0
        self.largest: dict[str, tuple[float, int]] = {}
        self.streams = {name: stream() for name, stream in problem.streams.items()}

    @property
    def beyond(self) -> str:
        """Every quantity that differs by more than rounding; empty if there is none."""
        items = self.largest.items()
        return ", ".join(f"{name} {size:.0e} (step {step})" for name, (size, step) in items if not size <= LIMIT)

    def after(self, theirs: TheirStep) -> None:
        """Take the step that they have taken, and compare."""
        t, step = self.training, theirs.step
        if step != t.step:  # else the step before has set the rate
            t.step = t.schedule.last_epoch = step
            rates = t.schedule._get_closed_form_lr()  # type: ignore[attr-defined]
            for group, rate in zip(t.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        self.note("learning rate", step, t.optimizer.param_groups[0]["lr"] - theirs.lr, theirs.lr)
        self.view, source = 0, "source" if t.from_source(step) else "labelled"
        torch.manual_seed(step)
        with mock.patch("train.step.augment", self.augment), mock.patch("train.step.draw"):  # one stream, as theirs
            losses = training_step(t, next(self.streams[source]), next(self.streams["unlabelled"]))
        for name in (losses.keys() | theirs.losses.keys()) - {"total"}:
            term = theirs.losses.get(name, 0.0)
            self.note(f"loss {name}", step, float(losses.get(name, 0.0)) - term, abs(term))
        for name, learner, model in (("student", t.learner, theirs.student), ("teacher", t.teacher, theirs.teacher)):
            ours, other = dict(learner.named_parameters()), dict(model.named_parameters())
            if name == "student":
                self.note_tensors("gradients", step, *({k: p.grad for k, p in ps.items()} for ps in (ours, other)))
            self.note_tensors(name, step, ours, other)
            self.note_tensors(f"BatchNorm of {name}", step, *(dict(m.named_buffers()) for m in (learner, model)))
        assert t.learner.branch is not None
        for own, rows in zip(MemoryRows(t.learner.branch.memory), theirs.memory, strict=True):
            same_size = own is not None and rows is not None and len(own) == len(rows)
            unit = normalize(torch.from_numpy(rows), dim=1).numpy() if same_size else None  # ours are normalised
            apart = float(own is not rows) if unit is None else float(abs(own - unit).max())
            self.note("memory", step, apart, 1.0)

    def note(self, quantity: str, step: int, difference: float, size: float) -> None:
        """Keep the largest ``|difference| / size`` of each quantity."""
        relative = 0.0 if difference == 0 else abs(difference) / size if size else float("inf")
        largest = self.largest.get(quantity, (-1.0, 0))[0]
        if relative > largest or relative != relative:  # NaN stays
            self.largest[quantity] = (relative, step)

    def note_tensors(self, name: str, step: int, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
        """Differences relative to the largest element of a tensor, or to 1/1000 of that of all where that is more.

        The selectors of the memory are left out: in their code the output cancels, and ours does not run them.
        """
        found: dict[str, list[tuple[float, float]]] = {}
        for tensor_name, tensor in theirs.items():
            own = our_tensor(ours, tensor_name)
            if "selector_memory" in tensor_name or "num_batches" in tensor_name or own is tensor is None:
                continue
            own, tensor = (torch.zeros(()) if x is None else x.detach() for x in (own, tensor))
            sizes = float((own - tensor).abs().max()), float(tensor.abs().max())
            found.setdefault(f"{name}, selectors" if "selector" in tensor_name else name, []).append(sizes)
        for quantity, pairs in found.items():
            floor = max(size for _, size in pairs) / 1000
            for difference, size in pairs:
                self.note(quantity, step, difference, max(size, floor))

    def augment(self, images: Tensor, labels: Tensor, confidence: Tensor | None, config: AugmentConfig, **options: Any):
        """ClassMix of our augmentation, with the coin and the order of classes that theirs has."""
        step, coin = self.training.step, self.problem.coin(self.training.step, self.view)
        keys = torch.linspace(0.1, 0.9, self.problem.classes + 1)
        ascending = [self.problem.ascending(step, self.view, image) for image in range(len(images))]
        drawn = torch.stack([keys if first else keys.flip(0) for first in ascending])
        self.view += 1
        config = replace(config, flip=0.0, scale=0.0, jitter=0.0, blur=0.0)
        with mock.patch("train.augment._coin", lambda share: coin < share), mock.patch("torch.rand", lambda *_: drawn):
            return augment(images, labels, confidence, config, **options)
