"""What each part of the method adds: the same short training without it, over labelled fractions and seeds."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from train.checkpoint import CHECKPOINT
from train.config import FitConfig, parse_fit
from train.data.datasets import open_dataset
from train.distributed import choose_device
from train.errors import UserError
from train.evaluate import evaluate_checkpoint
from train.logs import finished
from train.loop import fit
from train.scores import Scores, markdown_table
from train.studies.recipe import short_recipe

Part = Literal["supervised", "pseudo", "contrast", "released", "all-labels"]

TITLES: dict[Part, str] = {
    "supervised": "labels only",
    "pseudo": "+ pseudo-labels and entropy",
    "contrast": "+ class-memory contrast",
    "released": "the same, contrast as in the released code",
    "all-labels": "all labels, nothing else",
}


@dataclass(frozen=True)
class AblationConfig:
    """Train a short recipe with and without parts of the method; tabulate. All options of `fit` can follow."""

    dataset: tyro.conf.Positional[Literal["camvid", "cityscapes", "voc", "folder"]]
    """Which data set; for the generated scenes, the one whose layout they have."""
    root: tyro.conf.Positional[Path]
    """Its folder."""
    labelled: tuple[int | float, ...] = (0.0625, 0.25)
    """Labelled training images: counts or fractions."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each draws its own labelled images, batches, augmentation and initial weights."""
    parts: tuple[Part, ...] = ("supervised", "pseudo", "contrast", "released", "all-labels")
    """Lines of the table; all-labels is trained once for each seed."""
    steps: int = 400
    """Steps of each run."""
    split: Literal["val", "test"] = "val"
    """Images that the table is about. For settings that were chosen on val, take test, if the data set has one."""
    out: Path = Path("runs/ablation")
    """Folder of the runs and the table. Finished runs in it are not trained again."""


Run = tuple[Part, int | float, int]
"""Part, labelled images (1.0 for all), seed."""

Results = dict[Run, dict[str, Scores]]
"""Scores by network of the runs that are finished."""


def ablation(config: AblationConfig, overrides: list[str]) -> Path:
    """Train the unfinished runs; write the table after each run.

    Args:
        config: what to run.
        overrides: options of `fit` for all runs.

    Returns:
        the path of the table.

    Raises:
        UserError: unusable options, or a run that cannot be trained.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    if not config.seeds or not config.labelled or not config.parts:
        raise UserError("--seeds, --labelled and --parts need at least one value each")
    open_dataset(config.dataset, config.split, config.root)  # fails before anything is trained
    plan = planned(config, overrides)
    for run in plan.values():
        if not finished(run):
            print(run.run.out, flush=True)
            fit(run)
            _write(config, plan)
    return _write(config, plan)


def planned(config: AblationConfig, overrides: list[str]) -> dict[Run, FitConfig]:
    """All runs, seed by seed, so that an unfinished ablation has complete seeds."""
    plan: dict[Run, FitConfig] = {}
    for seed in config.seeds:
        for labelled in config.labelled:
            for part in config.parts:
                key: Run = (part, 1.0 if part == "all-labels" else labelled, seed)
                plan[key] = _planned(config, overrides, *key)
    return plan


def _planned(config: AblationConfig, overrides: list[str], part: Part, labelled: int | float, seed: int) -> FitConfig:
    base = short_recipe(config.steps, seed)
    data = replace(base.data, dataset=config.dataset, root=config.root, labelled=labelled)
    if part == "released":
        method = replace(base.method, method="contrast", variant="released")
    else:
        method = replace(base.method, method="supervised" if part == "all-labels" else part, variant="paper")
    out = config.out / (part if part == "all-labels" else f"{part}-{labelled:g}") / f"seed{seed}"
    # evaluated once, at the end: nothing is chosen by these images
    run = replace(base.run, out=out, evaluate_every=config.steps)
    return parse_fit(overrides, replace(base, data=data, method=method, run=run))


def _tables(config: AblationConfig, results: Results) -> list[str]:
    """Markdown: mean IoU by part and labelled images, gains from line to line, IoU of each class."""
    seeds = ", ".join(str(seed) for seed in sorted({seed for _, _, seed in results}))
    parts = [
        f"# {config.dataset}: what each part adds",
        f"Mean IoU, %, on the {config.split} images after the last of {config.steps} steps: mean and, from two seeds "
        f"on, sample standard deviation over the seeds ({seeds or 'none finished'}), each of which has labelled "
        f"images, batches and initial weights of its own.",
    ]
    for network in ("student", "teacher"):
        parts += [f"## {network}", _table(config, results, network)]
    parts += [
        "## Gain of each line over the one before",
        "Of the student, points of mean IoU; differences are taken seed by seed, where labelled images and batches are "
        "the same, so their spread is that of the gain.",
        _gains(config, results),
    ]
    for labelled in config.labelled:
        parts += [f"## Classes, {_share(labelled)} labelled (student)", _classes(config, results, labelled)]
    return parts


def _table(config: AblationConfig, results: Results, network: str) -> str:
    table = [["", *(f"{_share(labelled)} labelled" for labelled in config.labelled)]]
    for part in config.parts:
        cells = [_mean_spread(_miou(results, part, labelled, network).values()) for labelled in config.labelled]
        table.append([TITLES[part], *cells])
    return markdown_table(table)


def _gains(config: AblationConfig, results: Results) -> str:
    table = [["", *(f"{_share(labelled)} labelled" for labelled in config.labelled)]]
    before = {"pseudo": "supervised", "contrast": "pseudo", "released": "pseudo"}
    for part, base in before.items():
        if part in config.parts and base in config.parts:
            cells = []
            for labelled in config.labelled:
                ours, theirs = (_miou(results, name, labelled, "student") for name in (part, base))
                cells.append(_mean_spread([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()], "+"))
            table.append([f"{TITLES[part]}, over {TITLES[base]}", *cells])
    return markdown_table(table)


def _classes(config: AblationConfig, results: Results, labelled: int | float) -> str:
    columns = {part: _of_part(results, part, labelled, "student") for part in config.parts}
    names = next((scores.iou.keys() for column in columns.values() for scores in column.values()), ())
    table = [["IoU, %", *(TITLES[part] for part in config.parts)]]
    for name in names:
        cells = [_mean_spread(100 * scores.iou[name] for scores in column.values()) for column in columns.values()]
        table.append([name, *cells])
    return markdown_table(table)


def _miou(results: Results, part: Part, labelled: int | float, network: str) -> dict[int, float]:
    return {seed: 100 * scores.miou for seed, scores in _of_part(results, part, labelled, network).items()}


def _of_part(results: Results, part: Part, labelled: int | float, network: str) -> dict[int, Scores]:
    """Scores by seed."""
    labelled = 1.0 if part == "all-labels" else labelled
    return {
        seed: scores[network]
        for (of_part, of_labelled, seed), scores in results.items()
        if (of_part, of_labelled) == (part, labelled) and network in scores
    }


def _mean_spread(values: Iterable[float], sign: str = "") -> str:
    values = [value for value in values if not math.isnan(value)]  # a class that does not occur is NaN
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.1f}{spread}"


def _share(labelled: int | float) -> str:
    return f"{100 * labelled:g} %" if isinstance(labelled, float) else f"{labelled} images"


def _write(config: AblationConfig, plan: dict[Run, FitConfig]) -> Path:
    results = {key: _scores(config, run) for key, run in plan.items() if finished(run)}
    path = config.out / "table.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(_tables(config, results)) + "\n", encoding="utf-8")
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "labelled", "seed", "network", "class", "iou"])
        for (part, labelled, seed), scores in results.items():
            for network, score in scores.items():
                for name, iou in {"mean": score.miou, **score.iou}.items():
                    writer.writerow([part, f"{labelled:g}", seed, network, name, f"{100 * iou:.2f}"])
    return path


def _scores(config: AblationConfig, run: FitConfig) -> dict[str, Scores]:
    """Of the last student and teacher on the split of the table, kept in the folder of the run."""
    path = run.run.out / f"scores-{config.split}.json"
    checkpoint = run.run.out / CHECKPOINT
    if not path.exists() or path.stat().st_mtime < checkpoint.stat().st_mtime:
        scores = evaluate_checkpoint(checkpoint, config.split, config.root, choose_device(run.run.device))
        path.write_text(json.dumps({name: {"iou": s.iou, "miou": s.miou} for name, s in scores.items()}))
    return {name: Scores(**plain) for name, plain in json.loads(path.read_text()).items()}
