"""When things go wrong: damage, full disks, signals, NaN, two programs in one folder, dead loader processes."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm
from train_helpers import ROOT, assert_same_state, before_step, error_of, in_folder, quietly

import train.loop
from train.checkpoint import read_checkpoint
from train.config import FitConfig
from train.errors import Interrupted, UserError
from train.evaluate import evaluate_checkpoint
from train.logs import MetricsLog, read_metrics
from train.loop import fit
from train.run_folder import locked, replacing


def step_of(path: Path) -> int:
    return read_checkpoint(path)["training"]["step"]


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def fit_until(config: FitConfig, step: int, action: Callable[[], None]) -> None:
    """In a process of its own: train, call ``action`` before a step, and leave the error in a file beside the run."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # one between processes would leak when this one is killed
    train.loop.training_step = before_step(step, lambda _: action())
    status = 0
    try:
        fit(config)
    except (UserError, Interrupted) as error:
        config.run.out.with_suffix(".txt").write_text(str(error))
        status = getattr(error, "status", 2)
    sys.exit(status)


def run_process(processes: BaseContext, target: Callable[..., None], *arguments: Any) -> int | None:
    """Exit code of a process that calls ``target`` without progress bars."""
    process = processes.Process(target=quietly, args=(target, *arguments))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
    return process.exitcode


def partial_files(out: Path) -> list[Path]:
    return list(out.rglob("*.partial"))


# ---- damaged checkpoints


def test_no_flipped_bit_changes_what_is_read(finished: FitConfig, tmp_path: Path):
    path, copy = finished.run.out / "last.pt", tmp_path / "copy.pt"
    content, draw, noticed = path.read_bytes(), random.Random(0), 0
    end = len(content)
    positions = [draw.randrange(end) for _ in range(30)] + [draw.randrange(end - 3000, end) for _ in range(20)]
    for position in [*range(0, 100, 10), *positions]:
        copy.write_bytes(content)
        flip(copy, position, draw.randrange(8))
        try:
            assert_same_state(copy, path)  # some bytes of the archive have no meaning
        except UserError as error:
            noticed += 1
            message = str(error)
            assert str(copy) in message and "damaged" in message and "\n" not in message and len(message) < 400
    assert noticed > 40


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_resume_from_the_checkpoint_before_a_damaged_one(
    finished: FitConfig, finished_once: tuple[FitConfig, Any], damage: str, capsys: pytest.CaptureFixture[str]
):
    last, previous = (finished.run.out / name for name in ("last.pt", "previous.pt"))
    assert (step_of(previous), step_of(last)) == (6, 8)
    if damage == "missing":
        last.unlink()
    elif damage == "flipped":
        flip(last, last.stat().st_size // 2)
    else:
        os.truncate(last, 1000)
    broken = last.read_bytes() if last.exists() else None
    if broken:
        message = error_of(lambda: evaluate_checkpoint(last))
        assert str(previous) in message and last.read_bytes() == broken
    fit(finished)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "going on from" in line]
    assert str(last) in line and f"{previous}, step 6" in line
    assert_same_state(last, finished_once[0].run.out / "last.pt")
    if broken:
        assert (finished.run.out / "broken.pt").read_bytes() == broken
    assert step_of(previous) == 6


def test_two_damaged_checkpoints_are_refused(finished: FitConfig):
    for name in ("last.pt", "previous.pt"):
        flip(finished.run.out / name, 5000)
    assert "previous.pt is damaged" in error_of(lambda: fit(finished))


def test_the_checkpoint_before_is_kept_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_links(*paths: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", no_links)
    path, keep = tmp_path / "last", tmp_path / "previous"
    for content in "abc":
        with replacing(path, keep=keep) as file:
            file.write(content)
    assert (path.read_text(), keep.read_text()) == ("c", "b") and not partial_files(tmp_path)


# ---- weights that are not finite


def poisoned(kind: str) -> Callable[..., Any]:
    """A training step that makes step 5 (from 1) end with a weight or a loss that is not finite."""
    original = train.loop.training_step

    def changed(t: Any, *batches: Any) -> Any:
        losses = original(t, *batches)
        if t.step >= 5 and kind == "loss":
            losses["total"] = losses["total"] * torch.inf
        elif t.step == 5:
            next(iter(getattr(t, kind).network.parameters())).data.fill_(torch.nan)
        return losses

    return changed


@pytest.mark.parametrize("kind", ["learner", "teacher", "loss"])
def test_weights_that_are_not_finite_are_not_saved(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch, kind: str):
    config = in_folder(tiny, tiny.run.out, log_every=99, evaluate_every=6)
    with monkeypatch.context() as patch:
        patch.setattr("train.loop.training_step", poisoned(kind))
        message = error_of(lambda: fit(config))
    last = config.run.out / "last.pt"
    assert "not finite after step 6" in message and f"{last} is that of step 3" in message
    assert "--lr 0.025 --change-lr" in message and step_of(last) == 3 and not (config.run.out / "best.pt").exists()

    lower = replace(config, optim=replace(config.optim, lr=0.025))
    assert "optim.lr 0.05 -> 0.025" in error_of(lambda: fit(lower))
    lower = in_folder(lower, config.run.out, log_every=1, change_lr=True)
    with monkeypatch.context() as patch:  # interrupted once more, with the same command
        patch.setattr("train.loop.training_step", before_step(4, lambda t: os.kill(os.getpid(), signal.SIGINT)))
        with pytest.raises(Interrupted, match="after step 5"):
            fit(lower)
    fit(lower)
    rates = {record["step"]: record["schedule/lr"] for record in read_metrics(config.run.out)}
    assert rates == pytest.approx({step: 0.025 * (1 - step / 8) ** 0.9 for step in range(4, 9)})
    assert step_of(last) == 8


def test_before_the_first_checkpoint_nothing_is_kept(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.loop.training_step", poisoned("learner"))
    message = error_of(lambda: fit(in_folder(tiny, tiny.run.out, checkpoint_every=5)))
    assert "nothing was saved; try a lower --lr" in message and not (tiny.run.out / "last.pt").exists()


# ---- signals


def terminate_twice() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)


def test_second_sigterm_ends_at_once(tiny: FitConfig, processes: BaseContext):
    assert run_process(processes, fit_until, tiny, 4, terminate_twice) == -signal.SIGTERM
    assert step_of(tiny.run.out / "last.pt") == 3 and len(read_metrics(tiny.run.out)) == 4


def test_loader_processes_outlive_the_signals_of_a_scheduler(tiny: FitConfig, processes: BaseContext):
    config = replace(tiny, data=replace(tiny.data, workers=1))
    assert run_process(processes, fit_until, config, 4, signal_all) == 128 + signal.SIGTERM
    assert "interrupted after step 5 of 8" in tiny.run.out.with_suffix(".txt").read_text()
    assert step_of(tiny.run.out / "last.pt") == 5


def signal_all() -> None:
    """As schedulers do: signal this process and all that it started."""
    for child in active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


# ---- two programs in one folder


def hold(out: Path) -> None:
    """Hold the lock, as does a child like a loader process, until killed."""
    with locked(out):
        child = os.fork()
        if child:
            (out.parent / "child").write_text(str(child))
        time.sleep(60)


def test_second_training_in_a_folder_is_refused(finished: FitConfig, tmp_path: Path, processes: BaseContext):
    out = finished.run.out
    holder = processes.Process(target=hold, args=(out,))
    holder.start()
    while not (child := tmp_path / "child").exists() or not child.read_text():
        time.sleep(0.01)
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    message = error_of(lambda: fit(finished))
    assert str(out) in message and f"process {holder.pid} on " in message and "--out" in message
    assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert "student" in evaluate_checkpoint(out / "last.pt")
    holder.kill()
    holder.join()
    assert "student" in fit(finished)  # although the child, which inherited the open file, still runs
    os.kill(int(child.read_text()), signal.SIGKILL)


# ---- full disks


def allow_small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))


def test_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    tiny: FitConfig, finished_once: tuple[FitConfig, Any], processes: BaseContext
):
    assert run_process(processes, fit_until, tiny, 5, allow_small_files_only) == 2
    message, last = tiny.run.out.with_suffix(".txt").read_text(), tiny.run.out / "last.pt"
    assert f"{last} cannot be written ([Errno 27] File too large): free space or choose another --out" in message
    assert "\n" not in message and step_of(last) == 3 and not partial_files(tiny.run.out)
    fit(tiny)
    assert_same_state(last, finished_once[0].run.out / "last.pt")


def fit_without_space(config: FitConfig) -> None:
    """Train where not a single byte can be written, then leave the error in a file beside the run."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
    try:
        fit(config)
    except UserError as error:
        message = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    config.run.out.with_suffix(".txt").write_text(message)


def test_full_disk_from_the_beginning(tiny: FitConfig, processes: BaseContext):
    assert run_process(processes, fit_without_space, tiny) == 0
    message = tiny.run.out.with_suffix(".txt").read_text()
    assert message.startswith(f"run folder {tiny.run.out} cannot be written ([Errno 27] File too large): free space")
    assert [path.name for path in tiny.run.out.iterdir()] == ["lock"]


def test_log_on_a_full_disk(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    log.file.close()
    log.file = open("/dev/full", "a")  # noqa: SIM115
    assert "metrics.jsonl cannot be written ([Errno 28] No space" in error_of(lambda: log.write(1, {"loss/total": 1.0}))
    log.close()


# ---- loader processes


def kill_loader() -> None:
    active_children()[0].kill()
    time.sleep(0.5)


def test_killed_loader_process_is_one_line(tiny: FitConfig, processes: BaseContext):
    config = replace(tiny, data=replace(tiny.data, workers=1))
    assert run_process(processes, fit_until, config, 4, kill_loader) == 2
    message = tiny.run.out.with_suffix(".txt").read_text()
    assert "a loader process ended" in message and "fewer --workers" in message and "\n" not in message
    assert step_of(tiny.run.out / "last.pt") == 3
    fit(tiny)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "Connection reset by peer"), EOFError(), FileNotFoundError(2, "gone")]
)
def test_loader_process_killed_while_it_sends_a_batch_is_one_line(
    tiny: FitConfig, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    def broken(*_: Any) -> None:
        raise type(error)(*error.args)  # a new one: a traceback that outlives the test would keep the loaders alive

    monkeypatch.setattr("train.loop.training_step", broken)
    with pytest.raises(type(error)):
        fit(tiny)  # without loader processes, it is something else
    config = replace(tiny, data=replace(tiny.data, workers=1))
    assert "a loader process ended" in error_of(lambda: fit(config))
    assert not active_children()  # both loaders have ended with the loop


# ---- output that nobody reads


@pytest.mark.parametrize("command", ["rows", "rows --help", "--help", "check landcover"])
def test_closed_output_ends_quietly(command: str):
    started = subprocess.Popen(
        [sys.executable, "-m", "train", *command.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert started.stdout is not None and started.stderr is not None
    started.stdout.close()
    errors = started.stderr.read().decode()
    assert started.wait(60) == 141 and "Error" not in errors and "Traceback" not in errors, errors
