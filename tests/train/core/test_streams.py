"""Random numbers by purpose: arms of a study have the same weights, batches and views where they have them at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import train.step
from train.config import FitConfig
from train.session import open_session
from train.step import training_step
from train.streams import seed_for


def seen_by(config: FitConfig, steps: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
    """Initial network, crops, augmented images and dropout's first draw of each forward, step by step."""
    session = open_session(config)
    seen: dict[str, list[torch.Tensor]] = {
        "network": [tensor.clone() for tensor in session.training.learner.network.state_dict().values()]
    }
    for name in ("labelled", "unlabelled", "labelled views", "unlabelled views", "labelled draw", "unlabelled draw"):
        seen[name] = []
    augment = train.step.augment

    def noted(images: torch.Tensor, labels: torch.Tensor, confidence: Any, *args: Any, **options: Any) -> Any:
        views = augment(images, labels, confidence, *args, **options)
        kind = "labelled" if confidence is None else "unlabelled"
        seen[f"{kind} views"].append(views[0])
        seen[f"{kind} draw"].append(torch.rand(()))
        return views

    with monkeypatch.context() as patch:
        patch.setattr(train.step, "augment", noted)
        for _, (labelled, unlabelled) in zip(range(steps), session.batches(), strict=False):
            seen["labelled"] += labelled
            seen["unlabelled"] += unlabelled or ()
            training_step(session.training, labelled, unlabelled)
    return seen


def assert_same(first: dict[str, list[torch.Tensor]], second: dict[str, list[torch.Tensor]], *names: str) -> None:
    for name in names:
        assert first[name] and len(first[name]) == len(second[name]), name
        assert all(torch.equal(*pair) for pair in zip(first[name], second[name], strict=True)), name


ALL = ("network", "labelled", "unlabelled", "labelled views", "unlabelled views", "labelled draw", "unlabelled draw")


def arm(config: FitConfig, **changes: Any) -> FitConfig:
    # ClassMix of unlabelled images pastes what the pseudo-labels say, which the arms may change
    return replace(config, method=replace(config.method, unlabelled_classmix=0.0, labelled_classmix=0.7, **changes))


def test_arms_have_the_same_weights_batches_and_views(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch):
    contrast = seen_by(arm(tiny), 8, monkeypatch)
    assert_same(contrast, seen_by(arm(tiny, method="pseudo"), 8, monkeypatch), *ALL)
    assert_same(contrast, seen_by(arm(tiny, memory_start=99, contrast_dim=4), 8, monkeypatch), *ALL)
    labels_only = seen_by(arm(tiny, method="supervised"), 8, monkeypatch)
    assert_same(contrast, labels_only, *(name for name in ALL if "unlabelled" not in name))
    other = seen_by(replace(arm(tiny), optim=replace(tiny.optim, seed=1)), 8, monkeypatch)
    assert not any(torch.equal(*pair) for pair in zip(contrast["labelled views"], other["labelled views"], strict=True))


def test_views_depend_on_the_pseudo_labels_through_classmix_alone(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch):
    """With ClassMix, the draws stay the same also where the labels that it pastes by are others."""
    contrast, pseudo = (
        seen_by(replace(tiny, method=replace(tiny.method, method=method)), 8, monkeypatch)
        for method in ("contrast", "pseudo")
    )
    assert_same(contrast, pseudo, *(name for name in ALL if name != "unlabelled views"))


def test_dropout_of_a_network_is_the_same_with_and_without_the_contrast(tiny: FitConfig):
    """So a contrast of weight 0 changes nothing at all."""
    states = []
    for changes in ({"method": "pseudo"}, {"contrast_weight": 0.0}):
        session = open_session(replace(tiny, method=replace(tiny.method, **changes)))
        for _, batches in zip(range(6), session.batches(), strict=False):
            training_step(session.training, *batches)
        states.append(session.training.learner.network.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_a_purpose_and_its_numbers_make_the_seed():
    def drawn(*key: Any) -> float:
        seed_for(*key)
        return float(torch.rand(()))

    assert drawn(3, "dropout", 7) == drawn(3, "dropout", 7)
    others = [drawn(*key) for key in [(3, "dropout", 7), (4, "dropout", 7), (3, "views", 7), (3, "dropout", 8, 1)]]
    assert len({*others, drawn(-1, "dropout")}) == 5
