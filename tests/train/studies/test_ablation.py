"""The ablation: which runs it makes, that it goes on, and that its tables are the means and intervals of them."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from train.command_line import main
from train.config import FitConfig
from train.errors import UserError
from train.logs import read_metrics
from train.studies import ablation as module
from train.studies.ablation import AblationConfig, ablation, planned
from train.studies.paired import detectable, paired, t_cdf, t_quantile
from train.studies.recipe import short_recipe

ARMS = tuple(module.TITLES)


@pytest.fixture
def settings(folder: Path, tmp_path: Path) -> AblationConfig:
    return AblationConfig(
        "folder", folder, labelled=(0.5,), seeds=(0, 1), steps=4, last=2, arms=ARMS, out=tmp_path / "ablation"
    )


@pytest.fixture
def tiny_recipe(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(steps: int, seed: int) -> FitConfig:
        return replace(tiny, optim=replace(tiny.optim, steps=steps, seed=seed))

    monkeypatch.setattr(module, "short_recipe", short)


def numbers(path: Path, wanted: str = "miou/student") -> dict[tuple[str, int], float]:
    """A number by arm and seed."""
    with open(path.with_suffix(".csv"), newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["name"] == wanted]
    return {(line["arm"], int(line["seed"])): float(line["iou"]) for line in lines}


def test_warm_ups_of_a_short_training_are_parts_of_it():
    method = short_recipe(300, 0).method
    assert (method.ramp, method.memory_start, method.contrast_start) == (100, 50, 75)


def test_runs_differ_in_the_arm_alone():
    config = AblationConfig(
        "camvid", Path("data"), labelled=(0.0625, 23), seeds=(3, 4), steps=60, arms=ARMS, infonce_weight=0.2
    )
    plan = planned(config, ["--crop", "40", "--method", "pseudo"])
    assert len(plan) == 2 * (2 * 6 + 1) and len({run.run.out for run in plan.values()}) == len(plan)
    recipe = short_recipe(60, 3)
    for (arm, labelled, seed), run in plan.items():
        given = module.SETTINGS[arm] | ({"contrast_weight": 0.2} if "infonce" in arm else {})
        assert {name: getattr(run.method, name) for name in given} == given
        assert run.data.labelled == (1.0 if arm == "all-labels" else labelled) and run.optim.seed == seed
        assert replace(run.method, **{name: getattr(recipe.method, name) for name in given}) == recipe.method
        assert run.optim == short_recipe(60, seed).optim and run.model == recipe.model and run.data.crop == 40
        assert (run.run.evaluate_every, run.run.evaluate_from) == (3, 54)


@pytest.mark.filterwarnings("ignore:PixelContrastLoss. the loss is 0")  # crops are small
def test_table_has_means_of_the_last_evaluations_and_paired_intervals(settings: AblationConfig, tiny_recipe: None):
    path = ablation(settings, [])
    text, miou = path.read_text(), numbers(path)
    assert len(miou) == 2 * len(ARMS)
    for arm, seed in miou:
        folder = "all-labels" if arm == "all-labels" else f"{arm}-0.5"
        records = read_metrics(settings.out / "val" / folder / f"seed{seed}")
        scores = [record["miou/student"] for record in records if "miou/student" in record]
        assert len(scores) == 2 and miou[arm, seed] == pytest.approx(50 * sum(scores), abs=0.006)
    for arm, title in module.TITLES.items():
        values = [miou[arm, seed] for seed in (0, 1)]
        assert f"| {title} | 2 | {statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f} |" in text
    gains = [miou["positive", seed] - miou["pseudo", seed] for seed in (0, 1)]
    mean = float(
        text.split("| + positive contrast with memory − + pseudo-labels and entropy | 2 | ")[1].split()[0].strip("*")
    )
    assert mean == pytest.approx(statistics.fmean(gains), abs=0.02)
    assert all(f"\n| {name} | " in text for name in ("sky", "grass", "brick"))


def test_finished_runs_are_not_trained_again_and_the_budget_ends_it(
    settings: AblationConfig, tiny_recipe: None, monkeypatch: pytest.MonkeyPatch
):
    settings = replace(settings, arms=("labels", "positive"), seeds=(0,))
    path = ablation(settings, [])
    before = path.read_text()
    trained: list[str] = []
    monkeypatch.setattr(module, "fit", lambda run: trained.append(run.run.out.parent.name))
    assert ablation(settings, []).read_text() == before and not trained
    (path.parent / "val" / "positive-0.5" / "seed0" / "metrics.jsonl").unlink()
    ablation(replace(settings, budget=0.0), [])
    assert not trained
    text = ablation(settings, []).read_text()
    assert trained == ["positive-0.5"]
    assert "| + positive contrast with memory | 0 | – | – |" in text, "an unfinished run has no number"


def test_parallel_processes_train_the_same(settings: AblationConfig, folder: Path, tmp_path: Path):
    fast = ["--encoder", "test_efficientnet", "--no-pretrained", "--labelled-batch", "2", "--unlabelled-batch", "2"]
    fast += ["--crop", "32", "--device", "cpu", "--decoder-channels", "8", "--contrast-dim", "8"]
    tables = []
    for processes in (1, 2):
        config = replace(settings, arms=("labels", "positive"), seeds=(0,), steps=30, processes=processes)
        tables.append(ablation(replace(config, out=tmp_path / str(processes)), fast).read_text())
    assert tables[0] == tables[1] and "| labels only | 1 |" in tables[0]


def test_bad_input_is_one_clear_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="--seeds, --labelled and --arms need at least one value each"):
        ablation(AblationConfig("folder", folder, seeds=(), out=tmp_path), [])
    with pytest.raises(UserError, match="--processes is 0, --last is 3: give at least 1"):
        ablation(AblationConfig("folder", folder, processes=0, out=tmp_path), [])
    arguments = ["ablation", "folder", str(folder), "--out", str(tmp_path / "a"), "--steps", "10"]
    assert main(arguments) == 2
    assert "--steps is 10: give at least 30" in capsys.readouterr().err
    assert main([*arguments[:-1], "30", "--split", "test"]) == 2
    assert "data set 'folder' has no split 'test'" in capsys.readouterr().err


@pytest.mark.parametrize(  # printed tables of Student's t
    ("probability", "dof", "value"),
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 7, 2.365), (0.975, 30, 2.042), (0.8, 9, 0.883), (0.95, 4, 2.132)],
)
def test_quantiles_are_those_of_the_tables(probability: float, dof: int, value: float):
    assert t_quantile(probability, dof) == pytest.approx(value, abs=6e-4)
    assert t_cdf(-t_quantile(probability, dof), dof) == pytest.approx(1 - probability, abs=1e-12)


def test_paired_differences():
    result = paired([3.0, 5.0, 4.0, 6.0], [2.0, 3.0, 4.0, 5.0])
    assert result.mean == 1.0 and result.spread == pytest.approx(math.sqrt(2 / 3))
    assert result.half == pytest.approx(3.1824 * math.sqrt(2 / 3) / 2, rel=1e-4) and not result.excludes_zero
    assert result.detectable == pytest.approx((3.1824 + 0.9785) * math.sqrt(2 / 3) / 2, rel=1e-4)
    n = result.pairs_for(1.0)
    assert detectable(result.spread, n) <= 1 < detectable(result.spread, n - 1)
    assert paired([3.0, 5.1, 4.0, 6.0], [2.0, 4.0, 3.0, 5.0]).excludes_zero
