"""Functions that several tests of the training program share."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import train.loop
from train.checkpoint import read_checkpoint
from train.config import FitConfig
from train.data.dataset import SegmentationDataset
from train.errors import UserError

ROOT = Path(__file__).parents[2]
"""Folder of the repository."""

TINY_OPTIONS = [
    *("--encoder", "test_efficientnet", "--no-pretrained", "--encoder-maps", "1", "3", "--aspp-channels", "8"),
    *("--decoder-channels", "8", "--contrast-dim", "8", "--device", "cpu"),
]
"""Options of `fit` for a network that trains a step within milliseconds."""


def error_of(action: Callable[[], object]) -> str:
    """The message of the `UserError` that ``action`` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def pixel_counts(dataset: SegmentationDataset) -> torch.Tensor:
    """Read every item; labelled pixels of each class, int64 ``[C]``."""
    counts = sum(torch.bincount(dataset[index][1].flatten(), minlength=256) for index in range(len(dataset)))
    return counts[: len(dataset.classes)]


def quietly(target: Callable[..., None], *arguments: Any) -> None:
    """Run in another process without progress bars, which pytest would not capture there."""
    with redirect_stderr(io.StringIO()):
        target(*arguments)


def before_step(step: int, action: Callable[[Any], None]) -> Callable[..., Any]:
    """A training step that calls ``action`` with the training before step ``step`` (from 0)."""
    original = train.loop.training_step

    def changed(t: Any, *batches: Any) -> Any:
        if t.step == step:
            action(t)
        return original(t, *batches)

    return changed


def in_folder(config: FitConfig, out: Path, **changes: Any) -> FitConfig:
    return replace(config, run=replace(config.run, out=out, **changes))


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries and lists as one dictionary."""
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for name, part in items for k, v in flat(part, f"{prefix}/{name}").items()}
    return {prefix: state}


def assert_same_state(first: Path, second: Path) -> None:
    """Every tensor of two checkpoints is equal bit by bit, and so is everything else."""
    a, b = (flat(read_checkpoint(path)["training"]) for path in (first, second))
    assert a.keys() == b.keys() and sum(isinstance(value, torch.Tensor) for value in a.values()) > 300
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, name


def their_heads(channels: int, classes: int, dim: int) -> nn.Module:
    """Heads and selectors named and laid out as those of SemiSeg-Contrastive."""
    model = nn.Module()
    for name, width, out, kind in (("projection_head", channels, dim, nn.ReLU), ("prediction_head", dim, dim, nn.ReLU)):
        model.add_module(name, nn.Sequential(nn.Linear(width, dim), nn.BatchNorm1d(dim), kind(), nn.Linear(dim, out)))
    for c in range(classes):
        for name in (f"contrastive_class_selector_{c}", f"contrastive_class_selector_memory{c}"):
            layers = nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.LeakyReLU(0.2), nn.Linear(dim, 1)
            model.add_module(name, nn.Sequential(*layers))
    return model
