"""The configuration of a row of the paper in each of three variants, which differ in fields only.

- ``paper``: as the paper describes the method. Some constants are inferred from its text.
- ``released``: as the authors' last code does it (October 2021); the command ``compare`` shows that. What is
  not repeated is in ``docs/variants.md``.
- ``published``: as the code was when the tables were made, as far as its history tells: ``released`` with two bugs
  that were fixed later, two thirds of the steps, and no restart from the best student.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from train.config import DataConfig, FitConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig, parse_fit
from train.paper.rows import Row, find_row

Variant = Literal["paper", "released", "published"]

COCO_WEIGHTS = "resnet101COCO-41f33a49.pth"
"""Usual name of the file with the COCO weights of DeepLabV2."""


@dataclass(frozen=True)
class RowOptions:
    """Train a row of the paper's tables, see `rows`. All options of `fit` can follow and override the row's values."""

    row: str
    """Name of the row."""
    data: Path
    """Folder that has the data sets as folders cityscapes/, voc/, gta5/, and the COCO weights in weights/."""
    split: int = 0
    """Number of the split: seed of the draw of the labelled images. For a released split, give --split-file too."""
    variant: Variant = "paper"
    """paper: as described. released: as the authors' code. published: as their code was for the tables."""
    method: Literal["supervised", "pseudo", "contrast"] = "contrast"
    """supervised: labels only. pseudo: and pseudo-labels of the teacher. contrast: the whole method."""
    all_labels: bool = False
    """Supervised by all labels, with the authors' batch and number of steps for that."""


def parse_row(arguments: list[str]) -> FitConfig:
    """The configuration of ``fit --row ...``.

    Raises:
        UserError: an unknown row.
        SystemExit: arguments that cannot be parsed, or ``--help``.
    """
    options, overrides = tyro.cli(RowOptions, prog="python -m train fit", args=arguments, return_unknown_args=True)
    return fit_config(options, overrides)


def fit_config(options: RowOptions, overrides: list[str], runs: Path = Path("runs")) -> FitConfig:
    """The configuration of a row, changed by options of `fit`. Errors as in :func:`parse_row`."""
    return parse_fit(overrides, row_config(options, runs))


def row_config(options: RowOptions, runs: Path = Path("runs")) -> FitConfig:
    """The whole configuration of one run, in a folder of its own in ``runs``.

    Raises:
        UserError: an unknown row.
    """
    row = find_row(options.row)
    config = variant_config(row, options.variant)
    source = options.data / "gta5" if row.adapts else None
    weights = str(options.data / "weights" / COCO_WEIGHTS) if row.pretraining == "COCO" else "imagenet"
    name = "all-labels" if options.all_labels else options.method
    out = runs / row.name / f"{options.variant}-{name}" / f"split{options.split}"
    config = replace(
        config,
        data=replace(config.data, root=options.data / row.dataset, split_seed=options.split, source_root=source),
        model=replace(config.model, weights=weights),
        method=replace(config.method, method=options.method),
        run=replace(config.run, out=out),
    )
    return with_all_labels(config) if options.all_labels else config


def variant_config(row: Row, variant: Variant) -> FitConfig:
    """Constants of a row in a variant; folders, weights and the split are still to be set."""
    sizes, voc, theirs = row.sizes, row.dataset == "voc", variant != "paper"
    views = 2 * sizes.unlabelled_batch
    # The mask of the entropy was broadcast over maps of another shape, which multiplied the entropy by the number of
    # views. It was fixed in the main script only, and after the tables were made.
    entropy_per_view = variant == "published" or (theirs and row.adapts)
    return FitConfig(
        DataConfig(
            dataset=row.dataset,
            labelled=row.labelled,
            scale=sizes.scale,
            crop=sizes.crop,
            labelled_batch=sizes.labelled_batch,
            unlabelled_batch=sizes.unlabelled_batch,
            workers=3,
        ),
        # Their DeepLabV2 returns after two of the four classifiers; the tables are of that network.
        ModelConfig(network=row.network, branches=2),
        MethodConfig(
            ramp=2000,
            ramp_shape="smooth" if theirs else "step",  # their pseudo-labels have a small weight from step 0 on
            memory_start=1000,
            contrast_start=2000,
            supervised_weight=1.0,
            pseudo_weight=1.0,
            confidence_power=6.0,
            entropy_weight=0.01 * views if entropy_per_view else 0.01,
            contrast_weight=0.2 if row.adapts else 0.1,
            class_weights=not voc,
            teacher_mode="train",
            memory_rows=256,
            contrast_dim=256,
            confidence=0.95,
            # Theirs gives all memory rows one weight, stores the lowest-scored rows, and applies the selectors to
            # other inputs than those they were trained on.
            variant="released" if theirs else "paper",
            voc_quota=theirs and voc,  # the paper has the same quota for all data sets
            mix_background=0 if voc else None,
            labelled_classmix=(0.25 if row.adapts else 0.2) if theirs else 0.2,
            unlabelled_classmix=0.75 if theirs else 0.8,  # the paper's table of augmentations is a little stronger
            labelled_jitter=0.125 if theirs else 0.15,
            unlabelled_jitter=0.25 if theirs else 0.3,
            blur="horizontal" if theirs else "random",  # a range of sigmas was passed as those of the two axes
            # Since 16 February 2021 their code does the opposite of its comment; before, it alternated to the end.
            # Which of the two trained Table 3 is not known; `published` follows the comment.
            source_steps="last" if variant == "released" else "alternate",
            last_steps=100,
        ),
        OptimConfig(
            steps=100_000 if variant == "published" else 150_000,  # their configurations grew in July 2021
            optimizer="sgd",
            lr=sizes.lr if theirs else row.paper_lr,
            momentum=0.9,
            weight_decay=5e-4,
            ema=0.995,
            ema_warmup=1.0 if theirs and row.adapts else 10.0,  # the script for Table 3 kept an older rule
            # Their optimiser held most tensors several times until October 2021.
            repeated_updates=variant == "published",
            # Both were added after the tables and, as the author says, untested.
            restart_after=0.2 if variant == "released" else 0.0,
            renewal=1000 if variant == "released" else 0,
            seed=row.seed,
        ),
        RunConfig(log_every=50, evaluate_every=1000, checkpoint_every=1000),
    )


def with_all_labels(config: FitConfig) -> FitConfig:
    """The fully supervised reference, as in early configurations of the authors: no class weights, fewer steps."""
    batch, steps = (14, 24_000) if config.data.dataset == "voc" else (4, 80_000)
    return replace(
        config,
        data=replace(config.data, labelled=1.0, labelled_batch=batch, source_root=None),
        method=replace(config.method, method="supervised", class_weights=False),
        optim=replace(config.optim, steps=steps, restart_after=0.0, renewal=0),
    )
