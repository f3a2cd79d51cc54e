"""Our training step beside the authors' training loop on the same small problem, and the differences after each step.

Everything is computed in float64 (``.float()`` too gives float64), so that rounding stays far below what a difference
in the method makes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pixcontrast.compat.semiseg import MemoryRows
from train.augment import AugmentConfig, augment
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
"""Larger relative differences are no rounding: that reaches 1e-10 here, and a changed constant makes 1e-5 or more."""
STEPS = (0, 1, 2, 1000, 1001, 1999, 2000, *range(2001, 2021))
"""The first steps, those in which ramp, memory and contrast begin, and 20 with the contrast."""
LAST_STEPS = range(149_899, 149_905)
"""Steps of the domain adaptation in which the first images of the source are used."""
CLASSES, LABELLED, TOTAL, MEMORY_ROWS, BATCH, SIZE = 5, 32, 44, 64, 4, 48
"""So small that within :data:`STEPS` quotas are exceeded, the memory overflows, and classes are weighed."""
SHARPNESS = 12.0
"""Spread of the initial logits: with this, the teacher is confident enough for the memory."""
HEADS = {
    **{f"{head}ion_head.0": f"{head}.first" for head in ("project", "predict")},
    **{f"{head}ion_head.1": f"{head}.norm" for head in ("project", "predict")},
    **{f"{head}ion_head.3": f"{head}.last" for head in ("project", "predict")},
}
SELECTORS = {
    "0.weight": "weight1",
    "0.bias": "bias1",
    "1.weight": "norm_weight",
    "1.bias": "norm_bias",
    "1.running_mean": "running_mean",
    "1.running_var": "running_var",
    "3.weight": "weight2",
    "3.bias": "bias2",
}
"""Modules and tensors of their heads and attention networks under our names."""


@dataclass(frozen=True)
class CompareConfig:
    """Take the same steps with the authors' training loop and with ours, and print the largest differences."""

    semiseg: Path
    """Checkout of https://github.com/Shathe/SemiSeg-Contrastive, whose code is imported and runs."""
    rows: tuple[str, ...] = ("cityscapes/dv2-imagenet/1-30", "voc/dv2-coco/1-50", "gta5/dv2-imagenet/1-30")
    """Rows of the paper's tables (see the command rows) whose settings are compared."""


def compare(config: CompareConfig) -> str:
    """The table of differences.

    Raises:
        UserError: no such checkout or row, or a difference beyond rounding.
    """
    found = {name: compare_row(config.semiseg, find_row(name)).largest for name in config.rows}
    table = [["largest relative difference", *(f"`{name}`" for name in found)]]
    for quantity in sorted({quantity for largest in found.values() for quantity in largest}):
        table.append([quantity, *(f"{largest.get(quantity, (0.0, 0))[0]:.0e}" for largest in found.values())])
    text = markdown_table(table)
    beyond = [
        f"{quantity} of {name} by {difference:.0e} in step {step}"
        for name, largest in found.items()
        for quantity, (difference, step) in largest.items()
        if not difference <= LIMIT
    ]
    if beyond:
        print(text)
        raise UserError(f"ours differs from the authors' code: {'; '.join(beyond)}")
    return text


def our_tensor(tensors: dict[str, Tensor], name: str) -> Tensor | None:
    """The tensor of ours that is ``name`` in their network; None if there is none.

    Args:
        tensors: of a learner, by our names.
    """
    module, _, leaf = name.partition(".")
    if module.startswith("contrastive_class_selector_"):
        which = module.removeprefix("contrastive_class_selector_")
        stack = "select_memory" if which.startswith("memory") else "select_features"
        stacked = tensors.get(f"branch.{stack}.{SELECTORS.get(leaf)}")
        own = None if stacked is None else stacked[int(which.removeprefix("memory"))]
        return own if own is None or not leaf.startswith("3.") else own[None]
    head, _, leaf = name.rpartition(".")
    return tensors.get(f"branch.{HEADS[head]}.{leaf}" if head in HEADS else f"network.{our_name(name)}")


class Comparison:
    """Our training, which takes each step after theirs, and the differences so far."""

    def __init__(self, training: Training, problem: Problem) -> None:
        self.training, self.problem, self.view = training, problem, 0
        self.largest: dict[str, tuple[float, int]] = {}
        self.streams = {name: stream() for name, stream in problem.streams.items()}

    def after(self, theirs: TheirStep) -> None:
        """Take the step that they have taken, and compare."""
        t, step = self.training, theirs.step
        if step != t.step:  # the rate of a step is set at the end of the one before
            t.step = t.schedule.last_epoch = step
            for group, rate in zip(t.optimizer.param_groups, t.schedule._get_closed_form_lr(), strict=True):  # type: ignore[attr-defined]
                group["lr"] = rate
        self.view = 0
        self.note("learning rate", step, t.optimizer.param_groups[0]["lr"] - theirs.lr, theirs.lr)
        source = "source" if t.from_source(step) else "labelled"
        torch.manual_seed(step)
        with mock.patch("train.step.augment", self.augment):
            losses = training_step(t, next(self.streams[source]), next(self.streams["unlabelled"]))
        for name in (losses.keys() | theirs.losses.keys()) - {"total"}:
            other = theirs.losses.get(name, 0.0)
            self.note(f"loss {name}", step, float(losses.get(name, 0.0)) - other, abs(other))
        for name, learner, model in (("student", t.learner, theirs.student), ("teacher", t.teacher, theirs.teacher)):
            ours, other = dict(learner.named_parameters()), dict(model.named_parameters())
            if name == "student":
                self.note_tensors("gradients", step, *({k: p.grad for k, p in ps.items()} for ps in (ours, other)))
            self.note_tensors(name, step, ours, other)
            self.note_tensors(f"{name}'s BatchNorm", step, dict(learner.named_buffers()), dict(model.named_buffers()))
        assert t.learner.branch is not None
        for own, rows in zip(MemoryRows(t.learner.branch.memory), theirs.memory, strict=True):
            if own is None or rows is None or len(own) != len(rows):
                self.note("memory", step, float(not (own is None and rows is None)), 1.0)
            else:  # ours are normalised
                unit = normalize(torch.from_numpy(rows), dim=1)
                self.note("memory", step, float((torch.from_numpy(own) - unit).abs().max()), 1.0)

    def note(self, quantity: str, step: int, difference: float, size: float) -> None:
        """Keep the largest ``|difference| / size`` of each quantity."""
        relative = abs(difference) / size if difference else 0.0
        if not relative <= self.largest.get(quantity, (-1.0, 0))[0]:  # so that NaN is the largest
            self.largest[quantity] = (relative, step)

    def note_tensors(
        self, quantity: str, step: int, ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]
    ) -> None:
        """Differences relative to the largest element of a tensor, or to 1/1000 of the largest of all if that is more.

        The attention networks of the memory are left out: their output cancels in the authors' code, and ours does not
        run them.
        """
        found: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, tensor in theirs.items():
            if "selector_memory" in name or name.endswith("num_batches_tracked"):
                continue
            own = our_tensor({key: value for key, value in ours.items() if value is not None}, name)
            if own is None and tensor is None:
                continue
            part = f"{quantity} of attention" if "selector" in name else quantity
            zero = torch.zeros_like(tensor if own is None else own)
            found.setdefault(part, []).append((zero if own is None else own, zero if tensor is None else tensor))
        for part, pairs in found.items():
            floor = max(float(b.detach().abs().max()) for _, b in pairs) / 1000
            for a, b in pairs:
                difference, size = (x.detach().abs().max() for x in (a - b, b))
                self.note(part, step, float(difference), max(float(size), floor))

    def augment(
        self, images: Tensor, labels: Tensor, confidence: Tensor | None, config: AugmentConfig, **options: Any
    ) -> Any:
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
) -> Comparison:
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
            raise UserError(
                f"--semiseg {folder}: ours has no {', '.join(lacking[:3])}: give a checkout of {REPOSITORY}"
            )
        change(training)
        comparison = Comparison(training, problem)
        code.run(
            problem, {name: tensor.clone() for name, tensor in weights.items() if tensor is not None}, comparison.after
        )
    return comparison


def our_training(row: Row, ignore_index: int) -> Training:
    """Our training at step 0 in float64: networks of one block a stage, with confident and varied predictions."""
    config = variant_config(row, "released")
    config = replace(
        config,
        data=replace(config.data, labelled_batch=BATCH, unlabelled_batch=BATCH // 2),
        model=replace(config.model, pretrained=False),
        method=replace(config.method, memory_rows=MEMORY_ROWS),
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
            parameter *= 12 / logits.std((0, 2, 3)).mean()
            if name in ("bias", "convs.0.bias"):
                parameter -= logits.mean((0, 2, 3)) * 12 / logits.std((0, 2, 3)).mean()
    t.teacher.double().load_state_dict(t.learner.state_dict())
    return t


def make_problem(t: Training, steps: Sequence[int]) -> Problem:
    """Images of coloured squares; the labels are what the network says at first, with noise and an ignored border."""

    def batch(size: int) -> Batch:
        images = (
            (256 * torch.rand(size, 3, 8, 8))
            .to(torch.uint8)
            .repeat_interleave(SIZE // 8, 2)
            .repeat_interleave(SIZE // 8, 3)
        )
        with torch.no_grad():
            logits = copy.deepcopy(t.learner)(images.double() / 255)[0]
        labels = resize(logits, images.shape[-2:]).argmax(1)
        noise = (torch.rand(size, SIZE // 4, SIZE // 4) < 0.2).repeat_interleave(4, 1).repeat_interleave(4, 2)
        labels = torch.where(noise, torch.randint_like(labels, CLASSES), labels)
        labels[:, :3] = t.ignore_index
        return images, labels

    batches = {
        name: [batch(size) for _ in range(7)]
        for name, size in (("labelled", BATCH), ("source", BATCH), ("unlabelled", BATCH // 2))
    }
    return Problem(
        CLASSES,
        LABELLED,
        TOTAL,
        MEMORY_ROWS,
        BATCH,
        SIZE,
        steps,
        {name: partial(cycle, found) for name, found in batches.items()},
    )


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
