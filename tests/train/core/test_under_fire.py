"""Training under fire: runs that are killed and damaged at random end as the undisturbed run, bit by bit.

Three runs; ``PIXCONTRAST_FIRE=50`` takes 50, each with draws of its own.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from dataclasses import replace
from multiprocessing.context import BaseContext
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
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def fit_under_fire(config: FitConfig, sent: signal.Signals | None, delay: float) -> None:
    """Train; send this process a signal ``delay`` seconds after its first step. An error goes to a file."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    original, status = train.loop.training_step, 0
    if sent is not None:
        timer = threading.Timer(delay, os.kill, (os.getpid(), sent))
        timer.daemon = True

        def first_step(*arguments):
            timer.start()
            train.loop.training_step = original
            return original(*arguments)

        train.loop.training_step = first_step
    try:
        fit(config)
    except Interrupted as stop:
        status = stop.status
    except UserError as error:
        config.run.out.with_suffix(".txt").write_text(str(error))
        status = 2
    if sent is not None:
        timer.cancel()
    sys.exit(status)


@pytest.fixture(scope="module")
def config(tiny_session: FitConfig) -> FitConfig:
    run = replace(tiny_session.run, evaluate_every=5, checkpoint_every=1)
    return replace(tiny_session, optim=replace(tiny_session.optim, steps=20), run=run)


@pytest.fixture(scope="module")
def undisturbed(config: FitConfig, tmp_path_factory: pytest.TempPathFactory, processes: BaseContext) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    process = processes.Process(target=quietly, args=(fit_under_fire, in_folder(config, out), None, 0.0))
    process.start()
    process.join()
    assert process.exitcode == 0
    return out


@pytest.mark.parametrize("seed", range(RUNS))
def test_random_kills_and_damage(config: FitConfig, undisturbed: Path, seed: int, tmp_path: Path, processes):
    draw = random.Random(seed)
    ours = in_folder(config, tmp_path / "run", checkpoint_every=draw.randint(1, 4))
    out = ours.run.out
    for attempt in range(6):
        sent = draw.choice(SIGNALS) if attempt < 5 else None
        process = processes.Process(target=quietly, args=(fit_under_fire, ours, sent, draw.uniform(0.0, 1.5)))
        process.start()
        process.join(120)
        if process.exitcode == 2:  # one clear error, and an older checkpoint as it was
            message = (tmp_path / "run.txt").read_text()
            assert "last.pt is damaged" in message and "\n" not in message and not (out / "previous.pt").exists()
            (out / "last.pt").unlink()  # as the message advises
        elif process.exitcode == 0:
            break
        else:
            assert sent is not None and process.exitcode in (-sent, 128 + sent)
            if sent == signal.SIGKILL and draw.random() < 0.5 and (out / "last.pt").exists():
                damage(out / "last.pt", draw)
    assert_same_state(out / "last.pt", undisturbed / "last.pt")
    assert not list(out.rglob("*.partial"))
    steps = [[record["step"] for record in read_metrics(folder)] for folder in (out, undisturbed)]
    assert steps[0] == steps[1] and read_checkpoint(out / "last.pt")["training"]["step"] == 20


def damage(path: Path, draw: random.Random) -> None:
    """Truncate the file, or flip a bit of it."""
    content = bytearray(path.read_bytes())
    position = draw.randrange(len(content))
    if draw.random() < 0.5:
        del content[position:]
    else:
        content[position] ^= 1 << draw.randrange(8)
    path.unlink()  # killed between two operations on the folder, last.pt and previous.pt are the same file
    path.write_bytes(content)
