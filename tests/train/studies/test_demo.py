"""The demo on a tiny data set: its runs, its report, its pictures, going on after an interrupt."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.config import FitConfig
from train.config_file import differing_fields, to_plain
from train.data.datasets import open_dataset
from train.data.folder import open_folder
from train.data.splits import covering_seed
from train.errors import UserError
from train.loop import fit
from train.paper.introspection import MemoryRows, memory_rows
from train.session import open_session
from train.studies import demo, report
from train.studies.cost import contrast_cost
from train.studies.curves import smooth
from train.studies.demo import DemoConfig, demo_configs, run_demo
from train.studies.report import initial_rows, similarity, varied_tiles


@pytest.fixture
def tiny_demo(tiny: FitConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoConfig:
    """The demo's runs and methods, but with the tiny network on the rectangles."""
    real = demo_configs

    def small(settings: DemoConfig) -> dict[str, FitConfig]:
        return {
            key: replace(
                tiny,
                data=replace(tiny.data, labelled=1.0 if key == "all_labels" else 6),
                method=replace(tiny.method, method=config.method.method),
                run=replace(tiny.run, out=config.run.out),
            )
            for key, config in real(settings).items()
        }

    monkeypatch.setattr(demo, "demo_configs", small)
    monkeypatch.setattr(report, "contrast_cost", partial(contrast_cost, rounds=1))
    return DemoConfig(out=tmp_path / "demo", device="cpu")


def test_report_has_all_runs_numbers_and_pictures(tiny_demo: DemoConfig, capsys: pytest.CaptureFixture[str]):
    text = run_demo(replace(tiny_demo, budget=0.0)).read_text()  # the reference does not fit the budget
    assert (
        "| all labels | – |" in text
        and "+ contrast | all labels |" not in text
        and "left out" in capsys.readouterr().out
    )
    assert not (tiny_demo.out / "all_labels").exists()

    written = {path: path.stat().st_mtime_ns for path in tiny_demo.out.rglob("last.pt")}
    assert len(written) == 3
    path = run_demo(tiny_demo)  # trains the reference; finished runs are not trained again
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert len(list(tiny_demo.out.rglob("last.pt"))) == 4

    text = path.read_text()
    assert "| IoU, % | labels only | + pseudo-labels | + contrast | all labels |" in text
    for name in ("sky", "grass", "brick", r"\*\*mean\*\*"):
        assert re.search(rf"\| {name} \|( \**[\d.]+\** \|){{4}}", text), name
    for picture in re.findall(r"\]\((\S+\.png)\)", text):
        pixels = np.asarray(Image.open(path.parent / picture).convert("RGB"))
        assert pixels.shape[0] > 200 and pixels.std() > 10, picture
    assert len(re.findall(r"\]\(\S+\.png\)", text)) == 3
    scores = json.loads((tiny_demo.out / "scores.json").read_text())
    assert scores["seed"] == 0 and f"| all labels | {scores['miou']['all_labels']:.1f} |" in text
    assert (
        re.search(r"\*\*\d+ %\*\*", text)
        and "one seed (0)" in text
        and "95 % interval" in text
        and "nan" not in text.lower()
    )


def test_runs_differ_in_the_method_only(tmp_path: Path):
    configs = {key: to_plain(config) for key, config in demo_configs(DemoConfig(out=tmp_path)).items()}
    assert differing_fields(configs["supervised"], configs["pseudo"]) == ["method.method supervised -> pseudo"]
    assert differing_fields(configs["pseudo"], configs["contrast"]) == ["method.method pseudo -> contrast"]
    assert configs["supervised"]["data"]["split_seed"] == covering_seed(open_dataset("landcover", "train"), 5, 0)
    reference = differing_fields(configs["supervised"], configs["all_labels"])
    assert len(reference) == 1 and reference[0].startswith("data.labelled")


def test_too_few_steps():
    with pytest.raises(UserError, match="--steps is 5"):
        demo_configs(DemoConfig(steps=5))


def test_cost_is_measured(tiny: FitConfig):
    session = open_session(tiny)
    session.training.step = tiny.method.contrast_start + 1
    cost = contrast_cost(session, rounds=2)
    assert 0 < cost.contrast < cost.step and 0 < cost.teacher < cost.step


def test_smoothing_looks_back_only():
    assert smooth([2.0, 4.0, 6.0, 8.0], window=2) == [2.0, 3.0, 5.0, 7.0]


def test_shown_tiles_are_those_with_the_most_varied_labels(folder: Path):
    data = open_folder(folder, "train")

    def entropy(index: int) -> float:
        shares = np.bincount(data[index][1].flatten().numpy(), minlength=256)[:3] / data[index][1].numel()
        return -sum(share * np.log(share) for share in shares if share > 0)

    chosen = varied_tiles(data, 4)
    rest = [entropy(index) for index in range(len(data)) if index not in chosen]
    assert len(set(chosen)) == 4 and min(entropy(index) for index in chosen) >= max(rest)


def test_similarity_of_rows():
    """Two classes at a right angle, rows of one class at 60 degrees: (1 + 0.5) / 2 within, cosines by hand between."""
    rows = torch.tensor([[1.0, 0, 0], [0.5, 0.75**0.5, 0], [0, 0, 2.0]], dtype=torch.float64)
    same, other = similarity(MemoryRows(rows, torch.tensor([0, 0, 1]), torch.ones(3, dtype=torch.float64)))
    assert same == pytest.approx((0.75 + 1) / 2) and other == pytest.approx(0)


def test_rows_before_the_training_are_those_of_the_first_network(tiny: FitConfig):
    session = open_session(tiny)
    before = initial_rows(session)
    assert set(before.classes.tolist()) == {0, 1, 2}
    run_to_end = fit(tiny)
    assert run_to_end
    again = initial_rows(open_session(tiny))
    assert torch.equal(before.rows, again.rows)
    trained = open_session(tiny).training.learner.branch
    assert trained is not None and not torch.equal(before.rows, memory_rows(trained.eval()).rows)
