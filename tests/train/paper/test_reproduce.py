"""Rows of the paper on generated data, from the command line to the comparison."""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import signal
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.models.segmentation.deeplabv3 import ASPP

from train import loop, models
from train.checkpoint import read_checkpoint
from train.command_line import main
from train.config import FitConfig
from train.config_file import to_plain
from train.data.scenes.layouts import make_scenes
from train.evaluate import evaluate_checkpoint
from train.logs import BEST, read_metrics
from train.networks import Colour, backbone, deeplab_v2, deeplab_v3plus
from train.networks.backbone import Backbone
from train.networks.base import DeepLab
from train.paper.comparison import Line, write_comparison
from train.paper.rows import rows, rows_of_table
from train.paper.variants import RowOptions, fit_config, parse_row
from train.scores import Scores
from train.session import open_session
from train.step import training_step

SMALL = [
    *("--steps", "3", "--crop", "40", "--labelled", "4", "--labelled-batch", "2", "--unlabelled-batch", "2"),
    *("--no-pretrained", "--workers", "0", "--device", "cpu", "--contrast-dim", "8", "--memory-rows", "8"),
    *("--memory-start", "0", "--contrast-start", "0", "--last-steps", "1", "--confidence", "0", "--log-every", "1"),
    *("--renewal", "2"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for kind in ("cityscapes", "voc", "gta5"):
        make_scenes(kind, root / kind, train=8, val=2, size=(48, 64))
    return root


class Thin(Bottleneck):
    """A block with an eighth of the channels inside."""

    def __init__(self, inplanes, planes, stride=1, downsample=None, groups=1, base_width=64, *rest, **options) -> None:
        super().__init__(inplanes, planes, stride, downsample, groups, base_width // 8, *rest, **options)


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper's networks with one thin block a stage and no atrous convolution in ASPP, to be saved quickly."""
    monkeypatch.setattr(backbone, "Bottleneck", Thin)
    for module in (deeplab_v2, deeplab_v3plus):
        monkeypatch.setattr(module, "Backbone", lambda blocks, *rest: Backbone((1, 1, 1, 1), *rest))
    monkeypatch.setattr(deeplab_v3plus, "ASPP", lambda channels, rates: ASPP(channels, []))


class TwoLayers(DeepLab):
    """Stands for the networks where only the way through the program matters, which all rows are to go."""

    feature_channels = 8

    def __init__(self, name: str, num_classes: int, mean: Colour, branches: int) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, stride=8, padding=1), mean)  # type: ignore[arg-type]
        self.classifier = nn.Conv2d(8, num_classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.backbone(x)
        return self.classifier(features), features


# ---- runs


@pytest.mark.parametrize(
    ("table", "name", "variant"),
    [
        (1, "cityscapes/dv3plus-imagenet/1-30", "paper"),
        (2, "voc/dv2-coco/1-50", "published"),
        (3, "gta5/dv2-imagenet/1-30", "released"),
    ],
)
def test_row_trains_resumes_and_is_compared(
    shallow: None,
    data: Path,
    tmp_path: Path,
    table: int,
    name: str,
    variant: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    command = ["reproduce", "--table", str(table), "--data", str(data), "--rows", name, "--splits", "1"]
    command += ["--variant", variant, "--out", str(tmp_path), *SMALL]
    run = tmp_path / name / f"{variant}-contrast" / "split1"

    # without interruption: the same steps by hand
    options = RowOptions(name, data, 1, variant)  # type: ignore[arg-type]
    session = open_session(fit_config(options, SMALL, tmp_path))
    batches = session.batches()
    for _ in range(3):
        training_step(session.training, *next(batches))
    whole = {part: getattr(session.training, part).state_dict() for part in ("learner", "teacher")}

    with monkeypatch.context() as patch:
        patch.setattr(loop, "training_step", lambda t, *b: (interrupted_step if t.step == 1 else training_step)(t, *b))
        assert main(command) == 130
    assert read_checkpoint(run / "last.pt")["training"]["step"] == 2
    assert main(command) == 0
    resumed = read_checkpoint(run / "last.pt")["training"]
    for part, state in whole.items():
        assert all(torch.equal(value, resumed[part][key]) for key, value in state.items())

    records = read_metrics(run)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert {"loss/contrast_labelled", "loss/contrast_unlabelled", "loss/pseudo"} <= records[-1].keys()
    report = (tmp_path / f"table{table}-{variant}-contrast.md").read_text()
    assert report.count("not run") == len(rows_of_table(table)) - 1 and f"\n## {name}\n" in report
    with open(tmp_path / f"table{table}-{variant}-contrast.csv", newline="") as file:
        lines = {(line["row"], line["result"], line["class"]): line for line in csv.DictReader(file)}
    best = lines[name, BEST, "mean"]
    students = records[-1]["miou/student"], records[-1]["miou/renewed"]
    assert float(best["mean"]) == pytest.approx(100 * max(students), abs=0.006)
    assert float(best["printed"]) == rows()[name].miou and best["spread"] == "" and best["splits"] == "1"
    other = next(row.name for row in rows_of_table(table) if row.name != name)
    assert lines[other, BEST, "mean"]["mean"] == ""
    for network, scores in evaluate_checkpoint(run / "last.pt").items():
        assert scores.miou == records[-1][f"miou/{network}"]
        assert [records[-1][f"iou_{network}/{label}"] for label in scores.iou] == [
            None if math.isnan(iou) else iou for iou in scores.iou.values()
        ]

    # what is finished is not trained again, and needs no data
    written = (run / "last.pt").stat().st_mtime_ns
    capsys.readouterr()
    assert main(command) == 0
    assert (run / "last.pt").stat().st_mtime_ns == written
    assert capsys.readouterr().out.splitlines() == [f"comparison: {tmp_path / f'table{table}-{variant}-contrast.md'}"]
    for checkpoint in run.glob("*.pt"):
        checkpoint.unlink()  # they are large, and pytest keeps the folders


@pytest.mark.parametrize("table", [1, 2, 3])
def test_every_row_of_a_table_is_interrupted_resumed_evaluated_and_compared(
    data: Path, tmp_path: Path, table: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models, "build_network", TwoLayers)
    common = ["--data", str(data), *SMALL, "--steps", "2", "--renewal", "0"]
    for row in rows_of_table(table):
        out = tmp_path / row.name / "paper-contrast" / "split1"
        command = ["fit", "--row", row.name, "--split", "1", "--out", str(out), *common]
        with monkeypatch.context() as patch:
            patch.setattr(loop, "training_step", interrupted_step)
            assert main(command) == 130, row.name  # after one step
            patch.setattr(loop, "training_step", step := Mock(wraps=training_step))
            assert main(command) == 0 and step.call_count == 1, row.name
        records = read_metrics(out)
        assert [record["step"] for record in records] == [1, 2]
        assert {"loss/contrast_labelled", "loss/contrast_unlabelled"} <= records[-1].keys(), row.name
        for network, score in evaluate_checkpoint(out / "last.pt").items():
            assert score.miou == pytest.approx(records[-1][f"miou/{network}"], abs=1e-12), (row.name, network)
    # all are finished now: the comparison needs no step
    monkeypatch.setattr(loop, "training_step", None)
    assert main(["reproduce", "--table", str(table), "--splits", "1", "--out", str(tmp_path), *common]) == 0
    report = (tmp_path / f"table{table}-paper-contrast.md").read_text()
    assert "not run" not in report and report.count("\n## ") == len(rows_of_table(table))


def interrupted_step(*arguments):
    """A training step in which Ctrl-C is pressed."""
    os.kill(os.getpid(), signal.SIGINT)
    return training_step(*arguments)


def test_printed_commands_are_those_of_the_runs(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = [str(tmp_path / f"split {split}.txt") for split in (0, 5)]
    command = ["reproduce", "--table", "3", "--data", str(data), "--splits", "0", "5", "--method", "pseudo"]
    command += ["--variant", "released", "--out", str(tmp_path / "o"), "--split-files", *files, "--print-commands"]
    assert main([*command, *SMALL]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8 and not list(tmp_path.rglob("*.pt"))
    for index, line in enumerate(printed):
        words = shlex.split(line)
        assert words[:4] == ["python", "-m", "train", "fit"]
        config = parse_row(words[4:])
        name = rows_of_table(3)[index // 2].name
        split = (0, 5)[index % 2]
        assert config.run.out == tmp_path / "o" / name / "released-pseudo" / f"split{split}"
        assert config.data.split_file == Path(files[index % 2]) and config.data.split_seed == split
        assert config.method.method == "pseudo" and config.method.source_steps == "last" and config.optim.steps == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "1", "--rows", "voc/dv2-coco/1-50"], "rows voc/dv2-coco/1-50 are not of table 1"),
        (["--table", "1", "--rows", "dv2"], "unknown row 'dv2'"),
        (["--table", "1", "--split-files", "a.txt"], "1 split files for 3 splits"),
    ],
)
def test_bad_options(data: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str):
    assert main(["reproduce", "--data", str(data), "--print-commands", *options]) == 2
    assert message in capsys.readouterr().err


def test_run_of_other_options_is_not_taken_for_finished(tiny: FitConfig, data: Path, tmp_path: Path):
    command = ["reproduce", "--table", "1", "--data", str(data), "--rows", "cityscapes/dv2-imagenet/1-30"]
    command += ["--splits", "0", "--out", str(tmp_path), *SMALL]
    config = fit_config(RowOptions("cityscapes/dv2-imagenet/1-30", data), SMALL, tmp_path)
    run = config.run.out
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 3, "miou/student": 0.5}\n')
    older = to_plain(config)
    del older["optim"]["accumulate"]  # an option newer than the file has its default
    other = to_plain(replace(config, data=replace(config.data, crop=41)))
    for written, count in ((to_plain(config), 0), (other, 1), (older, 0), ([], 1)):
        (run / "config.json").write_text(json.dumps(written))
        assert main([*command, "--print-commands"]) == 0
        report = (tmp_path / "table1-paper-contrast.md").read_text()
        assert report.count("| not run |") == 11 + count


def test_make_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["make-data", "voc", str(tmp_path), "--train", "2", "--val", "1"]) == 0
    assert capsys.readouterr().out == f"generated {tmp_path / 'voc'}\n"
    assert len(list((tmp_path / "voc" / "VOC2012" / "JPEGImages").iterdir())) == 3
    assert main(["make-data", "voc", str(tmp_path)]) == 2


# ---- comparison


def constant(miou: float, classes: list[str]) -> Scores:
    return Scores(dict.fromkeys(classes, miou), miou)


def test_comparison_by_hand(tmp_path: Path):
    row, unrun = rows_of_table(1)[:2]  # printed 58.0 and 59.4; road 95.9, bicycle 63.0
    classes = list(row.iou)
    results = {
        split: {BEST: constant(best, classes), "student": constant(0.5, classes), "teacher": constant(0.6, classes)}
        for split, best in ((0, 0.57), (2, 0.60))
    }
    write_comparison(tmp_path / "c" / "table.md", "Title", {row: results, unrun: {}})
    lines = (tmp_path / "c" / "table.md").read_text().splitlines()
    assert f"| `{row.name}` | 0, 2 | 58.5 ± 2.1 | 50.0 ± 0.0 | 60.0 ± 0.0 | 58.0 | +0.5 |" in lines
    assert f"| `{unrun.name}` | – | not run | – | – | 59.4 | – |" in lines
    assert "| IoU, % | split 0 | split 2 | mean | spread | printed | difference |" in lines
    assert "| road | 57.0 | 60.0 | 58.5 | 2.1 | 95.9 | -37.4 |" in lines
    assert len([line for line in lines if line.startswith("## ")]) == 1
    table = (tmp_path / "c" / "table.csv").read_text().splitlines()
    assert table[0] == "row,result,class,splits,mean,spread,printed,difference"
    assert f'{row.name},"{BEST}",bicycle,2,58.50,2.12,63.00,-4.50' in table
    assert f"{unrun.name},teacher,mean,0,,,59.40," in table and len(table) == 1 + 2 * 3 * 20


def test_numbers_of_one_split_have_no_spread():
    line = Line([51.0], 50.0)
    assert (line.mean, line.difference) == (51.0, 1.0) and line.spread != line.spread


def test_a_class_that_one_split_lacks_has_no_mean_and_no_spread():
    line = Line([51.0, float("nan")], 50.0)
    assert line.mean != line.mean and line.spread != line.spread


def test_doubts_about_the_printed_numbers_are_shown(tmp_path: Path):
    write_comparison(tmp_path / "table.md", "Title", {row: {} for row in rows_of_table(3)})
    text = (tmp_path / "table.md").read_text()
    assert text.count("the released command, known for 1/30 only, trains DeepLabV2") == 4
