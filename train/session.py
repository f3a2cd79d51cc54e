"""Everything a run works with, opened from its configuration: device, data, batches, and the training state."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import resume
from train.config import DataConfig, FitConfig
from train.data import Batches, SegmentationDataset, open_dataset, split_labelled
from train.data.camvid import split_labelled_by_sequence
from train.data.published_splits import read_published_split, read_split, split_by_order
from train.data.splits import labelled_count
from train.distributed import rank, seed_rank, world_size
from train.errors import UserError
from train.step import Batch
from train.training import Training, build_training

CHECKPOINT, BEST_CHECKPOINT = "last.pt", "best.pt"


@dataclass(frozen=True)
class Session:
    """An opened run.

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
        """The file that holds where the run is."""
        return self.training.config.run.out / CHECKPOINT

    @property
    def best_checkpoint(self) -> Path:
        """The file that holds where the student was best on the validation images."""
        return self.training.config.run.out / BEST_CHECKPOINT

    def batches(self) -> Iterator[tuple[Batch, Batch | None]]:
        """This rank's part of labelled and unlabelled batches, on the device, from the current step on, without end."""
        labelled = self._labelled_batches()
        if self.training.config.method.method == "supervised":
            yield from ((batch, None) for batch in labelled)
        else:
            yield from zip(labelled, self.unlabelled_batches(), strict=False)

    def unlabelled_batches(self) -> Iterator[Batch]:
        """Unlabelled batches on the device, from the current step on, without end; their labels are not to be read."""
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
        stream = Batches(data, indices, size, crop, seed, name, start, workers, rank(), world_size())
        for images, masks in stream:
            yield images.to(self.device, non_blocking=True), masks.to(self.device, non_blocking=True)


def open_session(config: FitConfig) -> Session:
    """Open data and networks, and continue from the checkpoint in ``config.run.out`` if there is one.

    Raises:
        UserError: options, data or a checkpoint that cannot be used.
    """
    config.check(world_size())
    device = choose_device(config.run.device)
    places = config.data.root, config.data.scale
    train, validation = (open_dataset(config.data.dataset, split, *places) for split in ("train", "val"))
    source_root = config.data.source_root
    source = None if source_root is None else open_dataset("gta5", "train", source_root, config.data.scale)
    labelled, unlabelled = choose_labelled(train, config.data, config.optim.seed)
    if not unlabelled and config.method.method != "supervised":
        raise UserError(
            f"all {len(train)} images are labelled, so none is left for pseudo-labels: "
            f"lower --labelled, or use --method supervised"
        )
    training = build_training(config, len(train.classes), train.ignore_index, len(labelled), len(unlabelled), device)
    seed_rank(config.optim.seed)
    # to resume with other images would not be to resume
    data = {
        "classes": list(train.classes),
        "ignore_index": train.ignore_index,
        "images": list(train.ids),
        "labelled": len(labelled),
    }
    session = Session(device, training, train, validation, labelled, unlabelled, source, data)
    if session.checkpoint.exists():
        resume(session.checkpoint, training, data)
    return session


def choose_labelled(train: SegmentationDataset, data: DataConfig, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the labelled and of the unlabelled images of ``train``, each ascending.

    The first of ``data.split_file``; else drawn by ``data.split_seed`` or, without one, by ``seed``.

    Raises:
        UserError: a count or a file that does not fit the data.
    """
    n, path = len(train), data.split_file
    if path is not None:
        order = read_published_split(path, n) if path.suffix == ".pkl" else read_split(path, train.ids)
        return split_by_order(order, n, labelled_count(n, data.labelled))
    seed = seed if data.split_seed is None else data.split_seed
    if data.dataset == "camvid":  # frames of one video resemble each other
        return split_labelled_by_sequence(train.ids, data.labelled, seed)
    return split_labelled(n, data.labelled, seed)


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA, else MPS, else the CPU; otherwise the device of that name. Of several processes, each has a GPU.

    Raises:
        UserError: there is no such device, or a single one for several processes.
    """
    alone = world_size() == 1
    if name == "auto":
        mps = alone and torch.backends.mps.is_available()  # its tensors cannot be exchanged
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not alone and name not in ("cuda", "cpu"):
        raise UserError(f"--device {name} cannot be shared by {world_size()} processes: give cuda, or cpu")
    if not alone and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).split("\n")[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): try --device auto or --device cpu") from error
    return device
