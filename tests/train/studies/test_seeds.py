"""The table of the demo's seeds: paired differences, t-intervals, detectable effects, and the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from train.studies import seeds as module
from train.studies.seeds import COMMITTED, differences_of, read_seeds, seeds_tables


def test_differences_are_taken_seed_by_seed():
    runs = {0: {"supervised": 40.0, "pseudo": 42.0}, 1: {"supervised": 60.0, "pseudo": 61.0}, 2: {"supervised": 10.0}}
    d = differences_of(runs)["pseudo", "supervised"]
    assert d.mean == 1.5 and d.half == pytest.approx(12.706 * 0.5, abs=1e-2)


def test_results_are_gathered_from_demos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(module, "COMMITTED", tmp_path / "results" / "seeds.json")
    files = []
    for seed in (1, 0):
        runs = {"supervised": 50.0 + seed, "pseudo": 51.0, "contrast": 52.0 + seed, "all_labels": 70.0}
        files.append(tmp_path / f"{seed}.json")
        files[-1].write_text(json.dumps({"seed": seed, "miou": runs}))
    module.main([str(path) for path in files])
    seeds = read_seeds(tmp_path / "results" / "seeds.json")
    assert list(seeds) == [0, 1] and seeds[1]["contrast"] == 53.0
    assert "| labels only | 50.5 | 50.0 | 51.0 |" in capsys.readouterr().out


def test_committed_results_are_enough_and_reach_the_promise():
    seeds = read_seeds()
    assert len(seeds) >= 5
    assert all(set(runs) == {"supervised", "pseudo", "contrast", "all_labels"} for runs in seeds.values())
    means = {key: sum(runs[key] for runs in seeds.values()) / len(seeds) for key in seeds[0]}
    assert means["all_labels"] >= 65 and means["all_labels"] - means["supervised"] >= 8
    assert seeds_tables(seeds) in COMMITTED.with_name("README.md").read_text()
