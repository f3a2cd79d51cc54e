"""The command line: commands, help, exit status, one line for each mistake."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from train_helpers import ROOT, TINY_OPTIONS

from train.command_line import COMMANDS, EvaluateConfig, MakeDataConfig, main
from train.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from train.data.check import CheckConfig
from train.data.features import FeaturesConfig
from train.paper.compare import CompareConfig
from train.paper.figures import FiguresConfig
from train.paper.reproduce import ReproduceConfig
from train.paper.variants import RowOptions
from train.studies.ablation import AblationConfig
from train.studies.demo import DemoConfig

TINY = [
    *("--dataset", "folder", "--labelled", "6", "--crop", "32", "--labelled-batch", "3", "--unlabelled-batch", "2"),
    *(*TINY_OPTIONS, "--memory-rows", "8", "--memory-start", "1", "--contrast-start", "2", "--steps", "4"),
]

POSITIONAL = (EvaluateConfig, MakeDataConfig, CheckConfig, FiguresConfig, AblationConfig)


def test_fit_then_evaluate(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert main(["fit", "--root", str(folder), "--out", str(out), *TINY]) == 0
    trained = capsys.readouterr().out
    assert "| **mean** |" in trained and "grass" in trained and str(out) in trained
    assert {path.name for path in out.iterdir()} == {
        "last.pt",
        "best.pt",
        "config.json",
        "lock",
        "metrics.jsonl",
        "tensorboard",
    }
    assert trained.startswith("| IoU, % | student | teacher | student, best on val |")
    assert main(["evaluate", str(out / "last.pt"), "--device", "cpu"]) == 0
    cells = [[line.split(" | ")[:3] for line in text.splitlines()] for text in (capsys.readouterr().out, trained)]
    assert [[*row[:2], row[2].removesuffix(" |")] for row in cells[0]] == cells[1][:-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--root", "nowhere"], "nowhere"),
        (["--labelled", "99"], "99 labelled images"),
        (["--scale", "0.5"], "scale 0.5"),
        (["--source-root", "gta"], "--source-root has the classes of cityscapes, not of folder"),
        (["--repeated-updates"], "--repeated-updates counts tensors of the paper's networks"),
        (["--split-file", "nowhere.txt"], "nowhere.txt"),
        (["--network", "deeplab_v2_coco", "--pretrained"], "no weights to download"),
        (["--network", "deeplab_v3plus", "--pretrained", "--weights", "nowhere.pth"], "nowhere.pth do not exist"),
        (["--row", "voc/unknown/1-3", "--data", "."], "unknown row 'voc/unknown/1-3': python -m train rows lists"),
        (["--labelled", "1.0"], "none is left for pseudo-labels"),
        (["--labelled-batch", "1"], "--labelled-batch is 1"),
        (["--steps", "0"], "--steps is 0"),
        (["--confidence", "1"], "--confidence is 1.0"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--encoder", "no_such_net"], "encoder 'no_such_net'"),
        (["--lr", "1e30", "--log-every", "1", "--method", "supervised"], "try a lower --lr"),
    ],
)
def test_bad_options_are_one_line_and_status_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
):
    assert main(["fit", "--root", str(folder), "--out", str(tmp_path / "run"), *TINY, *options]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_folder_needs_a_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["fit", "--dataset", "folder", "--out", str(tmp_path)]) == 2
    expected = "error: --dataset folder needs --root, the folder with images/, masks/ and classes.txt\n"
    assert capsys.readouterr().err == expected


def test_out_that_is_a_file(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert main(["fit", "--root", str(folder), "--out", str(tmp_path / "file"), *TINY]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(tmp_path / "last.pt")]) == 2
    assert f"error: checkpoint {tmp_path / 'last.pt'} does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "configs"),
    [
        ("fit", (DataConfig, ModelConfig, MethodConfig, OptimConfig, RunConfig)),
        ("evaluate", (EvaluateConfig,)),
        ("demo", (DemoConfig,)),
        ("fit --row any", (RowOptions,)),
        ("make-data", (MakeDataConfig,)),
        ("check", (CheckConfig,)),
        ("features", (FeaturesConfig,)),
        ("reproduce", (ReproduceConfig,)),
        ("compare", (CompareConfig,)),
        ("figures", (FiguresConfig,)),
        ("ablation", (AblationConfig,)),
    ],
)
def test_help_names_and_explains_every_option(
    command: str, configs: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for config in configs:
        for field in fields(config):
            positional = config in POSITIONAL and field.name in ("checkpoint", "kind", "data", "dataset", "root")
            positional |= config is FeaturesConfig and field.name in ("dataset", "out")
            assert positional or f"--{field.name.replace('_', '-')}" in text
        # an option without a line of explanation would be a field without the string below it
        source = inspect.getsource(config)
        assert source.count('    """') - 1 == len(fields(config))


def test_rows_and_help_start_without_torch():
    """Importing torch takes seconds."""
    code = (
        "import sys; from train.command_line import main; assert main(['rows']) == main(['--help']) == 0\n"
        "heavy = {'torch', 'timm', 'torchvision', 'matplotlib', 'numpy'} & sys.modules.keys(); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" labelled  deeplab") == 25 and "make-data" in done.stdout


def test_unknown_command_is_refused_with_a_list_of_all(capsys: pytest.CaptureFixture[str]):
    for arguments in (["trane"], []):
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert all(f"\n  {name} " in message for name in COMMANDS)


def test_only_some_commands_run_on_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["demo"]) == 2
    assert "error: torchrun is for fit, evaluate, reproduce: start demo with python -m train" in capsys.readouterr().err


def test_show_config_prints_what_would_train_and_stops(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    row = ["fit", "--row", "voc/dv2-coco/1-50", "--data", str(tmp_path), "--show-config", "--steps", "77"]
    assert main(row) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["optim"]["steps"] == 77 and shown["data"]["dataset"] == "voc" and shown["model"]["network"]
    assert not any(tmp_path.iterdir())
