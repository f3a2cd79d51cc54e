"""Our training step beside the authors' training loop, step by step, on the same small problem.

Everything is computed in float64, so that rounding stays far below what any difference in the method makes: ``.float()``
gives float64 in both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import train.step
from pixcontrast.compat.semiseg import MemoryRows
from train.augment import AugmentConfig, augment
from train.config import FitConfig
from train.data.batches import Batch
from train.errors import UserError
from train.networks.backbone import Backbone
from train.networks.base import resize
from train.networks.weights import our_name
from train.paper.rows import Row, find_row
from train.paper.their_loop import REPOSITORY, Problem, TheirCode, TheirStep
from train.paper.variants import variant_config
from train.scores import markdown_table
from train.session import Training, build_training
from train.step import training_step

LIMIT = 1e-8
"""Largest relative difference that counts as rounding."""
STEPS = (0, 1, 2, 999, 1000, 1001, 1002, 1999, *range(2000, 2021))
"""The first steps, those in which the memory and the contrast begin, and 20 with the contrast."""
LAST_STEPS = range(149_899, 149_905)
"""The first source images, in domain adaptation."""
DEFAULT_ROWS = (
    "cityscapes/dv2-imagenet/1-30",
    "cityscapes/dv2-coco/1-30",
    "voc/dv3plus-imagenet/1-50",
    "gta5/dv2-imagenet/1-30",
)
PARTS = {
    "projection_head.0": "project.first",
    "projection_head.1": "project.norm",
    "projection_head.3": "project.last",
    "prediction_head.0": "predict.first",
    "prediction_head.1": "predict.norm",
    "prediction_head.3": "predict.last",
}
SELECTOR_PARTS = {"0.weight": "weight1", "0.bias": "bias1", "1.weight": "norm_weight", "1.bias": "norm_bias"}
SELECTOR_PARTS |= {"1.running_mean": "running_mean", "1.running_var": "running_var"}
SELECTOR_PARTS |= {"3.weight": "weight2", "3.bias": "bias2"}


@dataclass(frozen=True)
class CompareConfig:
    """Run the authors' training loop beside ours and print the largest differences."""

    semiseg: Path
    """Checkout of the authors' code, which is imported and runs: git clone https://github.com/Shathe/SemiSeg-Contrastive"""
    rows: tuple[str, ...] = DEFAULT_ROWS
    """Rows of the paper whose settings are compared, see the command rows."""


@dataclass
class Differences:
    """Largest relative difference of each quantity and the step of it."""

    largest: dict[str, tuple[float, int]] = field(default_factory=dict)

    def note(self, quantity: str, step: int, difference: float) -> None:
        if not difference <= self.largest.get(quantity, (-1.0, 0))[0]:  # NaN is the largest
            self.largest[quantity] = (difference, step)

    def note_all(self, quantity: str, step: int, pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Differences of tensors relative to the largest element of each, or to 1/1000 of that of all."""
        sizes = [(float((a - b).abs().max()), float(b.abs().max())) for a, b in pairs]
        floor = max((size for _, size in sizes), default=0.0) / 1000
        for error, size in sizes:
            self.note(quantity, step, error / max(size, floor) if error else 0.0)

    @property
    def beyond(self) -> list[str]:
        """Quantities that differ by more than rounding."""
        return [name for name, (difference, _) in self.largest.items() if not difference <= LIMIT]


def our_tensor(tensors: dict[str, Tensor], name: str) -> Tensor | None:
    """The tensor of ours that is ``name`` in their network; None if there is none.

    Args:
        tensors: of a learner, by our names.
    """
    module, _, rest = name.partition(".")
    if module.startswith("contrastive_class_selector_"):
        kind, index = module.removeprefix("contrastive_class_selector_"), 0
        selector = "select_memory" if kind.startswith("memory") else "select_features"
        index = int(kind.removeprefix("memory"))
        stacked = tensors.get(f"branch.{selector}.{SELECTOR_PARTS.get(rest, '')}")
        if stacked is None or index >= len(stacked):
            return None
        return stacked[index][None] if rest == "3.weight" or rest == "3.bias" else stacked[index]
    head, _, leaf = name.rpartition(".")
    return tensors.get(f"branch.{PARTS[head]}.{leaf}" if head in PARTS else f"network.{our_name(name)}")


class Comparison:
    """Our training, which takes each step after theirs, and the differences so far."""

    def __init__(self, training: Training, problem: Problem) -> None:
        self.training, self.problem, self.differences = training, problem, Differences()
        self.streams = {name: stream() for name, stream in problem.streams.items()}
        self.view = 0

    def after(self, theirs: TheirStep) -> None:
        """Take the step that they have taken, and compare."""
        t, step = self.training, theirs.step
        if step != t.step:  # the rate of a step is set at the end of the one before
            t.step = t.schedule.last_epoch = step
            for group, rate in zip(t.optimizer.param_groups, t.schedule._get_closed_form_lr(), strict=True):  # type: ignore[attr-defined]
                group["lr"] = rate
        lr, self.view = t.optimizer.param_groups[0]["lr"], 0
        source = "source" if t.from_source(step) else "labelled"
        torch.manual_seed(step)
        with mock.patch("train.step.augment", self.augment):
            losses = training_step(t, next(self.streams[source]), next(self.streams["unlabelled"]))
        note = self.differences.note
        note("learning rate", step, abs(lr / theirs.lr - 1))
        for name in losses.keys() | theirs.losses.keys():
            ours, other = float(losses.get(name, 0.0)), theirs.losses.get(name, 0.0)
            if name != "total":
                note(f"loss: {name}", step, abs(ours - other) / (abs(other) or 1.0))
        assert t.learner.branch is not None
        for ours, other in zip(MemoryRows(t.learner.branch.memory), theirs.memory, strict=True):
            self.note_memory(step, ours, other)
        for name, learner, model in (("student", t.learner, theirs.student), ("teacher", t.teacher, theirs.teacher)):
            ours, other = dict(learner.named_parameters()), dict(model.named_parameters())
            self.note_tensors(name, step, ours, other)
            self.note_tensors(f"{name}: BatchNorm", step, dict(learner.named_buffers()), dict(model.named_buffers()))
            if name == "student":
                gradients = ({k: p.grad for k, p in ps.items() if p.grad is not None} for ps in (ours, other))
                self.note_tensors("gradients", step, *gradients)

    def note_tensors(self, quantity: str, step: int, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, tensor in theirs.items():
            if not name.endswith("num_batches_tracked"):
                own = our_tensor(ours, name)
                part = ": selectors of the memory" if "selector_memory" in name else ": selectors" if "selector" in name else ""
                pairs.setdefault(quantity + part, []).append((torch.zeros_like(tensor) if own is None else own, tensor))
        for name, found in pairs.items():
            self.differences.note_all(name, step, found)

    def note_memory(self, step: int, ours: Any, theirs: Any) -> None:
        if ours is None or theirs is None or len(ours) != len(theirs):
            self.differences.note("memory", step, float(not (ours is theirs is None)))
        else:
            unit = torch.nn.functional.normalize(torch.from_numpy(theirs), dim=1)
            self.differences.note("memory", step, float((torch.from_numpy(ours) - unit).abs().max()))

    def augment(self, images: Tensor, labels: Tensor, confidence: Tensor | None, config: AugmentConfig, **options: Any) -> Any:
        """Our augmentation without all but ClassMix, which picks what theirs picks."""
        coin = self.problem.coin(self.training.step, self.view)
        keys = torch.linspace(0.1, 0.9, self.problem.classes + 1).repeat(len(images), 1)
        for image, row in enumerate(keys):
            if not self.problem.ascending(self.training.step, self.view, image):
                keys[image] = row.flip(0)
        self.view += 1
        plain = replace(config, flip=0.0, scale=0.0, jitter=0.0, blur=0.0)
        with mock.patch("train.augment._coin", lambda share: coin < share), mock.patch("torch.rand", lambda *_: keys):
            return augment(images, labels, confidence, plain, **options)


def compare_row(
    folder: Path, row: Row, steps: Sequence[int] | None = None, change: Callable[[Training], object] = id
) -> Differences:
    """Take the same steps in both loops.

    Args:
        folder: checkout of their code.
        steps: numbers of the steps.
        change: of our training before the first step.

    Raises:
        UserError: not a checkout of their code.
    """
    steps = (*STEPS, *(LAST_STEPS if row.adapts else ())) if steps is None else steps
    with TheirCode(folder, row) as code, same_arithmetic():
        training = our_training(row, code.config["ignore_label"])
        problem = make_problem(training, steps)
        tensors = dict(training.learner.state_dict())
        names = [name for name in code.build(CLASSES).state_dict() if not name.endswith("num_batches_tracked")]
        weights = {name: our_tensor(tensors, name) for name in names}
        if lacking := [name for name, tensor in weights.items() if tensor is None]:
            raise UserError(f"--semiseg {folder}: ours has no {', '.join(lacking[:3])}: give a checkout of {REPOSITORY}")
        change(training)
        comparison = Comparison(training, problem)
        code.run(problem, {name: tensor.clone() for name, tensor in weights.items() if tensor is not None}, comparison.after)
    return comparison.differences


CLASSES, LABELLED, TOTAL, BATCH, SIZE = 5, 40, 52, 4, 64


def our_training(row: Row, ignore_index: int) -> Training:
    """Our training at step 0 in float64: networks of one block a stage, with confident and varied predictions."""
    config = variant_config(row, "released")
    config = replace(
        config,
        data=replace(config.data, labelled_batch=BATCH, unlabelled_batch=BATCH // 2),
        model=replace(config.model, pretrained=False),
    )
    if row.adapts:
        config = replace(config, data=replace(config.data, source_root=Path("gta5")))
    with ExitStack() as stack:
        for name in ("deeplab_v2", "deeplab_v3plus"):
            small = lambda _, *options: Backbone((1, 1, 1, 1), *options)  # noqa: E731
            stack.enter_context(mock.patch(f"train.networks.{name}.Backbone", small))
        t = build_training(config, CLASSES, ignore_index, LABELLED, TOTAL - LABELLED)
    t.learner.double()
    with torch.no_grad():
        for parameter in t.learner.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        logits = copy.deepcopy(t.learner)(torch.rand(BATCH, 3, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3))[0]
        for name, parameter in t.learner.network.classifier.named_parameters():
            parameter *= 6 / logits.std((0, 2, 3)).mean()
            if name in ("bias", "convs.0.bias"):
                parameter -= logits.mean((0, 2, 3)) * 6 / logits.std((0, 2, 3)).mean()
    t.teacher.double().load_state_dict(t.learner.state_dict())
    return t


def make_problem(t: Training, steps: Sequence[int]) -> Problem:
    """Images of coloured squares; the labels are what the network says at first, with noise and an ignored border."""
    def batch(size: int) -> Batch:
        images = (256 * torch.rand(size, 3, 8, 8)).to(torch.uint8).repeat_interleave(SIZE // 8, 2).repeat_interleave(SIZE // 8, 3)
        with torch.no_grad():
            logits = copy.deepcopy(t.learner)(images.double() / 255)[0]
        labels = resize(logits, images.shape[-2:]).argmax(1)
        noise = (torch.rand(size, SIZE // 4, SIZE // 4) < 0.2).repeat_interleave(4, 1).repeat_interleave(4, 2)
        labels = torch.where(noise, torch.randint_like(labels, CLASSES), labels)
        labels[:, :3] = t.ignore_index
        return images, labels

    batches = {name: [batch(size) for _ in range(7)] for name, size in (("labelled", BATCH), ("source", BATCH), ("unlabelled", BATCH // 2))}
    return Problem(CLASSES, LABELLED, TOTAL, BATCH, SIZE, steps, {name: partial(cycle, found) for name, found in batches.items()})


def same_arithmetic() -> ExitStack:
    """Float64 wherever a dtype is not named or is float32, and dropout with masks that depend on the shape alone."""
    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * (torch.rand(x.shape) >= p) / (1 - p) if training and p > 0 else x

    stack, dtype = ExitStack(), torch.get_default_dtype()
    stack.enter_context(torch.random.fork_rng())
    stack.callback(torch.set_default_dtype, dtype)
    torch.set_default_dtype(torch.float64)
    stack.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
    stack.enter_context(mock.patch("torch.nn.functional.dropout", dropout))
    return stack
