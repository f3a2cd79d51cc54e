"""Best, last and teacher; the return to the best student and its renewal; how a resumed run knows of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.checkpoint import read_checkpoint, save_checkpoint
from train.config import FitConfig
from train.logs import BEST, read_metrics
from train.loop import RESTARTED, Selection, fit
from train.scores import Scores
from train.session import open_session
from train.step import training_step


def scripted_evaluations(monkeypatch: pytest.MonkeyPatch, *mious: float) -> None:
    """Let student and teacher score ``mious``, one after the other."""
    values = iter(mious)

    def evaluations(session: object) -> dict[str, Scores]:
        miou = next(values)
        return {network: Scores({"sky": miou}, miou) for network in ("student", "teacher")}

    monkeypatch.setattr("train.loop.evaluate_all", evaluations)


def test_best_is_the_highest_evaluation_and_its_checkpoint_stays(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch):
    scripted_evaluations(monkeypatch, 0.2, 0.5, 0.5, 0.4, 0.3)
    config = replace(tiny, run=replace(tiny.run, evaluate_every=2))
    scores = fit(config)
    assert {name: score.miou for name, score in scores.items()} == {"student": 0.4, "teacher": 0.4, BEST: 0.5}
    assert read_checkpoint(config.run.out / "best.pt")["training"]["step"] == 4
    assert fit(config)[BEST].miou == 0.5


def test_resumed_run_remembers_its_best(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch):
    session = open_session(tiny)
    batches = session.batches()
    for _ in range(4):
        training_step(session.training, *next(batches))
    tiny.run.out.mkdir()
    save_checkpoint(session.checkpoint, session.training, session.data)
    (tiny.run.out / "metrics.jsonl").write_text('{"step": 4, "miou/student": 0.9}\n{"step": 5, "miou/student": 1.0}\n')
    scores = fit(tiny)
    assert scores[BEST].miou == 0.9 and not (tiny.run.out / "best.pt").exists()


def test_stuck_training_goes_on_from_its_best_student(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch):
    # 8 steps, patience of 2: better at 1; too long at 4 and, counted from there, at 7
    scripted_evaluations(monkeypatch, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4)
    config = replace(
        tiny, optim=replace(tiny.optim, restart_after=0.25), run=replace(tiny.run, evaluate_every=1, checkpoint_every=4)
    )
    saved: dict[int, dict] = {}
    original = save_checkpoint

    def keep(path: Path, training, data) -> None:
        original(path, training, data)
        saved[training.step] = read_checkpoint(path)["training"]

    monkeypatch.setattr("train.loop.save_checkpoint", keep)
    fit(config)
    restarts = [record["step"] for record in read_metrics(config.run.out) if "selection/restarted" in record]
    assert restarts == [4, 7] and sorted(saved) == [1, 4, 8]
    memory = [name for name in saved[1]["learner"] if name.startswith("branch.memory.")]
    for name, tensor in saved[4]["learner"].items():
        if name not in memory:
            assert torch.equal(tensor, saved[1]["learner"][name]) and torch.equal(tensor, saved[4]["teacher"][name])
    assert not torch.equal(saved[4]["learner"]["branch.memory.rows"], saved[1]["learner"]["branch.memory.rows"])
    assert not torch.equal(
        saved[8]["learner"]["network.classifier.weight"], saved[1]["learner"]["network.classifier.weight"]
    )


def test_selection_goes_on_from_the_log():
    records = [
        {"step": 2, "miou/student": 0.5}, {"step": 4, "miou/student": None}, {"step": 5}, {"step": 6, RESTARTED: 1.0},
        {"step": 8, "miou/student": 0.5},
    ]  # fmt: skip
    selection = Selection(records, patience=3)
    assert (selection.best, selection.since) == (0.5, 6)
    assert Selection([], patience=3).note({"step": 1, "miou/student": 0.0})  # the worst of scores is the best so far
    assert [selection.stuck(step) for step in (8, 9, 10)] == [False, False, True]
    assert not Selection(records, patience=0).stuck(10**9)


def test_renewal_moves_the_statistics_of_the_best_student_only(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch):
    scripted_evaluations(monkeypatch, 0.4, 0.3)
    config = replace(tiny, optim=replace(tiny.optim, renewal=3))
    scores = fit(config)
    best, renewed, last = (
        read_checkpoint(config.run.out / f"{name}.pt")["training"]["learner"] for name in ("best", "renewed", "last")
    )
    moved = {name for name, tensor in best.items() if not torch.equal(tensor, renewed[name])}
    assert moved and all("running_" in name or "num_batches" in name for name in moved)
    counter = "network.aspp.project.1.num_batches_tracked"
    assert renewed[counter] == best[counter] + 3 and last[counter] > best[counter]
    record = read_metrics(config.run.out)[-1]
    assert record["step"] == 8 and scores[BEST].miou == max(0.4, record["miou/renewed"])
