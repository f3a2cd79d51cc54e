"""Training under fire: runs that are killed and damaged at random end as the undisturbed run, bit by bit.

Three runs; ``PIXCONTRAST_FIRE=50`` takes 50, each with draws of its own: SIGKILL, SIGTERM, SIGINT, a full disk, a dead
loader process, a second run in the folder; truncated and flipped checkpoints; and five runs of two ranks, with dead
ones.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import active_children
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from tqdm import tqdm
from train_helpers import assert_same_state, in_folder, quietly

import train.loop
from train.checkpoint import read_checkpoint
from train.config import FitConfig
from train.errors import Interrupted, UserError
from train.logs import read_metrics
from train.loop import fit

RUNS = int(os.environ.get("PIXCONTRAST_FIRE", 3))
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
ENDED = {  # how what happens may end a run, beside the run that was faster: an error of one line
    "full disk": "cannot be written",
    "dead worker": "a loader process ended",
    "dead rank": "another process of this training ended",
}
KINDS = (*SIGNALS, "full disk", "dead worker", "second run")
happened: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def record() -> Iterator[None]:
    """``PIXCONTRAST_FIRE_RECORD=FILE`` gets the counts of what happened."""
    yield
    if path := os.environ.get("PIXCONTRAST_FIRE_RECORD"):
        Path(path).write_text(json.dumps(dict(sorted(happened.items())), indent=1) + "\n")


def disturb(kind: str) -> None:
    """In the process that trains, by a timer."""
    if kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[kind])
    elif kind == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif kind == "dead worker":
        for child in active_children():
            child.kill()


def fit_under_fire(
    config: FitConfig, kind: str | None, delay: float, store: Path | None = None, number: int = 0
) -> None:
    """Train; ``delay`` seconds after the first step, let something happen. An error goes to a file."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    if store is not None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    original, status = train.loop.training_step, 0
    timer = threading.Timer(delay, disturb, (kind,))
    timer.daemon = True

    def first_step(*arguments):
        if kind is not None:
            timer.start()
        train.loop.training_step = original
        return original(*arguments)

    train.loop.training_step = first_step
    try:
        fit(config)
    except Interrupted as stop:
        status = stop.status
    except UserError as error:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        config.run.out.with_suffix(f".{number}.txt").write_text(str(error))
        status = 2
    timer.cancel()
    sys.stdout.flush()
    os._exit(status)  # a process group with a dead rank cannot be left in order


def start(processes: BaseContext, *arguments: object) -> BaseProcess:
    process = processes.Process(target=quietly, args=(fit_under_fire, *arguments))
    process.start()
    return process


@pytest.fixture(scope="module")
def config(tiny_session: FitConfig) -> FitConfig:
    run = replace(tiny_session.run, evaluate_every=5, checkpoint_every=1)
    return replace(tiny_session, optim=replace(tiny_session.optim, steps=20), run=run)


@pytest.fixture(scope="module")
def undisturbed(config: FitConfig, tmp_path_factory: pytest.TempPathFactory, processes: BaseContext) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(processes, in_folder(config, out), None, 0.0)
    process.join()
    assert process.exitcode == 0
    return out


def is_one_line_about(path: Path, kind: str) -> None:
    message = path.read_text()
    assert ENDED[kind] in message and "\n" not in message, message


def is_the_same_run(out: Path, undisturbed: Path) -> None:
    assert_same_state(out / "last.pt", undisturbed / "last.pt")
    assert not list(out.rglob("*.partial"))
    steps = [[record["step"] for record in read_metrics(folder)] for folder in (out, undisturbed)]
    assert steps[0] == steps[1] and read_checkpoint(out / "last.pt")["training"]["step"] == 20


@pytest.mark.parametrize("seed", range(RUNS))
def test_random_kills_and_damage(config: FitConfig, undisturbed: Path, seed: int, tmp_path: Path, processes):
    draw = random.Random(seed)
    ours = in_folder(config, tmp_path / "run", checkpoint_every=draw.randint(1, 4))
    out, error, damaged = ours.run.out, tmp_path / "run.0.txt", False
    for attempt in range(7):  # the last one where the one before found a damaged checkpoint
        kind = draw.choice(KINDS) if attempt < 5 else None
        workers = int(kind == "dead worker")
        now = replace(ours, data=replace(ours.data, workers=workers))
        process = start(processes, now, None if kind == "second run" else kind, draw.uniform(0.0, 1.5))
        if kind == "second run":
            second_run(ours, process, processes)
        process.join(600)
        if process.exitcode == 0:
            if kind not in (None, "second run"):
                happened[f"{kind}: too late"] += 1
            break
        if process.exitcode == 2 and damaged and "last.pt is damaged" in error.read_text():
            # one clear error, and no older checkpoint
            assert "\n" not in error.read_text() and not (out / "previous.pt").exists()
            (out / "last.pt").unlink()  # as the message advises
            happened["damage without an older checkpoint"] += 1
            continue
        assert kind is not None
        happened[kind] += 1
        if kind in SIGNALS:
            assert process.exitcode in (-SIGNALS[kind], 128 + SIGNALS[kind])
        else:
            assert process.exitcode == 2
            is_one_line_about(error, kind)
        assert kind == "SIGKILL" or not list(out.rglob("*.partial"))
        damaged = kind not in ("SIGTERM", "SIGINT") and draw.random() < 0.5 and (out / "last.pt").exists()
        if damaged:
            happened[damage(out / "last.pt", draw)] += 1
        elif (out / "last.pt").exists():
            read_checkpoint(out / "last.pt")
    is_the_same_run(out, undisturbed)
    happened["runs that ended bit by bit as the undisturbed one"] += 1


def second_run(config: FitConfig, first: BaseProcess, processes: BaseContext) -> None:
    """Another ``fit`` in the folder while the first trains: one line, unless the first has ended before."""
    steps = len(read_metrics(config.run.out))
    while first.is_alive() and len(read_metrics(config.run.out)) <= steps:
        time.sleep(0.01)
    second = start(processes, config, None, 0.0, None, 1)
    second.join(600)
    if second.exitcode == 0:
        first.join(600)
        happened["second run: too late"] += 1
    elif first.exitcode == 2:  # of a damaged checkpoint, as this one
        assert "last.pt is damaged" in config.run.out.with_suffix(".1.txt").read_text()
    else:
        message = config.run.out.with_suffix(".1.txt").read_text()
        assert second.exitcode == 2 and f"process {first.pid} on " in message and "\n" not in message
        happened["second run"] += 1


@pytest.mark.parametrize("seed", range((RUNS + 9) // 10))
def test_a_dead_rank(config: FitConfig, seed: int, tmp_path: Path, processes: BaseContext):
    """The other rank says so in one line, and both go on from the last checkpoint."""
    draw = random.Random(f"rank {seed}")
    config = replace(config, data=replace(config.data, labelled_batch=4, unlabelled_batch=4))
    for name, kinds in (("undisturbed", [None]), ("run", ["SIGKILL", "SIGKILL", None])):
        for attempt, kind in enumerate(kinds):
            ours, dead = in_folder(config, tmp_path / name), draw.randrange(2)
            store, delay = tmp_path / f"store {name} {attempt}", draw.uniform(0.0, 0.5)
            ranks = [start(processes, ours, kind if n == dead else None, delay, store, n) for n in range(2)]
            for rank in ranks:
                rank.join(600)
            codes = [rank.exitcode for rank in ranks]
            if codes == [0, 0]:
                break
            assert kind is not None and codes[dead] == -signal.SIGKILL and codes[1 - dead] == 2, codes
            is_one_line_about(tmp_path / f"run.{1 - dead}.txt", "dead rank")
            happened["dead rank"] += 1
    is_the_same_run(tmp_path / "run", tmp_path / "undisturbed")
    happened["runs of two ranks that ended bit by bit as the undisturbed one"] += 1


def damage(path: Path, draw: random.Random) -> str:
    """Truncate the file, or flip a bit of it; which of the two."""
    content = bytearray(path.read_bytes())
    position = draw.randrange(len(content))
    cut = draw.random() < 0.5
    if cut:
        del content[position:]
    else:
        content[position] ^= 1 << draw.randrange(8)
    path.unlink()  # killed between two operations on the folder, last.pt and previous.pt are the same file
    path.write_bytes(content)
    return "checkpoint truncated" if cut else "checkpoint with a flipped bit"
