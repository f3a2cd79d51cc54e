"""The small problem on which the authors' training loop and ours are compared: networks, images, arithmetic."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from train.data.batches import Batch
from train.models import without_memory
from train.networks.backbone import Backbone
from train.networks.base import resize
from train.paper.rows import Row
from train.paper.variants import variant_config
from train.session import Training, build_training


@dataclass
class Problem:
    """What both loops are given."""

    steps: Sequence[int]
    """Numbers of the steps that are taken."""
    streams: dict[str, Callable[[], Iterator[Batch]]]
    """``labelled``, ``unlabelled``, ``source``: endless batches of uint8 RGB images and labels."""
    classes: int = 5
    labelled: int = 32
    total: int = 44
    """Labelled and unlabelled images."""
    batch: int = 4
    size: int = 48
    memory_rows: int = 64

    def coin(self, step: int, view: int) -> float:
        """What decides on ClassMix of a view (0: the labelled images, for which it is often small)."""
        return random.Random(f"coin {step} {view}").random() ** (2 if view == 0 else 1)

    def ascending(self, step: int, view: int, image: int) -> bool:
        """Whether ClassMix picks the first or the last of the sorted classes of ``image``."""
        return random.Random(f"order {step} {view} {image}").random() < 0.5


def shallow_networks() -> ExitStack:
    """Context in which the paper's networks are built with one block in each stage."""
    stack = ExitStack()
    for name in ("deeplab_v2", "deeplab_v3plus"):
        shallow = mock.patch(f"train.networks.{name}.Backbone", lambda _, *rest: Backbone((1, 1, 1, 1), *rest))
        stack.enter_context(shallow)
    return stack


def our_training(row: Row, problem: Problem, ignore_index: int) -> Training:
    """Our training at step 0 with one block in each stage; its predictions are varied, and sure enough to remember."""
    config = variant_config(row, "released")
    data = replace(config.data, labelled_batch=problem.batch, unlabelled_batch=problem.batch // 2)
    config = replace(
        config,
        data=replace(data, source_root=Path("gta5") if row.adapts else None),
        model=replace(config.model, pretrained=False),
        method=replace(config.method, memory_rows=problem.memory_rows),
    )
    with shallow_networks():
        unlabelled = problem.total - problem.labelled
        t = build_training(config, problem.classes, ignore_index, problem.labelled, unlabelled)
    t.learner.double()  # the memory too
    with torch.no_grad():
        for parameter in t.learner.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        logits = copy.deepcopy(t.learner)(squares(problem) / 255)[0]
        factor = 12 / logits.std((0, 2, 3)).mean()
        for name, parameter in t.learner.network.classifier.named_parameters():  # type: ignore[operator, union-attr]
            parameter *= factor
            if name in ("bias", "convs.0.bias"):
                parameter -= factor * logits.mean((0, 2, 3))
    t.teacher.double().load_state_dict(without_memory(t.learner.state_dict()))
    return t


def squares(problem: Problem) -> Tensor:
    """Labelled batch of images of coloured squares, uint8."""
    colours = torch.randint(256, (problem.batch, 3, 8, 8), dtype=torch.uint8)
    return colours.repeat_interleave(problem.size // 8, 2).repeat_interleave(problem.size // 8, 3)


def fill(problem: Problem, t: Training) -> None:
    """Make the batches: labels are what the network says at first, with noise and an ignored border."""

    @torch.no_grad()
    def batch() -> Batch:
        images = squares(problem)
        labels = resize(copy.deepcopy(t.learner)(images / 255)[0], images.shape[-2:]).argmax(1)
        labels = torch.where(torch.rand(labels.shape) < 0.2, torch.randint_like(labels, problem.classes), labels)
        labels[:, :3] = t.ignore_index
        return images, labels

    for name, size in (("labelled", problem.batch), ("source", problem.batch), ("unlabelled", problem.batch // 2)):
        batches = [tuple(part[:size] for part in batch()) for _ in range(7)]
        problem.streams[name] = partial(cycle, batches)  # type: ignore[assignment]


def same_arithmetic() -> ExitStack:
    """Float64, and dropout whose masks depend on the random state and the shape alone."""

    def dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
        return x * (torch.rand(x.shape) >= p) / (1 - p) if training else x

    stack = ExitStack()
    stack.enter_context(torch.random.fork_rng())
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.set_default_dtype(torch.float64)
    stack.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
    stack.enter_context(mock.patch("torch.nn.functional.dropout", dropout))
    return stack
