"""Reading every image and label of a data set, to find before a training what would stop it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from train.data.dataset import SegmentationDataset
from train.data.datasets import check_overlap, open_dataset
from train.errors import UserError


@dataclass(frozen=True)
class CheckConfig:
    """Read every image and label of a data set, and print a line for each problem."""

    dataset: tyro.conf.Positional[Literal["folder", "cityscapes", "voc", "gta5", "camvid", "landcover"]]
    """Which data set."""
    root: tyro.conf.Positional[Path | None] = None
    """Its folder; landcover needs none."""
    splits: tuple[Literal["train", "val", "test"], ...] = ("train", "val")
    """What to read; of gta5 as --source-root, train is enough."""


def check(config: CheckConfig) -> str:
    """Print a line for each problem.

    Returns:
        a line that says that there are none.

    Raises:
        SystemExit: with status 1, if there are any.
    """
    found = 0
    for problem in problems(config):
        tqdm.write(problem)
        found += 1
    if found:
        raise SystemExit(f"problems: {found}")
    return f"no problems in {', '.join(config.splits)} of {config.root or config.dataset}"


def problems(config: CheckConfig) -> Iterator[str]:
    """Errors that a training with this data set would stop with: of opening it, of its splits, of every item."""
    opened: list[SegmentationDataset] = []
    for split in config.splits:
        try:
            opened.append(open_dataset(config.dataset, split, config.root))
        except UserError as error:
            yield str(error)
    for first, second in combinations(opened, 2):
        if problem := _error(partial(check_overlap, first, second)):
            yield problem
    reads = [partial(dataset.__getitem__, index) for dataset in opened for index in range(len(dataset))]
    pool = ThreadPoolExecutor()
    try:
        for problem in tqdm(pool.map(_error, reads), "reading", len(reads), unit="image"):
            if problem:
                yield problem
    finally:
        pool.shutdown(cancel_futures=True)


def _error(action: Callable[[], object]) -> str:
    """The message of the `UserError` that ``action`` raises, or an empty one."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""
