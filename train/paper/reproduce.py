"""All runs of one of the paper's tables, one after the other, and their comparison with what the paper printed."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train.config import FitConfig
from train.distributed import rank
from train.errors import UserError
from train.logs import finished, logged_scores, read_metrics
from train.loop import fit
from train.paper.comparison import Results, write_comparison
from train.paper.rows import Row, find_row, rows_of_table
from train.paper.variants import RowOptions, Variant, fit_config


@dataclass(frozen=True)
class ReproduceConfig:
    """Train the rows of a table on each split, and compare. All options of `fit` can follow and override all rows."""

    table: Literal[1, 2, 3]
    """1: Cityscapes. 2: VOC. 3: GTA5 and Cityscapes."""
    data: Path
    """Folder that has the data sets as folders cityscapes/, voc/, gta5/, and the COCO weights in weights/."""
    rows: tuple[str, ...] = ()
    """Names of the rows to train, see `rows`; all of the table unless given."""
    splits: tuple[int, ...] = (0, 1, 2)
    """Splits to train on: seeds of the draw of the labelled images."""
    split_files: tuple[Path, ...] = ()
    """Instead of draws, a file for each of the splits: ids, one a line, labelled ones first, or a released pickle."""
    variant: Variant = "paper"
    """paper: as described. released: as the authors' code. published: as their code was for the tables."""
    method: Literal["supervised", "pseudo", "contrast"] = "contrast"
    """supervised: labels only. pseudo: and pseudo-labels of the teacher. contrast: the whole method."""
    all_labels: bool = False
    """Supervised by all labels instead."""
    out: Path = Path("runs")
    """Folder of the runs and of the comparison. Finished runs in it are not trained again."""
    print_commands: bool = False
    """Print one command for each unfinished run, for a job array, and train nothing."""


def reproduce(config: ReproduceConfig, overrides: list[str]) -> Path:
    """Train the unfinished runs, or print their commands; write the comparison after each run.

    Args:
        config: what to run.
        overrides: options of `fit` that replace values of every row.

    Returns:
        the path of the comparison.

    Raises:
        UserError: unusable options, or a run that cannot be trained.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    table = rows_of_table(config.table)
    chosen = [find_row(name) for name in config.rows] or table
    if others := [row.name for row in chosen if row not in table]:
        raise UserError(f"rows {', '.join(others)} are not of table {config.table}: see python -m train rows")
    if config.split_files and len(config.split_files) != len(config.splits):
        raise UserError(f"{len(config.split_files)} split files for {len(config.splits)} splits: give one for each")
    plan = {(row, split): _planned(config, overrides, row, split) for row in table for split in config.splits}
    for (row, split), run in plan.items():
        if row not in chosen or finished(run):
            continue
        if config.print_commands:
            print(shlex.join(["python", "-m", "train", "fit", *_row_arguments(config, row, split), *overrides]))
        else:
            print(f"{row.name}, split {split}: {run.run.out}", flush=True)
            fit(run)
            _compare(config, plan)
    return _compare(config, plan)


def _planned(config: ReproduceConfig, overrides: list[str], row: Row, split: int) -> FitConfig:
    options = RowOptions(row.name, config.data, split, config.variant, config.method, config.all_labels)
    return fit_config(options, [*_split_file(config, split), *overrides], config.out)


def _row_arguments(config: ReproduceConfig, row: Row, split: int) -> list[str]:
    """Command-line arguments of `fit` for one run, but for the overrides."""
    values = {"row": row.name, "data": config.data, "split": split, "variant": config.variant, "method": config.method}
    arguments = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    flag = ["--all-labels"] if config.all_labels else []
    out = _planned(config, [], row, split).run.out
    return [*arguments, *flag, *_split_file(config, split), "--out", str(out)]


def _split_file(config: ReproduceConfig, split: int) -> list[str]:
    files = dict(zip(config.splits, config.split_files, strict=False))
    return ["--split-file", str(files[split])] if split in files else []


def _compare(config: ReproduceConfig, plan: dict[tuple[Row, int], FitConfig]) -> Path:
    results: Results = {}
    for (row, split), run in plan.items():
        splits = results.setdefault(row, {})
        if finished(run):
            splits[split] = logged_scores(read_metrics(run.run.out), tuple(row.iou))
    name = "all-labels" if config.all_labels else config.method
    path = config.out / f"table{config.table}-{config.variant}-{name}.md"
    if rank() == 0:
        write_comparison(path, f"Table {config.table}, {name}, variant {config.variant}", results)
    return path
