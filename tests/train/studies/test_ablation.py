"""The ablation: which runs it makes, that it goes on, and that its tables are the means and differences of them."""

from __future__ import annotations

import csv
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from train.command_line import main
from train.config import FitConfig
from train.errors import UserError
from train.studies import ablation as module
from train.studies.ablation import AblationConfig, ablation, planned
from train.studies.recipe import short_recipe


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> AblationConfig:
    return AblationConfig("folder", folder, labelled=(0.5,), seeds=(0, 1), steps=4, out=tmp_path / "ablation")


@pytest.fixture
def tiny_recipe(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(steps: int, seed: int) -> FitConfig:
        return replace(tiny, optim=replace(tiny.optim, steps=steps, seed=seed))

    monkeypatch.setattr(module, "short_recipe", short)


def numbers(path: Path) -> dict[tuple[str, int, str], float]:
    """Mean IoU by part, seed and network."""
    with open(path.with_suffix(".csv"), newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["class"] == "mean"]
    return {(line["part"], int(line["seed"]), line["network"]): float(line["iou"]) for line in lines}


def test_runs_differ_in_the_part_alone():
    config = AblationConfig("camvid", Path("data"), labelled=(0.0625, 23), seeds=(3, 4), steps=60)
    plan = planned(config, ["--crop", "40"])
    assert len(plan) == 2 * (2 * 4 + 1) and len({run.run.out for run in plan.values()}) == len(plan)
    for (part, labelled, seed), run in plan.items():
        assert run.method.method == {"released": "contrast", "all-labels": "supervised"}.get(part, part)
        assert run.method.variant == ("released" if part == "released" else "paper")
        assert run.data.labelled == (1.0 if part == "all-labels" else labelled) and run.optim.seed == seed
        same = replace(
            run,
            method=replace(run.method, method="contrast", variant="paper"),
            data=replace(run.data, dataset="landcover", root=None, labelled=0.1, crop=64),
            run=short_recipe(60, seed).run,
        )
        assert same == short_recipe(60, seed) and run.data.crop == 40
        assert run.run.evaluate_every == 60, "nothing may be chosen by the images of the table"


def test_table_has_means_spreads_and_paired_gains(settings: AblationConfig, tiny_recipe: None):
    path = ablation(settings, [])
    text, miou = path.read_text(), numbers(path)
    assert len(miou) == 2 * 5 + 2 * 3, "five students and three teachers for each seed"

    def cell(part: str, network: str) -> str:
        values = [miou[part, seed, network] for seed in (0, 1)]
        return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"

    student, teacher = text.split("## teacher")[0], text.split("## teacher")[1].split("## Gain")[0]
    for part, title in module.TITLES.items():
        assert f"| {title} | {cell(part, 'student')} |" in student
        if part not in ("supervised", "all-labels"):
            assert f"| {title} | {cell(part, 'teacher')} |" in teacher
    gains = [miou["contrast", seed, "student"] - miou["pseudo", seed, "student"] for seed in (0, 1)]
    line = f"{statistics.fmean(gains):+.1f} ± {statistics.stdev(gains):.1f}"
    assert f"| + class-memory contrast, over + pseudo-labels and entropy | {line} |" in text
    assert all(f"\n| {name} | " in text for name in ("sky", "grass", "brick"))


def test_finished_runs_are_not_trained_again(
    settings: AblationConfig, tiny_recipe: None, monkeypatch: pytest.MonkeyPatch
):
    settings = replace(settings, parts=("supervised", "contrast"), seeds=(0,))
    path = ablation(settings, [])
    before = path.read_text()
    trained = []
    monkeypatch.setattr(module, "fit", lambda run: trained.append(run.run.out.parent.name))
    assert ablation(settings, []).read_text() == before and not trained
    (path.parent / "contrast-0.5" / "seed0" / "metrics.jsonl").unlink()
    text = ablation(settings, []).read_text()
    assert trained == ["contrast-0.5"]
    assert "| + class-memory contrast | – |" in text, "an unfinished run has no number"


def test_a_class_that_does_not_occur_has_no_number():
    assert module._mean_spread([float("nan"), 2.0, 4.0]) == "3.0 ± 1.4"
    assert module._mean_spread([float("nan")]) == "–"


def test_bad_input_is_one_clear_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="--seeds, --labelled and --parts need at least one value each"):
        ablation(AblationConfig("folder", folder, seeds=(), out=tmp_path), [])
    arguments = ["ablation", "folder", str(folder), "--out", str(tmp_path / "a"), "--steps", "10"]
    assert main(arguments) == 2
    assert "--steps is 10: give at least 30" in capsys.readouterr().err
    arguments[-1] = "30"
    fast = ["--encoder", "test_efficientnet", "--no-pretrained", "--labelled-batch", "2", "--unlabelled-batch", "2"]
    fast += ["--parts", "supervised", "--seeds", "0", "--labelled", "6", "--crop", "32", "--device", "cpu"]
    assert main([*arguments, *fast, "--split", "test"]) == 2
    assert "data set 'folder' has no split 'test'" in capsys.readouterr().err
