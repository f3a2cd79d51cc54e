"""Endless batches of random crops that can resume anywhere."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from train.data.dataset import SegmentationDataset
from train.errors import UserError, reason

Batch = tuple[Tensor, Tensor]  # images [B, 3, H, W] uint8, labels [B, H, W] int64
Sample = tuple[int, int]  # number of the sample in the stream, index of the item in the data set
ORDER, CROP = 0, 1  # purpose of a random stream


@dataclass(frozen=True)
class Batches:
    """Endless batches; batch ``i`` depends only on ``(seed, stream, i)``, never on what was read before.

    So a run resumes exactly from one number, with any number of loader processes. torchdata's ``StatefulDataLoader``
    saves a state for each loader process instead, and resumes with as many of them only.

    Every epoch is a fresh permutation of ``indices``; an incomplete last batch is dropped. With fewer indices than
    ``batch_size``, each batch consists of several permutations. Every sample is a random crop; images smaller than the
    crop are padded on the right and at the bottom (image 0, mask ``ignore_index``). The global random state of torch,
    numpy and Python is neither read nor changed.

    Args:
        dataset, indices: the data set, and which of its items to use.
        batch_size: images per batch.
        crop_size: side of the square crop, or ``(height, width)``, in pixels.
        seed: any integer.
        stream: name of this sequence of batches, such as ``"labelled"``; other names give independent sequences.
        start: number of the first batch, for resuming.
        workers: loader processes; 0 reads in this process. The batches are the same.
        rank, world_size: give part ``rank`` of ``world_size`` equal parts of each batch, for several processes.
        pin_memory: put batches into page-locked memory, for asynchronous copies to a GPU.

    Raises:
        UserError: no indices, a batch or crop size below 1, or a batch without equal parts; while iterating, what
            reading an item raises.
    """

    dataset: SegmentationDataset
    indices: Sequence[int]
    batch_size: int
    crop_size: int | tuple[int, int]
    seed: int
    stream: str
    start: int = 0
    workers: int = 0
    rank: int = 0
    world_size: int = 1
    pin_memory: bool = False

    def __post_init__(self) -> None:
        if not self.indices:
            raise UserError(f"no images for the {self.stream} batches: use more images or another labelled fraction")
        if self.batch_size < 1 or min(self._crop) < 1:
            raise UserError(f"batch size {self.batch_size} and crop size {self.crop_size}: expected at least 1 each")
        if self.batch_size % self.world_size:
            raise UserError(
                f"{self.world_size} processes cannot share {self.stream} batches of {self.batch_size} images equally: "
                f"give a multiple of {self.world_size}, or start another number of processes"
            )

    @property
    def _crop(self) -> tuple[int, int]:
        return (self.crop_size, self.crop_size) if isinstance(self.crop_size, int) else self.crop_size

    @property
    def _key(self) -> tuple[int, int]:
        return self.seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(self.stream.encode())

    def __iter__(self) -> Iterator[Batch]:
        """Yield images uint8 ``[B, 3, h, w]`` and masks int64 ``[B, h, w]`` of batch ``start``, ``start + 1``, ...

        With several processes, B is the size of the part.
        """
        loader: DataLoader[Any] = DataLoader(
            _Crops(self.dataset, self._crop, self._key),
            batch_sampler=map(self.samples, count(self.start)),
            collate_fn=_collate,
            pin_memory=self.pin_memory,
            **_processes(self.workers),
        )
        yield from _or_error(loader)

    def samples(self, number: int) -> list[Sample]:
        """The samples of (this rank's part of) batch ``number``."""
        n, size = len(self.indices), self.batch_size
        if n >= size:
            epoch, batch_of_epoch = divmod(number, n // size)
            order = self._permutation(epoch)[batch_of_epoch * size : (batch_of_epoch + 1) * size]
        else:
            repeats = -(-size // n)
            order = [index for r in range(repeats) for index in self._permutation(number * repeats + r)][:size]
        samples = [(number * size + position, index) for position, index in enumerate(order)]
        part = size // self.world_size
        return samples[self.rank * part : (self.rank + 1) * part]

    def _permutation(self, epoch: int) -> list[int]:
        generator = np.random.default_rng([*self._key, ORDER, epoch])
        return [self.indices[position] for position in generator.permutation(len(self.indices))]


def whole_items(dataset: SegmentationDataset, indices: Sequence[int], workers: int = 0) -> Iterator[Batch]:
    """Items of these indices, in order: image ``[3, H, W]``, mask ``[H, W]``. Loader processes read ahead, if any.

    Raises:
        UserError: what reading an item raises.
    """
    loader: DataLoader[Any] = DataLoader(
        _Items(dataset), None, sampler=indices, collate_fn=_unchanged, **_processes(workers)
    )
    return _or_error(loader)


def loader_ended(error: Exception, workers: int) -> UserError | None:
    """The error of one line if ``error`` says that one of ``workers`` loader processes has ended; else None."""
    # its connection breaks where it was killed while it sent a batch; a socket that is gone has no file name
    gone = isinstance(error, EOFError | ConnectionError) or (
        isinstance(error, FileNotFoundError) and not error.filename
    )
    if not (gone and workers > 0) and "DataLoader worker" not in str(error):
        return None
    return UserError(
        f"a loader process ended ({reason(error)}), perhaps for lack of memory: give fewer --workers than {workers}"
    )


def _processes(workers: int) -> dict[str, Any]:
    """Options of a loader. By default it would draw its base seed from the global generator."""
    return {"num_workers": workers, "worker_init_fn": _outlive_signals, "generator": torch.Generator()}


def _or_error(loader: DataLoader[Any]) -> Iterator[Batch]:
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item


def _unchanged(item: Any) -> Any:
    return item


@dataclass
class _Items(Dataset[Any]):
    """Items, or the error of reading one: a loader process that raised it would add its traceback to the message."""

    dataset: SegmentationDataset

    def __getitem__(self, index: int) -> Batch | UserError:
        try:
            return self.dataset[index]
        except UserError as error:
            return error


class _Crops(Dataset[Any]):
    """Random crop of a sample, seeded by the number of the sample."""

    def __init__(self, dataset: SegmentationDataset, crop_size: tuple[int, int], key: tuple[int, int]) -> None:
        self.items = _Items(dataset)
        self.crop_size = crop_size
        self.key = key

    def __getitem__(self, sample: Sample) -> Batch | UserError:
        number, index = sample
        item = self.items[index]
        if isinstance(item, UserError):
            return item
        image, mask = item
        height, width = self.crop_size
        missing = (0, max(0, width - mask.shape[1]), 0, max(0, height - mask.shape[0]))
        image, mask = pad(image, missing), pad(mask, missing, value=self.items.dataset.ignore_index)
        generator = np.random.default_rng([*self.key, CROP, number])
        top = int(generator.integers(mask.shape[0] - height + 1))
        left = int(generator.integers(mask.shape[1] - width + 1))
        window = (..., slice(top, top + height), slice(left, left + width))
        return image[window], mask[window]


def _outlive_signals(worker: int) -> None:
    """Let a loader process go on after Ctrl-C or a scheduler's SIGTERM: the last step still needs its batches.

    It ends 30 s after the first SIGTERM, and at once after the second, for Python ends left-over processes so.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(30)


def _collate(samples: list[Any]) -> Batch | UserError:
    if errors := [sample for sample in samples if isinstance(sample, UserError)]:
        return errors[0]
    images, masks = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(masks)
