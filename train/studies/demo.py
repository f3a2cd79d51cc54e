"""The demo: the same short training with and without pseudo-labels and contrast, on the built-in land cover."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from train.checkpoint import CHECKPOINT
from train.config import DataConfig, FitConfig, MethodConfig
from train.data.datasets import open_dataset
from train.data.splits import covering_seed
from train.distributed import choose_device
from train.evaluate import evaluate_checkpoint
from train.loop import fit
from train.scores import percent
from train.session import open_session
from train.studies.recipe import short_recipe
from train.studies.report import RunResult, test_split, write_report
from train.studies.seeds import TITLES, write_seed


@dataclass(frozen=True)
class DemoConfig:
    """Train on a few labelled tiles with labels only, with pseudo-labels, and with the contrast; write a report."""

    out: Path = Path("runs/demo")
    """Folder of the report and the runs. An interrupted demo is continued."""
    steps: int = 300
    """Steps of each run."""
    labelled: int | float = 5
    """Training tiles with labels: a count or a fraction."""
    seed: int = 0
    """Seed of the choice of labelled tiles, the batches, the augmentation and the initial weights."""
    budget: float = 450.0
    """Seconds; the reference with all labels is left out if it would end later than this."""
    pretrained: bool = True
    """Start from ImageNet weights."""
    device: str = "auto"
    """auto takes CUDA, then Apple's MPS, then the CPU; or a torch device such as cuda:1."""


def demo_configs(demo: DemoConfig) -> dict[str, FitConfig]:
    """Configurations of the runs by key. They differ in the method, and the reference in the share of labels."""
    base = short_recipe(demo.steps, demo.seed, demo.device, demo.pretrained)
    draw = covering_seed(open_dataset("landcover", "train"), demo.labelled, demo.seed)
    base = replace(
        base,
        data=replace(base.data, labelled=demo.labelled, split_seed=draw),
        # ice, a thirtieth of the pixels, would weigh as much as all other classes
        # a teacher with the statistics of its few images was 10 points worse on the validation tiles
        method=replace(base.method, class_weights=False, teacher_mode="eval"),
        # the half cosine, made for long trainings, keeps the teacher of the first steps
        optim=replace(base.optim, ema=0.95, ema_schedule="constant"),
    )

    def run(key: str, method: MethodConfig, data: DataConfig) -> FitConfig:
        return replace(base, method=method, data=data, run=replace(base.run, out=demo.out / key))

    configs = {
        method: run(method, replace(base.method, method=method), base.data)
        for method in ("supervised", "pseudo", "contrast")
    }
    configs["all_labels"] = run("all_labels", configs["supervised"].method, replace(base.data, labelled=1.0))
    return configs


def run_demo(demo: DemoConfig) -> Path:
    """Train the unfinished runs, and write the report.

    Returns:
        the path of the report.

    Raises:
        UserError: unusable options, or a run folder in ``demo.out`` of other options.
        Interrupted: on SIGINT or SIGTERM, after saving.
    """
    start = time.perf_counter()
    configs = demo_configs(demo)
    runs: dict[str, RunResult] = {}
    reference_estimate = 0.0
    for key, config in configs.items():
        begin = time.perf_counter()
        if key == "all_labels" and begin - start + reference_estimate > demo.budget:
            print(f"{TITLES[key]}: left out, it would not end within --budget {demo.budget:g} s", flush=True)
            continue
        fit(config)
        split = test_split(config.data)
        scores = evaluate_checkpoint(config.run.out / CHECKPOINT, split, device=choose_device(demo.device))
        runs[key] = RunResult(TITLES[key], config, scores)
        miou, seconds = percent(scores["student"].miou), time.perf_counter() - begin
        print(f"{TITLES[key]}: mean IoU {miou} % on the {split} tiles, {seconds:.0f} s", flush=True)
        if key == "supervised":  # the reference takes as long
            reference_estimate = 1.2 * (time.perf_counter() - begin)

    write_seed(demo.out / "scores.json", demo.seed, {key: run.scores["student"] for key, run in runs.items()})
    # opened again, the finished runs are restored from their checkpoints
    sessions = {key: open_session(run.config) for key, run in runs.items()}
    return write_report(demo.out, runs, sessions)
