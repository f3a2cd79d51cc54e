"""What each part of the method adds: the same short training without it, paired by seed, with intervals and power."""

from __future__ import annotations

import csv
import math
import multiprocessing
import statistics
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from train.config import FitConfig, MethodConfig, parse_fit
from train.data.datasets import open_dataset
from train.errors import UserError
from train.logs import Record, finished, read_metrics
from train.loop import fit
from train.scores import markdown_table
from train.studies.paired import paired
from train.studies.recipe import short_recipe

Arm = Literal["labels", "labels-infonce", "pseudo", "positive", "released", "infonce", "all-labels"]

TITLES: dict[Arm, str] = {
    "labels": "labels only",
    "labels-infonce": "labels + InfoNCE with queues (Wang et al.)",
    "pseudo": "+ pseudo-labels and entropy",
    "positive": "+ positive contrast with memory",
    "released": "the same as in the released code",
    "infonce": "+ InfoNCE with memory instead",
    "all-labels": "all labels, nothing else",
}

SETTINGS: dict[Arm, dict[str, Any]] = {
    "labels": {"method": "supervised"},
    "labels-infonce": {
        "method": "supervised_contrast",
        "objective": "infonce",
        "memory": "queues",
    },
    "pseudo": {"method": "pseudo"},
    "positive": {"method": "contrast"},
    "released": {"method": "contrast", "variant": "released", "blur": "horizontal"},
    "infonce": {"method": "contrast", "objective": "infonce"},
    "all-labels": {"method": "supervised"},
}
"""Options of the method in which the arms differ; all-labels differs in the labelled images too, and the weight of
InfoNCE is `AblationConfig.infonce_weight`."""

COMPARED: tuple[tuple[Arm, Arm], ...] = (
    ("labels-infonce", "labels"),
    ("pseudo", "labels"),
    ("positive", "pseudo"),
    ("released", "pseudo"),
    ("infonce", "pseudo"),
    ("positive", "labels"),
    ("all-labels", "labels"),
)


@dataclass(frozen=True)
class AblationConfig:
    """Train a short recipe with and without parts of the method; tabulate. All options of `fit` can follow."""

    dataset: tyro.conf.Positional[Literal["camvid", "cityscapes", "voc", "folder", "features"]]
    """Which data set; for the generated scenes, the one whose layout they have. features: of a frozen encoder."""
    root: tyro.conf.Positional[Path]
    """Its folder."""
    labelled: tuple[int | float, ...] = (0.0625,)
    """Labelled training images: counts or fractions."""
    seeds: tuple[int, ...] = tuple(range(8))
    """Each draws its own labelled images, batches, augmentation and initial weights, the same for all arms."""
    arms: tuple[Arm, ...] = ("labels", "pseudo", "positive", "released", "infonce", "all-labels")
    """Lines of the table; all-labels is trained once for each seed."""
    infonce_weight: float = 0.1
    """Factor of InfoNCE, in place of --contrast-weight: its loss is larger than the positive one (0.1: Wang et al.)."""
    steps: int = 400
    """Steps of each run."""
    last: int = 3
    """Evaluations at the end of a run, a twentieth of its steps apart, whose mean is its score."""
    split: Literal["val", "test"] = "val"
    """Images that the table is about. For settings that were chosen on val, take test, if the data set has one."""
    processes: int = 1
    """Runs at the same time, one thread each."""
    budget: float = math.inf
    """Seconds after which no further run is begun; the same command goes on."""
    out: Path = Path("runs/ablation")
    """Folder of the runs and the table. Finished runs in it are not trained again."""


Run = tuple[Arm, int | float, int]
"""Arm, labelled images (1.0 for all), seed."""

Results = dict[Run, dict[str, float]]
"""Means over the last evaluations, in percent, by their names in the log, of the runs that are finished."""


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
    if not config.seeds or not config.labelled or not config.arms:
        raise UserError("--seeds, --labelled and --arms need at least one value each")
    if min(config.processes, config.last) < 1:
        raise UserError(f"--processes is {config.processes}, --last is {config.last}: give at least 1")
    open_dataset(config.dataset, config.split, config.root)  # fails before anything is trained
    plan = planned(config, overrides)
    unfinished = [run for run in plan.values() if not finished(run)]
    end = time.monotonic() + config.budget
    if config.processes == 1:
        for run in unfinished:
            if time.monotonic() < end:
                _train(run)
                _write(config, plan)
    else:
        _train_beside(config, plan, unfinished, end)
    return _write(config, plan)


def _train_beside(config: AblationConfig, plan: dict[Run, FitConfig], runs: list[FitConfig], end: float) -> None:
    context = multiprocessing.get_context("spawn")
    queue = iter(runs)
    with ProcessPoolExecutor(config.processes, context) as pool:
        going: set[Future[None]] = set()
        while True:
            while len(going) < config.processes and time.monotonic() < end and (run := next(queue, None)):
                going.add(pool.submit(_train, run, 1))
            if not going:
                return
            done, going = wait(going, return_when=FIRST_COMPLETED)
            _write(config, plan)
            for future in done:
                future.result()


def _train(run: FitConfig, threads: int | None = None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    print(run.run.out, flush=True)
    fit(run)


def planned(config: AblationConfig, overrides: list[str]) -> dict[Run, FitConfig]:
    """All runs, seed by seed, so that an unfinished ablation has complete seeds."""
    plan: dict[Run, FitConfig] = {}
    for seed in config.seeds:
        for labelled in config.labelled:
            for arm in config.arms:
                key: Run = (arm, 1.0 if arm == "all-labels" else labelled, seed)
                plan[key] = _planned(config, overrides, *key)
    return plan


def _planned(config: AblationConfig, overrides: list[str], arm: Arm, labelled: int | float, seed: int) -> FitConfig:
    base = short_recipe(config.steps, seed)
    data = replace(base.data, dataset=config.dataset, root=config.root, labelled=labelled, evaluate=config.split)
    model = base.model
    if config.dataset == "features":
        from train.data.features import read_meta

        model = replace(model, network="head", in_channels=read_meta(config.root)["channels"])
    out = config.out / config.split / (arm if arm == "all-labels" else f"{arm}-{labelled:g}") / f"seed{seed}"
    every = max(1, config.steps // 20)
    first = config.steps - (config.last - 1) * every
    run = replace(base.run, out=out, evaluate_every=every, evaluate_from=first, checkpoint_every=config.steps)
    given = parse_fit(overrides, replace(base, data=data, model=model, run=run))
    method: MethodConfig = replace(given.method, **SETTINGS[arm])  # the arm comes last: it is what is compared
    if method.objective == "infonce":
        method = replace(method, contrast_weight=config.infonce_weight)
    return replace(given, method=method)


def _results(config: AblationConfig, plan: dict[Run, FitConfig]) -> Results:
    results: Results = {}
    for key, run in plan.items():
        if finished(run):
            evaluated = [record for record in read_metrics(run.run.out) if "miou/student" in record][-config.last :]
            results[key] = _mean_record(evaluated)
    return results


def _mean_record(records: list[Record]) -> dict[str, float]:
    names = [name for name in records[-1] if name.startswith(("miou/", "iou_student/"))]
    values = {name: [r[name] for r in records if r.get(name) is not None] for name in names}
    return {name: 100 * statistics.fmean(given) for name, given in values.items() if given}


def _of(results: Results, arm: Arm, labelled: int | float, name: str = "miou/student") -> dict[int, float]:
    """A number by seed."""
    share = 1.0 if arm == "all-labels" else labelled
    return {seed: r[name] for (a, s, seed), r in results.items() if (a, s) == (arm, share) and name in r}


def _tables(config: AblationConfig, results: Results) -> list[str]:
    parts = [
        f"# {config.dataset}: what each part adds",
        f"Mean IoU, %, on the {config.split} images: of a run, the mean of its last {config.last} evaluations, of "
        f"{config.steps} steps. Seeds share labelled images, initial weights, batches and views between the arms.",
    ]
    for labelled in config.labelled:
        share = f"{100 * labelled:g} %" if isinstance(labelled, float) else f"{labelled} images"
        arms = [["", "seeds", "student", "teacher"]]
        for arm in config.arms:
            student = _of(results, arm, labelled)
            teacher = _of(results, arm, labelled, "miou/teacher")
            arms.append([TITLES[arm], str(len(student)), _mean_spread(student), _mean_spread(teacher)])
        parts += [f"## {share} labelled", "Mean and sample deviation over the seeds.", markdown_table(arms)]
        parts += [
            "Paired differences of the students, in points: mean with its 95 % interval (Student's t, not corrected "
            "for the number of comparisons), deviation of a pair, the difference that so many pairs detect with 80 % "
            "power, and how many would detect one point.",
            _differences(config, results, labelled),
            markdown_table(_classes(config, results, labelled)),
        ]
    return parts


def _differences(config: AblationConfig, results: Results, labelled: int | float) -> str:
    table = [["", "seeds", "difference", "deviation", "detectable", "seeds for 1 point"]]
    for arm, base in COMPARED:
        if not {arm, base} <= set(config.arms):
            continue
        ours, theirs = _of(results, arm, labelled), _of(results, base, labelled)
        seeds = sorted(ours.keys() & theirs.keys())
        cells = ["–"] * 4
        if len(seeds) > 1:
            p = paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            mark = "**" if p.excludes_zero else ""
            interval = f"{mark}{p.mean:+.2f} [{p.mean - p.half:+.2f}, {p.mean + p.half:+.2f}]{mark}"
            cells = [interval, f"{p.spread:.2f}", f"{p.detectable:.2f}", str(p.pairs_for(1.0))]
        table.append([f"{TITLES[arm]} − {TITLES[base]}", str(len(seeds)), *cells])
    return markdown_table(table)


def _classes(config: AblationConfig, results: Results, labelled: int | float) -> list[list[str]]:
    names = sorted({name for result in results.values() for name in result if name.startswith("iou_student/")})
    table = [["IoU of the student, %", *config.arms]]
    for name in names:
        table.append([name.split("/")[1], *(_mean_spread(_of(results, arm, labelled, name)) for arm in config.arms)])
    return table


def _mean_spread(by_seed: dict[int, float]) -> str:
    values = list(by_seed.values())
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def _write(config: AblationConfig, plan: dict[Run, FitConfig]) -> Path:
    results = _results(config, plan)
    path = config.out / f"table-{config.split}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(_tables(config, results)) + "\n", encoding="utf-8")
    with open(path.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "labelled", "seed", "name", "iou"])
        for (arm, labelled, seed), numbers in results.items():
            writer.writerows([arm, f"{labelled:g}", seed, name, f"{value:.2f}"] for name, value in numbers.items())
    return path
