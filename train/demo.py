"""The demo: the same short training with and without pseudo-labels and contrast, on the built-in land cover."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from train.config import DataConfig, FitConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from train.errors import UserError
from train.evaluate import percent
from train.loop import fit
from train.report import RunResult, write_report
from train.session import open_session


@dataclass(frozen=True)
class DemoConfig:
    """Train on a few labelled tiles with labels only, with pseudo-labels, and with the contrast; write a report."""

    out: Path = Path("runs/demo")
    """Folder of the report and the runs. Started again, it goes on where it was interrupted."""
    steps: int = 300
    """Steps of each run."""
    labelled: int | float = 0.05
    """Training tiles with labels: a count or a fraction."""
    seed: int = 0
    """Seed of the choice of labelled tiles, the batches, the augmentation and the initial weights."""
    budget: float = 450.0
    """Seconds; the reference with all labels is left out if it would end later than this."""
    pretrained: bool = True
    """Start from ImageNet weights."""
    device: str = "auto"
    """auto takes CUDA, then Apple's MPS, then the CPU; or a torch device such as cuda:1."""


TITLES = {
    "supervised": "(a) labels only",
    "pseudo": "(b) + pseudo-labels",
    "contrast": "(c) + contrast",
    "all_labels": "all labels",
}


def demo_configs(demo: DemoConfig) -> dict[str, FitConfig]:
    """Configurations of the runs by key. They differ in the method, and the reference in the share of labels."""
    if demo.steps < 30:
        raise UserError(f"--steps is {demo.steps}: the demo needs at least 30 for its warm-ups to fit in")
    base = FitConfig(
        DataConfig(labelled=demo.labelled, crop=64, labelled_batch=8, unlabelled_batch=4),
        # The encoder is cut at stride 16 and the head is narrow, for CPUs; a tile has 6 x 6 pixels there.
        ModelConfig(
            pretrained=demo.pretrained,
            encoder_maps=(1, 3),
            atrous_rates=(1, 2, 3),
            aspp_channels=64,
            skip_channels=32,
            decoder_channels=64,
            aspp_dropout=0.1,
            decoder_dropout=0.1,
            # Two hundred tiles and a few hundred steps are too few to settle the statistics of all layers.
            encoder_statistics="imagenet",
            train_encoder_norm=True,
        ),
        # The warm-ups last a larger share of so short a training than in the paper, and the teacher is less sure.
        MethodConfig(
            ramp=demo.steps // 3,
            memory_start=demo.steps // 6,
            contrast_start=demo.steps // 4,
            contrast_dim=128,
            confidence=0.8,
            class_weights=False,  # snow, a thousandth of the pixels, would weigh as much as all the rest
        ),
        OptimConfig(steps=demo.steps, optimizer="adamw", lr=5e-4, weight_decay=0.01, ema=0.99, seed=demo.seed),
        RunConfig(
            device=demo.device,
            log_every=5,
            evaluate_every=max(1, demo.steps // 6),
            checkpoint_every=max(1, demo.steps // 6),
        ),
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
    """Train what is not trained yet, and write the report.

    Returns:
        the path of the report.

    Raises:
        UserError: unusable options, or a run folder in ``demo.out`` of other options.
        Interrupted: on SIGINT, after saving.
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
        runs[key] = RunResult(TITLES[key], config, fit(config))
        miou = {name: percent(score.miou) for name, score in runs[key].scores.items()}
        print(f"{TITLES[key]}: mean IoU {miou['student']} %, {time.perf_counter() - begin:.0f} s", flush=True)
        if key == "supervised":  # which the reference costs as much as
            reference_estimate = 1.2 * (time.perf_counter() - begin)

    # opened again, the finished runs are restored from their checkpoints
    contrast, supervised = open_session(configs["contrast"]), open_session(configs["supervised"])
    learners = {"contrast": contrast.training.learner, "supervised": supervised.training.learner}
    return write_report(demo.out, runs, learners, contrast)
