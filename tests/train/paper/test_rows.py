"""The rows of the paper: their names, their command line, their networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from train.command_line import main
from train.models import build_learner
from train.networks.deeplab_v2 import DeepLabV2
from train.networks.deeplab_v3plus import DeepLabV3Plus
from train.paper.rows import rows, rows_of_table
from train.paper.variants import RowOptions, parse_row, row_config

CITYSCAPES = [
    *("dv2-imagenet/1-30", "dv2-coco/1-30", "dv3plus-imagenet/1-30", "dv2-imagenet/1-15"),
    *("dv2-imagenet/1-8", "dv2-coco/1-8", "dv3plus-imagenet/1-8", "dv2-imagenet/1-6"),
    *("dv2-imagenet/1-4", "dv2-coco/1-4", "dv3plus-imagenet/1-4", "dv2-imagenet/1-3"),
]
VOC = [f"{net}/1-{part}" for part in (50, 20, 8) for net in ("dv2-imagenet", "dv2-coco", "dv3plus-imagenet")]
GTA5 = [f"dv2-imagenet/1-{part}" for part in (30, 15, 6, 3)]


def test_names_in_the_order_of_the_tables():
    names = [f"cityscapes/{name}" for name in CITYSCAPES] + [f"voc/{name}" for name in VOC]
    names += [f"gta5/{name}" for name in GTA5]
    assert list(rows()) == names and len(names) == 25
    assert [len(rows_of_table(table)) for table in (1, 2, 3)] == [12, 9, 4]


def test_list_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]):
    assert main(["rows"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(rows())
    assert " ".join(lines[2].split()) == (
        "cityscapes/dv3plus-imagenet/1-30 table 1 100 labelled deeplab_v3plus batch 7 + 3 crop 512 of 1 size "
        "lr 0.0004 mIoU 64.8"
    )
    for line, (name, row) in zip(lines, rows().items(), strict=True):
        rate = f" lr {row_config(RowOptions(name, Path('data'))).optim.lr:g} "
        released = row_config(RowOptions(name, Path("data"), variant="released")).optim.lr
        assert rate in line and (f"(released {released:g})" in line) == (f" lr {released:g} " != rate), row
    assert sum("(released 0.0002)" in line for line in lines) == 3


@pytest.mark.parametrize("name", rows())
def test_command_line_of_a_row(name: str):
    row = rows()[name]
    config = parse_row(["--row", name, "--data", "folder", "--split", "2", "--variant", "released"])
    config.check()
    assert config.method.variant == "released" and config.data.labelled == row.labelled
    assert (config.data.root, config.data.split_seed) == (Path("folder") / row.dataset, 2)
    assert config.data.source_root == (Path("folder/gta5") if name.startswith("gta5") else None)
    coco = "folder/weights/resnet101COCO-41f33a49.pth"
    assert config.model.weights == (coco if "-coco/" in name else "imagenet")
    assert config.run.out == Path("runs") / name / "released-contrast" / "split2"


def test_options_override_the_values_of_a_row():
    row = ["--row", "voc/dv2-coco/1-20", "--data", "d"]
    config = parse_row([*row, "--method", "pseudo", "--steps", "9", "--crop", "64", "--labelled", "0.5", "--out", "o"])
    assert (config.method.method, config.optim.steps, config.data.crop, config.data.labelled) == ("pseudo", 9, 64, 0.5)
    assert config.run.out == Path("o") and config.data.labelled_batch == 14
    assert parse_row([*row, "--method", "supervised"]).run.out.parent.name == "paper-supervised"
    assert parse_row([*row, "--weights", "mine.pth"]).model.weights == "mine.pth"
    reference = parse_row(["--row", "gta5/dv2-imagenet/1-30", "--data", "d", "--all-labels"])
    assert reference.data.labelled == 1.0 and reference.run.out.parent.name == "paper-all-labels"
    assert reference.data.source_root is None and reference.method.method == "supervised"
    with pytest.raises(SystemExit):
        parse_row([*row, "--no-such-option"])


@pytest.mark.parametrize("name", rows())
def test_network_and_branch_of_a_row_at_full_size(name: str):
    """On the meta device, which has shapes only; `test_networks.py` has those of the maps at these crops."""
    row = rows()[name]
    config = row_config(RowOptions(name, Path("folder")))
    classes = {"cityscapes": 19, "voc": 21}[row.dataset]
    with torch.device("meta"):
        model = replace(config.model, pretrained=False)
        learner = build_learner(replace(config, model=model), classes, 255, row.labelled)
    network, branch = learner.network, learner.branch
    plus, coco = "dv3plus" in name, "coco" in name
    assert [len(stage) for stage in network.backbone.children() if isinstance(stage, nn.Sequential)] == (
        [3, 4, 6, 3] if plus else [3, 4, 23, 3]
    )
    assert type(network) is (DeepLabV3Plus if plus else DeepLabV2) and network.bgr == coco
    assert config.data.crop == {"cityscapes": 512, "voc": 321}[row.dataset]
    channels = 256 if plus else 2048
    last = network.classifier if plus else network.classifier.convs[1]
    assert last.weight.shape[:2] == (classes, channels)
    assert branch is not None and branch.memory.rows.shape == (classes, 256, 256)
    assert branch.project.first.weight.shape == (256, channels)
    assert branch.quota == max(1, round(256 / row.labelled))
