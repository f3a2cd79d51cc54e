"""Which training images are labelled: drawn by a seed, evenly over video sequences, or the first of a list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.config import DataConfig
from train.data.classes import read_lines
from train.data.dataset import SegmentationDataset
from train.data.released_splits import read_released_split
from train.errors import UserError

Split = tuple[list[int], list[int]]
"""Indices of the labelled and of the unlabelled images, each ascending."""


def choose_labelled(train: SegmentationDataset, data: DataConfig, seed: int) -> Split:
    """Split the images of ``train`` as ``data`` says.

    The first images of ``data.split_file`` are labelled; without a file, images drawn by ``data.split_seed`` or,
    without that too, by ``seed``.

    Raises:
        UserError: a count or a file that does not fit the data.
    """
    n, path = len(train), data.split_file
    if path is not None:
        order = read_released_split(path, n) if path.suffix == ".pkl" else read_split(path, train.ids)
        return split_by_order(order, n, labelled_count(n, data.labelled))
    seed = seed if data.split_seed is None else data.split_seed
    if train.name == "camvid":  # frames of one video resemble each other
        return split_labelled_by_sequence(train.ids, data.labelled, seed)
    return split_labelled(n, data.labelled, seed)


def split_labelled(n: int, labelled: int | float, seed: int) -> Split:
    """Draw the labelled images from ``range(n)``.

    The shuffle depends on nothing but ``n`` and ``seed``. With the same seed, a smaller labelled set is part of every
    larger one.

    Args:
        n: number of images.
        labelled: how many are labelled: a count (int, 1 to ``n``) or a fraction (float, above 0 to 1; rounded to the
            nearest count, at least one image).
        seed: any integer.

    Raises:
        UserError: ``labelled`` is out of range.
    """
    return split_by_order(_shuffled(n, seed).tolist(), n, labelled_count(n, labelled))


def split_labelled_by_sequence(ids: Sequence[str], labelled: int | float, seed: int) -> Split:
    """Draw the labelled images with about the same share of them in every video sequence.

    Frames of one video show nearly the same scene, so that a draw from all images may leave a sequence out. With the
    same seed, a smaller labelled set is part of every larger one.

    Args:
        ids: names of the images; the part before the first ``_`` (of ``Seq05VD_f00000`` the part ``Seq05VD``) is the
            name of the sequence.
        labelled, seed: as in `split_labelled`.

    Raises:
        UserError: ``labelled`` is out of range.
    """
    n = len(ids)
    sequences = [item.split("_")[0] for item in ids]
    sizes, drawn = Counter(sequences), Counter[str]()
    share = np.empty(n)  # of its sequence that is labelled once this image is: images are labelled in this order
    for index in _shuffled(n, seed):
        sequence = sequences[index]
        share[index] = (drawn[sequence] + 0.5) / sizes[sequence]
        drawn[sequence] += 1
    return split_by_order(share.argsort(kind="stable").tolist(), n, labelled_count(n, labelled))


def read_split(path: Path, ids: Sequence[str]) -> list[int]:
    """Read a list of ids, one a line, as their indices in ``ids``, in the order of the file.

    Raises:
        UserError: unreadable or empty file, an id that ``ids`` lacks or that is listed twice.
    """
    position = {item: index for index, item in enumerate(ids)}
    order: dict[int, None] = {}
    for item in read_lines(Path(path), "ids of images"):
        if item not in position:
            raise UserError(f"{path} lists '{item}', which is not among the {len(ids)} images of this data set")
        if position[item] in order:
            raise UserError(f"{path} lists '{item}' twice: list every id once")
        order[position[item]] = None
    return list(order)


def split_by_order(order: Sequence[int], n: int, labelled: int) -> Split:
    """Label the first ``labelled`` images of ``order``, indices in ``range(n)``, which may stop after these.

    Raises:
        UserError: ``labelled`` is out of range.
    """
    if not 1 <= labelled <= len(order):
        raise UserError(f"{labelled} labelled images: expected 1 to {len(order)}, the length of the split")
    first = set(order[:labelled])
    return sorted(first), [index for index in range(n) if index not in first]


def labelled_count(n: int, labelled: int | float) -> int:
    """Number of images that ``labelled`` means. Arguments and errors as in `split_labelled`."""
    if isinstance(labelled, float):
        if not 0.0 < labelled <= 1.0:
            raise UserError(f"labelled fraction {labelled}: expected above 0 and at most 1 (a whole number is a count)")
        return max(1, round(n * labelled))
    if not 1 <= labelled <= n:
        raise UserError(f"{labelled} labelled images: expected 1 to {n}, the number of images in the train split")
    return labelled


def _shuffled(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, n]).permutation(n)


def covering_seed(train: SegmentationDataset, labelled: int | float, seed: int, least: float = 0.02) -> int:
    """A seed of :func:`split_labelled` whose labelled images have every class.

    A class that no label shows cannot be learned, and a draw of few images often leaves a rare one out.

    Args:
        train: images with labels.
        labelled: as in :func:`split_labelled`.
        seed: any integer from 0; each has draws of its own, of which the first that will do is taken.
        least: share of the labelled pixels that each class must have.

    Raises:
        UserError: none of a thousand draws has every class.
    """
    classes = len(train.classes)
    counts = np.stack([np.bincount(train[i][1].flatten(), minlength=256)[:classes] for i in range(len(train))])
    for draw in range(1000 * seed, 1000 * (seed + 1)):
        drawn = counts[split_labelled(len(train), labelled, draw)[0]].sum(0)
        if drawn.min() >= least * drawn.sum():
            return draw
    raise UserError(
        f"--labelled {labelled}: in none of 1000 draws has each of the {classes} classes {100 * least:g} % of the "
        "labelled pixels; give more images"
    )
