"""A run in memory: networks, optimiser and schedules (`Training`), and the data they train on (`Session`)."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pixcontrast.distributed import world_size
from train.augment import AugmentConfig, build_augmentation
from train.checkpoint import CHECKPOINT, PREVIOUS, resume
from train.class_weights import ClassWeights
from train.config import FitConfig
from train.data.batches import Batch, Batches
from train.data.dataset import SegmentationDataset
from train.data.datasets import check_overlap, open_dataset
from train.data.splits import choose_labelled
from train.distributed import choose_device, gather, rank, set_arithmetic
from train.errors import UserError
from train.models import (
    Learner,
    build_learner,
    drop_memory,
    initialise,
    synchronise_batchnorm,
    to_channels_last,
    without_memory,
)
from train.schedules import build_optimizer, from_source, poly_schedule

BEST_CHECKPOINT = "best.pt"
STATEFUL = ("learner", "teacher", "optimizer", "schedule", "class_weights")


@dataclass
class Training:
    """All that a step reads and changes. Each process has one; networks and optimiser are the same in all of them.

    Attributes:
        learner: student network with contrast branch; the branch holds the memory.
        teacher: moving average of the learner's parameters, with buffers of its own and without a memory.
        weak, strong: augmentation of the labelled and of the unlabelled images.
        step: steps taken so far.
        target_labels: augmented labels of the last labelled batch of the target domain.
    """

    config: FitConfig
    num_classes: int
    ignore_index: int
    learner: Learner
    teacher: Learner
    optimizer: Optimizer
    schedule: LRScheduler
    class_weights: ClassWeights
    weak: AugmentConfig
    strong: AugmentConfig
    step: int = 0
    target_labels: Tensor | None = None

    def from_source(self, step: int) -> bool:
        """Whether the labelled images of ``step`` (from 0) are of the source domain, if there is one."""
        method, steps = self.config.method, self.config.optim.steps
        adapts = self.config.data.source_root is not None
        return adapts and from_source(step, steps, method.source_steps, method.last_steps)

    @property
    def _stateful(self) -> list[str]:
        return [name for name in STATEFUL if name != "teacher" or self.config.method.uses_teacher]

    def networks(self) -> dict[str, Any]:
        """The part of the state that `train.evaluate.load_learners` reads: all but what only a resume needs."""
        names = [name for name in self._stateful if name in ("learner", "teacher")]
        return {"step": self.step, **{name: getattr(self, name).state_dict() for name in names}}

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes. Random numbers have no state: see `train.streams`.

        With several processes, all must call it. Only the result on rank 0 is complete: ``other_ranks`` has the
        rank-specific state of the others.
        """
        own = self._rank_state()
        parts = {name: getattr(self, name).state_dict() for name in self._stateful}
        own_parts = {name: part for name, part in own.items() if name != "memory"}
        return {"step": self.step, **parts, **own_parts, "other_ranks": gather(own)[1:]}

    def _rank_state(self) -> dict[str, Any]:
        """Rank-specific state: labels of the target batch and, unless it is gathered, the memory."""
        state: dict[str, Any] = {}
        if self.config.data.source_root is not None and self.target_labels is not None:
            state["target_labels"] = self.target_labels.cpu()
        memory = getattr(self.learner.branch, "memory", None)
        if memory is not None and memory.sync != "gather":
            state["memory"] = {name: part.cpu() for name, part in memory.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, a result of :meth:`state_dict` on rank 0 with tensors on the CPU."""
        others = state.get("other_ranks", [])
        if len(others) + 1 != world_size():
            raise UserError(
                f"the run was trained by {len(others) + 1} processes, this is one of {world_size()}: start as many"
            )
        own = state if rank() == 0 else others[rank() - 1]
        for name in self._stateful:
            part = state[name]
            getattr(self, name).load_state_dict(without_memory(part) if name == "teacher" else part)
        self.step = state["step"]
        if self.learner.branch is not None and "memory" in own:
            self.learner.branch.memory.load_state_dict(own["memory"])
        if "target_labels" in own:
            self.target_labels = own["target_labels"].to(self.class_weights.labels.device)


def build_training(
    config: FitConfig,
    num_classes: int,
    ignore_index: int,
    num_labelled: int,
    num_unlabelled: int,
    device: torch.device | str = "cpu",
) -> Training:
    """Networks, optimiser and schedules at step 0, seeded by ``config.optim.seed``.

    Args:
        config: the whole configuration.
        num_classes: C.
        ignore_index: label of pixels without a class.
        num_labelled: labelled images, which decide how many rows each may add to the memory.
        num_unlabelled: unlabelled images; with the batch sizes they decide the windows of the class weights.
        device: where to train.

    Raises:
        UserError: an unusable encoder or its weights.
    """
    learner = build_learner(config, num_classes, ignore_index, num_labelled).to(device)
    if config.model.sync_batchnorm and world_size() > 1:
        if torch.device(device).type != "cuda":
            raise UserError(f"--sync-batchnorm: PyTorch has it for CUDA, not for {device}; leave it out")
        learner.network = synchronise_batchnorm(learner.network)
    to_channels_last(learner)
    teacher = drop_memory(copy.deepcopy(learner).requires_grad_(False))
    if config.optim.compile:
        for part in (learner, teacher):
            part.network.compile()
    optimizer = build_optimizer(learner, config.optim)
    semi_supervised = config.method.uses_unlabelled
    class_weights = ClassWeights(
        num_classes,
        label_batches=max(1, num_labelled // config.data.labelled_batch),
        pseudo_batches=max(1, num_unlabelled // config.data.unlabelled_batch) if semi_supervised else 0,
        device=device,
    )
    schedule = poly_schedule(optimizer, config.optim.steps)
    views = build_augmentation(config.method)
    return Training(config, num_classes, ignore_index, learner, teacher, optimizer, schedule, class_weights, *views)


@dataclass(frozen=True)
class Session:
    """An opened run: data and training.

    Attributes:
        training: at step 0, or where the checkpoint in the run folder left it.
        train, validation: the data sets.
        labelled, unlabelled: indices of the images in ``train``; the second is not used by the method ``supervised``.
        source: labelled images of another domain, if there are any.
        data: plain description of the data, for the checkpoint.
    """

    device: torch.device
    training: Training
    train: SegmentationDataset
    validation: SegmentationDataset
    labelled: list[int]
    unlabelled: list[int]
    source: SegmentationDataset | None
    data: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        """File of the current state of the run."""
        return self.training.config.run.out / CHECKPOINT

    @property
    def best_checkpoint(self) -> Path:
        """File of the state in which the student was best on the validation images."""
        return self.training.config.run.out / BEST_CHECKPOINT

    def batches(self) -> Generator[tuple[Batch, Batch | None], None, None]:
        """Endless labelled and unlabelled batches (this rank's part) on the device, from the current step on."""
        labelled = self._labelled_batches()
        if not self.training.config.method.uses_unlabelled:
            yield from ((batch, None) for batch in labelled)
        else:
            yield from zip(labelled, self.unlabelled_batches(), strict=False)

    def unlabelled_batches(self) -> Iterator[Batch]:
        """Endless unlabelled batches on the device, from the current step on; nothing may read their labels."""
        size = self.training.config.data.unlabelled_batch
        return self._stream(self.train, self.unlabelled, "unlabelled", size, self.training.step)

    def _labelled_batches(self) -> Iterator[Batch]:
        training, size = self.training, self.training.config.data.labelled_batch
        past = sum(training.from_source(step) for step in range(training.step))
        target = self._stream(self.train, self.labelled, "labelled", size, training.step - past)
        if self.source is None:
            yield from target
        else:
            source = self._stream(self.source, list(range(len(self.source))), "source", size, past)
            for step in count(training.step):
                yield next(source if training.from_source(step) else target)

    def _stream(
        self, data: SegmentationDataset, indices: list[int], name: str, size: int, start: int
    ) -> Iterator[Batch]:
        config = self.training.config
        crop, seed, workers = config.data.crop, config.optim.seed, config.data.workers
        pin = config.data.pin_memory and self.device.type == "cuda"
        stream = Batches(data, indices, size, crop, seed, name, start, workers, rank(), world_size(), pin)
        for images, masks in stream:
            yield images.to(self.device, non_blocking=True), masks.to(self.device, non_blocking=True)


def open_session(config: FitConfig) -> Session:
    """Open data and networks, and continue from the checkpoint in ``config.run.out`` if there is one.

    Raises:
        UserError: options, data or a checkpoint that cannot be used.
    """
    config.check(world_size())
    device = choose_device(config.run.device)
    if device.type == "cuda":
        set_arithmetic(config.optim)
    c = config.data
    train, validation = (open_dataset(c.dataset, split, c.root, c.scale) for split in ("train", c.evaluate))
    check_overlap(train, validation)
    source = None if c.source_root is None else open_dataset("gta5", "train", c.source_root, c.scale)
    labelled, unlabelled = choose_labelled(train, c, config.optim.seed)
    if not unlabelled and config.method.uses_unlabelled:
        raise UserError(
            f"all {len(train)} images are labelled, so none is left for pseudo-labels: "
            f"lower --labelled, or use --method supervised"
        )
    training = build_training(config, len(train.classes), train.ignore_index, len(labelled), len(unlabelled), device)
    # compared on resume, which needs the same images
    data = {
        "classes": list(train.classes),
        "ignore_index": train.ignore_index,
        "images": list(train.ids),
        "labelled": len(labelled),
    }
    session = Session(device, training, train, validation, labelled, unlabelled, source, data)
    if any(config.run.out.joinpath(name).exists() for name in (CHECKPOINT, PREVIOUS)):
        resume(session.checkpoint, training, data)
    elif config.model.init is not None:
        print(initialise(training.learner, config), flush=True)
        training.teacher.load_state_dict(without_memory(training.learner.state_dict()))
    return session
