"""Everything a run works with, opened from its configuration: device, data, batches, and the training state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.checkpoint import resume
from train.config import FitConfig
from train.data import Batches, SegmentationDataset, open_dataset, split_labelled
from train.errors import UserError
from train.step import Batch
from train.training import Training, build_training

CHECKPOINT = "last.pt"


@dataclass(frozen=True)
class Session:
    """An opened run.

    Attributes:
        training: at step 0, or where the checkpoint in the run folder left it.
        train, validation: the data sets.
        labelled, unlabelled: indices of the images in ``train``; the second is not used by the method ``supervised``.
        data: plain description of the data, for the checkpoint.
    """

    device: torch.device
    training: Training
    train: SegmentationDataset
    validation: SegmentationDataset
    labelled: list[int]
    unlabelled: list[int]
    data: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.training.config.run.out / CHECKPOINT

    def batches(self) -> Iterator[tuple[Batch, Batch | None]]:
        """Labelled and unlabelled batches on the device, from the current step on, without end."""
        data = self.training.config.data
        labelled = self._stream(self.labelled, "labelled", data.labelled_batch)
        if self.training.config.method.method == "supervised":
            yield from ((batch, None) for batch in labelled)
        else:
            yield from zip(labelled, self._stream(self.unlabelled, "unlabelled", data.unlabelled_batch), strict=False)

    def _stream(self, indices: list[int], name: str, size: int) -> Iterator[Batch]:
        config = self.training.config
        stream = Batches(
            self.train,
            indices,
            size,
            config.data.crop,
            config.optim.seed,
            name,
            start=self.training.step,
            workers=config.data.workers,
        )
        for images, masks in stream:
            yield images.to(self.device, non_blocking=True), masks.to(self.device, non_blocking=True)


def open_session(config: FitConfig) -> Session:
    """Open data and networks, and continue from the checkpoint in ``config.run.out`` if there is one.

    Raises:
        UserError: options, data or a checkpoint that cannot be used.
    """
    config.check()
    device = choose_device(config.run.device)
    train = open_dataset(config.data.dataset, "train", config.data.root)
    validation = open_dataset(config.data.dataset, "val", config.data.root)
    labelled, unlabelled = split_labelled(len(train), config.data.labelled, config.optim.seed)
    if not unlabelled and config.method.method != "supervised":
        raise UserError(
            f"all {len(train)} images are labelled, so none is left for pseudo-labels: "
            f"lower --labelled, or use --method supervised"
        )
    training = build_training(config, len(train.classes), train.ignore_index, len(labelled), len(unlabelled), device)
    # to resume with other images would not be to resume
    data = {
        "classes": list(train.classes),
        "ignore_index": train.ignore_index,
        "images": list(train.ids),
        "labelled": len(labelled),
    }
    session = Session(device, training, train, validation, labelled, unlabelled, data)
    if session.checkpoint.exists():
        resume(session.checkpoint, training, data)
    return session


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA, else MPS, else the CPU; otherwise the device of that name.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        reason = str(error).split("\n")[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): try --device auto or --device cpu") from error
    return device
