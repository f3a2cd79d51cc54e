"""Every constant of the paper's settings, for each variant, against a table written apart from the code."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from train.augment import build_augmentation
from train.config import FitConfig
from train.contrast import build_branch
from train.paper.rows import Row, rows
from train.paper.variants import Variant, variant_config, with_all_labels

VARIANTS: tuple[Variant, ...] = ("paper", "released", "published")
KINDS = ("cityscapes/dv2", "cityscapes/dv3plus", "voc/dv2", "voc/dv3plus", "gta5/dv2")

# By option: one value for all, or one for each variant, or (in a dict) exceptions for some kinds of rows.
SAME: dict[str, Any] = {
    "model.branches": 2,
    "model.pretrained": True,
    "method.method": "contrast",
    "method.ramp": 2000,
    "method.memory_start": 1000,
    "method.contrast_start": 2000,
    "method.supervised_weight": 1.0,
    "method.pseudo_weight": 1.0,
    "method.confidence_power": 6.0,
    "method.teacher_mode": "train",
    "method.memory_rows": 256,
    "method.memory_sync": "gather",
    "method.contrast_dim": 256,
    "method.confidence": 0.95,
    "method.objective": "positive",
    "method.memory": "teacher",
    "method.remember": "fixed",
    "method.temperature": 0.1,
    "method.base_temperature": 0.07,
    "method.anchors": 1024,
    "method.views": 100,
    "method.last_steps": 100,
    "optim.precision": "float32",
    "optim.accumulate": 1,
    "optim.tf32": "convolutions",
    "optim.cudnn_benchmark": False,
    "optim.compile": False,
    "optim.optimizer": "sgd",
    "optim.momentum": 0.9,
    "optim.weight_decay": 5e-4,
    "optim.ema": 0.995,
    "optim.ema_schedule": "cosine",
    "run.evaluate_every": 1000,
}
BY_VARIANT: dict[str, tuple[Any, Any, Any]] = {
    "method.variant": ("paper", "released", "released"),
    "method.ramp_shape": ("step", "smooth", "smooth"),
    "method.unlabelled_classmix": (0.8, 0.75, 0.75),
    "method.labelled_jitter": (0.15, 0.125, 0.125),
    "method.unlabelled_jitter": (0.3, 0.25, 0.25),
    "method.blur": ("random", "horizontal", "horizontal"),
    "method.source_steps": ("alternate", "last", "alternate"),
    "optim.steps": (150000, 150000, 100000),
    "optim.repeated_updates": (False, False, True),
    "optim.restart_after": (0.0, 0.2, 0.0),
    "optim.renewal": (0, 1000, 0),
}
BY_KIND: dict[str, tuple[Any, Any, Any, Any, Any]] = {
    "data.dataset": ("cityscapes", "cityscapes", "voc", "voc", "cityscapes"),
    "data.scale": (0.5, 1.0, 1.0, 1.0, 0.5),
    "data.crop": (512, 512, 321, 321, 512),
    "data.labelled_batch": (5, 7, 14, 20, 5),
    "data.unlabelled_batch": (2, 3, 7, 10, 2),
    "method.class_weights": (True, True, False, False, True),
    "method.mix_background": (None, None, 0, 0, None),
    "method.contrast_weight": (0.1, 0.1, 0.1, 0.1, 0.2),
    "optim.seed": (5555, 5555, 7, 7, 5555),
}
BY_BOTH: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]] = {
    "optim.lr": ((2e-4, 4e-4, 2e-4, 4e-4, 2e-4), (2e-4, 4e-4, 2e-4, 2e-4, 2e-4), (2e-4, 4e-4, 2e-4, 2e-4, 2e-4)),
    "optim.ema_warmup": ((10,) * 5, (10, 10, 10, 10, 1), (10, 10, 10, 10, 1)),
    "method.entropy_weight": ((0.01,) * 5, (0.01, 0.01, 0.01, 0.01, 0.04), (0.04, 0.06, 0.14, 0.2, 0.04)),
    "method.voc_quota": ((False,) * 5, (False, False, True, True, False), (False, False, True, True, False)),
    "method.labelled_classmix": ((0.2,) * 5, (0.2, 0.2, 0.2, 0.2, 0.25), (0.2, 0.2, 0.2, 0.2, 0.25)),
}

LABELLED = {
    "cityscapes": {"1-30": 100, "1-15": 200, "1-8": 372, "1-6": 500, "1-4": 744, "1-3": 1000},
    "voc": {"1-50": 212, "1-20": 530, "1-8": 1323},
}
NETWORKS = {"dv2-imagenet": "deeplab_v2", "dv2-coco": "deeplab_v2_coco", "dv3plus-imagenet": "deeplab_v3plus"}


def expected(row: Row, variant: Variant) -> dict[str, Any]:
    experiment, network, ratio = row.name.split("/")
    kind, column = KINDS.index(f"{experiment}/{network.split('-')[0]}"), VARIANTS.index(variant)
    values = SAME | {name: by[column] for name, by in BY_VARIANT.items()}
    values |= {name: by[kind] for name, by in BY_KIND.items()} | {n: by[column][kind] for n, by in BY_BOTH.items()}
    labelled = LABELLED["voc" if experiment == "voc" else "cityscapes"][ratio]
    return values | {"data.labelled": labelled, "model.network": NETWORKS[network]}


def value(config: FitConfig, name: str) -> Any:
    part, field = name.split(".")
    return getattr(getattr(config, part), field)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", rows())
def test_constants(name: str, variant: Variant):
    row = rows()[name]
    config = variant_config(row, variant)
    config.check()
    for option, wanted in expected(row, variant).items():
        assert value(config, option) == (pytest.approx(wanted) if isinstance(wanted, float) else wanted), option


def test_the_table_has_every_option_of_the_method_and_the_optimiser():
    config = FitConfig()
    options = {f"{part}.{field.name}" for part in ("method", "optim") for field in fields(getattr(config, part))}
    assert options <= {*SAME, *BY_VARIANT, *BY_KIND, *BY_BOTH}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_an_image_may_add_to_the_memory(variant: Variant):
    more_than_one = {"cityscapes/1-30": 3, "gta5/1-30": 3, "voc/1-50": 1 if variant == "paper" else 7}
    for row in rows().values():
        experiment, _, ratio = row.name.split("/")
        method = replace(variant_config(row, variant).method, contrast_dim=8)
        branch = build_branch(method, 8, len(row.iou), 255, row.labelled)
        assert branch.quota == more_than_one.get(f"{experiment}/{ratio}", 1), row.name


def test_augmentation_of_the_variants():
    weak, strong = build_augmentation(variant_config(rows()["cityscapes/dv2-imagenet/1-30"], "released").method)
    assert (weak.classmix, weak.flip, weak.scale, weak.jitter, weak.jitter_strength, weak.blur) == (
        (0.2, 0.5, 0.5, 0.2, 0.125, 0.0)
    )
    assert (strong.classmix, strong.flip, strong.scale, strong.jitter, strong.jitter_strength, strong.blur) == (
        (0.75, 0.5, 0.8, 0.8, 0.25, 0.2)
    )
    assert strong.blur_horizontally and strong.blur_sigma == (0.1, 1.5) and strong.blur_kernel == 23
    assert weak.scale_range == strong.scale_range == (0.75, 1.75)
    weak, strong = build_augmentation(variant_config(rows()["voc/dv2-imagenet/1-50"], "paper").method)
    assert (weak.classmix, weak.jitter_strength) == (0.2, 0.15)
    assert (strong.classmix, strong.jitter_strength, strong.blur_horizontally) == (0.8, 0.3, False)


@pytest.mark.parametrize(
    ("name", "batch", "steps"), [("cityscapes/dv2-coco/1-8", 4, 80000), ("voc/dv2-coco/1-8", 14, 24000)]
)
def test_reference_with_all_labels(name: str, batch: int, steps: int):
    config = with_all_labels(variant_config(rows()[name], "released"))
    assert config.data.labelled == 1.0 and isinstance(config.data.labelled, float)
    assert (config.data.labelled_batch, config.optim.steps, config.optim.lr) == (batch, steps, 2e-4)
    assert config.method.method == "supervised" and not config.method.class_weights
