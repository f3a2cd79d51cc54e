"""A small data set of coloured rectangles, and a configuration that trains on it within seconds."""

from __future__ import annotations

import multiprocessing
import shutil
from dataclasses import replace
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.config import DataConfig, FitConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from train.loop import fit
from train.scores import Scores

CLASSES = ("sky 90 160 220", "grass 60 160 60", "brick 180 70 50")


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train.loop", "train.networks.timm_deeplab", "torch.utils.tensorboard"])


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the server of `processes` import while the first tests run."""
    if any("processes" in getattr(item, "fixturenames", ()) for item in session.items):
        forkserver.ensure_running()


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """Starts processes that have the training program imported: one server imports it and forks all of them.

    The server itself never computes, so that a fork is safe.
    """
    return PROCESSES


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_folder(root: Path, train: int = 12, val: int = 3, size: int = 40) -> Path:
    """Write a ``folder`` data set: each image has three rectangles, their colours near those of the classes."""
    generator = np.random.default_rng(0)
    palette = np.array([[int(word) for word in line.split()[1:]] for line in CLASSES])
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    names = [f"img{index:02d}" for index in range(train + val)]
    for name in names:
        mask = np.zeros((size, size), dtype=np.uint8)
        for label in (1, 2):
            top, left = generator.integers(0, size // 2, 2)
            mask[top : top + size // 2, left : left + size // 2] = label
        image = palette[mask] + generator.integers(-40, 41, (size, size, 3))
        mask[:2] = 255
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "train.txt").write_text("\n".join(names[:train]) + "\n")
    (root / "val.txt").write_text("\n".join(names[train:]) + "\n")
    return root


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "rectangles")


@pytest.fixture
def small_folder(tmp_path: Path) -> Path:
    """Three classes, images a (png), b (jpg, palette mask) and c, of 20 x 12 pixels."""
    root = tmp_path / "mine"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("road\ntraffic light 250 170 30\n\nsky\n")
    (root / "train.txt").write_text("b\na\n")
    (root / "val.txt").write_text("c\n")
    generator = np.random.default_rng(0)
    for item, ending in (("a", "png"), ("b", "jpg"), ("c", "PNG")):
        Image.fromarray(generator.integers(0, 256, (12, 20, 3), np.uint8)).save(root / "images" / f"{item}.{ending}")
        mask = Image.fromarray(generator.choice(np.array([0, 1, 2, 255], np.uint8), (12, 20)))
        if item == "b":
            mask = mask.convert("P")
            mask.putpalette([7] * 768)
        mask.save(root / "masks" / f"{item}.png")
    return root


TINY_MODEL = ModelConfig(
    encoder="test_efficientnet",
    pretrained=False,
    encoder_maps=(1, 3),
    atrous_rates=(1, 2, 3),
    aspp_channels=8,
    skip_channels=8,
    decoder_channels=8,
    train_encoder_norm=True,
)


@pytest.fixture
def tiny(tiny_session: FitConfig, tmp_path: Path) -> FitConfig:
    """All parts of the method begin within the first steps."""
    return replace(tiny_session, run=replace(tiny_session.run, out=tmp_path / "run"))


@pytest.fixture(scope="session")
def tiny_session(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> FitConfig:
    """``tiny`` for fixtures of several tests, which give it a folder of their own."""
    return FitConfig(
        DataConfig(dataset="folder", root=folder, labelled=6, crop=32, labelled_batch=3, unlabelled_batch=2),
        TINY_MODEL,
        MethodConfig(ramp=4, memory_start=1, contrast_start=2, memory_rows=16, contrast_dim=8, confidence=0.05),
        OptimConfig(steps=8, lr=0.05),
        RunConfig(
            out=tmp_path_factory.mktemp("tiny") / "run", device="cpu", log_every=1, evaluate_every=4, checkpoint_every=3
        ),
    )


@pytest.fixture(scope="session")
def finished_once(
    tiny_session: FitConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FitConfig, dict[str, Scores]]:
    """``tiny``, trained to the end, and its scores; no test may write into its folder."""
    config = replace(tiny_session, run=replace(tiny_session.run, out=tmp_path_factory.mktemp("finished") / "run"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scores = fit(config)
    torch.set_num_threads(threads)
    return config, scores


@pytest.fixture
def finished(finished_once: tuple[FitConfig, dict[str, Scores]], tmp_path: Path) -> FitConfig:
    """A finished run in a folder of its own."""
    config, _ = finished_once
    out = Path(shutil.copytree(config.run.out, tmp_path / "finished"))
    return replace(config, run=replace(config.run, out=out))
