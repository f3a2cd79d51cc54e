"""Checkpoints: exact resume after SIGKILL, SIGINT and SIGTERM, atomic writing, and clear refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm
from train_helpers import assert_same_state, before_step, in_folder, quietly

import train.loop
from train.checkpoint import read_checkpoint, save_checkpoint
from train.config import FitConfig
from train.config_file import from_plain, to_plain
from train.errors import Interrupted, UserError
from train.evaluate import load_learners
from train.logs import read_metrics
from train.loop import fit
from train.scores import Scores
from train.session import open_session
from train.step import training_step


def train_in_process(config: FitConfig, sent: Path) -> None:
    """Train, but not beyond step 12 before ``sent`` is there; after an interrupt, leave its message beside the run and
    exit with its status."""

    def wait(_: object) -> None:
        while not sent.exists():
            time.sleep(0.01)

    train.loop.training_step = before_step(12, wait)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # one between processes would leak when this one is killed
    try:
        fit(config)
    except Interrupted as stop:
        config.run.out.with_suffix(".txt").write_text(str(stop))
        sys.exit(stop.status)


def wait_for_step(config: FitConfig, step: int, process: BaseProcess) -> None:
    """Until the run has logged ``step``."""
    deadline = time.monotonic() + 600
    while all(record["step"] < step for record in read_metrics(config.run.out)):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def long(tiny: FitConfig) -> FitConfig:
    """Long enough to be interrupted; contrast, memory and class weights are all at work by then."""
    return replace(tiny, optim=replace(tiny.optim, steps=14), run=replace(tiny.run, evaluate_every=7))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_run_equals_the_uninterrupted_one(
    long: FitConfig, tmp_path: Path, sent: signal.Signals, processes: BaseContext
):
    whole, broken = in_folder(long, tmp_path / "whole"), in_folder(long, tmp_path / "broken")
    process = processes.Process(target=quietly, args=(train_in_process, broken, tmp_path / "sent"))
    process.start()
    wait_for_step(broken, 8, process)
    assert process.pid is not None
    os.kill(process.pid, sent)
    (tmp_path / "sent").touch()
    process.join(600)
    steps = read_checkpoint(broken.run.out / "last.pt")["training"]["step"]
    if sent == signal.SIGKILL:
        assert process.exitcode == -signal.SIGKILL and 6 <= steps < 14
    else:
        assert process.exitcode == 128 + sent
        message = (tmp_path / "broken.txt").read_text()
        assert f"interrupted after step {steps} of 14" in message and "run the same command again" in message

    fit(broken)
    fit(whole)
    assert_same_state(whole.run.out / "last.pt", broken.run.out / "last.pt")
    lines = [read_metrics(config.run.out) for config in (whole, broken)]
    for records in lines:
        for record in records:
            del record["time/step_seconds"]
    assert lines[0] == lines[1] and [record["step"] for record in lines[0]] == list(range(1, 15))


def test_finished_run_is_only_evaluated(finished: FitConfig, finished_once: tuple[FitConfig, dict[str, Scores]]):
    written = (finished.run.out / "last.pt").stat().st_mtime_ns
    assert fit(finished) == finished_once[1] and (finished.run.out / "last.pt").stat().st_mtime_ns == written


@pytest.mark.parametrize("every", [1, 99])
def test_evaluation_logging_and_checkpoints_do_not_change_the_training(
    tiny: FitConfig, finished: FitConfig, every: int
):
    other = in_folder(tiny, tiny.run.out, evaluate_every=every, checkpoint_every=every, log_every=every)
    fit(other)
    assert_same_state(finished.run.out / "last.pt", other.run.out / "last.pt")


def test_loader_processes_do_not_change_the_training(tiny: FitConfig, finished: FitConfig):
    fit(replace(tiny, data=replace(tiny.data, workers=2)))
    assert_same_state(finished.run.out / "last.pt", tiny.run.out / "last.pt")


def test_failed_write_leaves_the_old_checkpoint(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch):
    session = open_session(tiny)
    session.checkpoint.parent.mkdir()
    save_checkpoint(session.checkpoint, session.training, session.data)
    training_step(session.training, *next(session.batches()))

    def full_disk(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match=r"last\.pt cannot be written \(No space left"):
        save_checkpoint(session.checkpoint, session.training, session.data)
    assert read_checkpoint(session.checkpoint)["training"]["step"] == 0


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "weights", "version"])
def test_unusable_checkpoint_is_refused_and_kept(finished: FitConfig, kind: str):
    path = finished.run.out / "last.pt"
    (finished.run.out / "previous.pt").unlink()
    whole = path.read_bytes()
    if kind == "weights":
        torch.save({"weight": torch.zeros(2)}, path)
    elif kind == "version":
        torch.save(torch.load(path, weights_only=True) | {"version": 99}, path)
    else:
        path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}[kind])
    before = path.read_bytes()
    with pytest.raises(UserError) as error:
        fit(finished)
    message = str(error.value)
    assert str(path) in message and "move it away, or choose another --out" in message and "\n" not in message
    assert path.read_bytes() == before


def test_other_configuration_is_refused_naming_the_fields(finished: FitConfig):
    run = replace(finished.run, log_every=2)
    other = replace(finished, optim=replace(finished.optim, steps=9, lr=0.1), run=run)
    with pytest.raises(UserError, match=r"\(optim\.lr 0\.05 -> 0\.1; optim\.steps 8 -> 9\)"):
        fit(other)


def test_other_data_is_refused(finished: FitConfig, tmp_path: Path):
    assert finished.data.root is not None
    moved = Path(shutil.copytree(finished.data.root, tmp_path / "moved"))
    fit(replace(finished, data=replace(finished.data, root=moved)))  # the same data elsewhere is fine
    names = (moved / "train.txt").read_text().split()
    (moved / "train.txt").write_text("\n".join(names[:-1]))
    with pytest.raises(UserError, match="images of the data set changed"):
        fit(replace(finished, data=replace(finished.data, root=moved)))


def test_configuration_survives_the_checkpoint(tiny: FitConfig):
    assert from_plain(json.loads(json.dumps(to_plain(tiny)))) == tiny
    with pytest.raises(UserError, match="another version"):
        from_plain(to_plain(tiny) | {"optim": {"unknown": 1}})


def test_files_hold_no_more_than_their_readers_need(finished: FitConfig, tmp_path: Path):
    last, best = (read_checkpoint(finished.run.out / name)["training"] for name in ("last.pt", "best.pt"))
    assert best.keys() == {"step", "learner", "teacher"} and {"optimizer", "schedule"} < last.keys()
    for state in (last, best):
        assert "branch.memory.rows" in state["learner"] and not any(
            "branch.memory." in name for name in state["teacher"]
        )
    labels_only = replace(finished, method=replace(finished.method, method="supervised"))
    session = open_session(in_folder(labels_only, tmp_path / "labels"))
    training_step(session.training, *next(session.batches()))
    session.checkpoint.parent.mkdir()
    save_checkpoint(session.checkpoint, session.training, session.data)
    assert "teacher" not in read_checkpoint(session.checkpoint)["training"]
    assert open_session(session.training.config).training.step == 1


def test_older_files_with_a_memory_of_the_teacher_are_read(finished: FitConfig):
    last = finished.run.out / "last.pt"
    content = read_checkpoint(last)
    state = content["training"]
    state["teacher"] |= {name: value for name, value in state["learner"].items() if name.startswith("branch.memory.")}
    torch.save(content, last)
    expected = {name: value for name, value in state["teacher"].items() if not name.startswith("branch.memory.")}
    for teacher in (open_session(finished).training.teacher, load_learners(last)[0]["teacher"]):
        own = teacher.state_dict()
        assert own.keys() == expected.keys() and all(torch.equal(own[name], value) for name, value in expected.items())
