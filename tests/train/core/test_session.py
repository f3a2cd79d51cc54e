"""Opening a run: batches of two sources of labels, and where they go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from train.config import FitConfig
from train.data.batches import Batches
from train.data.scenes.layouts import make_scenes
from train.session import Session, open_session
from train.step import training_step


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    for kind in ("cityscapes", "gta5"):
        make_scenes(kind, root / kind, train=6, val=1, size=(48, 64))
    return root


@pytest.fixture
def adapting(tiny: FitConfig, scenes: Path) -> FitConfig:
    data = replace(tiny.data, dataset="cityscapes", root=scenes / "cityscapes", source_root=scenes / "gta5", labelled=4)
    return replace(tiny, data=data, method=replace(tiny.method, last_steps=2, memory_start=-1, confidence=0.0))


def moved(session: Session, step: int) -> Session:
    session.training.step = step
    return session


@pytest.mark.parametrize(("order", "sources"), [("alternate", (1, 3, 5)), ("last", (7,))])
def test_batches_take_turns_and_go_on_where_they_were(adapting: FitConfig, order: str, sources: tuple[int, ...]):
    config = replace(adapting, method=replace(adapting.method, source_steps=order))
    session = open_session(config)
    assert session.source is not None and len(session.source) == 6
    seed = config.optim.seed
    streams = {
        False: iter(Batches(session.train, session.labelled, 3, 32, seed, "labelled")),
        True: iter(Batches(session.source, range(6), 3, 32, seed, "source")),
    }
    expected = [next(streams[step in sources]) for step in range(8)]
    unlabelled = iter(Batches(session.train, session.unlabelled, 2, 32, seed, "unlabelled"))
    plain = [next(unlabelled) for _ in range(8)]
    for start in (0, 4, 7):
        batches = moved(session, start).batches()
        for step in range(start, 8):
            labelled, second = next(batches)
            assert torch.equal(labelled[0], expected[step][0]) and torch.equal(labelled[1], expected[step][1]), step
            assert second is not None and torch.equal(second[0], plain[step][0])


def test_only_the_target_is_counted_and_remembered(adapting: FitConfig):
    session = open_session(adapting)
    training, batches = session.training, session.batches()
    assert training.learner.branch is not None
    training.class_weights.label_batches = 99
    for step in range(8):
        rows_before = training.learner.branch.memory.rows.clone()
        seen = training.class_weights.seen["labels"]
        losses = training_step(training, *next(batches))
        source = step in (1, 3, 5)
        assert torch.equal(rows_before, training.learner.branch.memory.rows) == source, step
        assert training.class_weights.seen["labels"] == seen + (not source)
        assert ("contrast_labelled" in losses) == (step > 2)  # of both domains


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_released_does_not_count_pseudo_labels_in_steps_of_the_source(adapting: FitConfig, variant: str):
    session = open_session(replace(adapting, method=replace(adapting.method, variant=variant)))
    training, batches = session.training, session.batches()
    for step in range(4):
        seen = training.class_weights.seen["pseudo"]
        training_step(training, *next(batches))
        counted = variant == "paper" or step not in (1, 3)
        assert training.class_weights.seen["pseudo"] == seen + counted, step


@pytest.mark.parametrize(("order", "stale"), [("last", True), ("alternate", False)])
def test_contrast_of_the_source_has_the_labels_that_the_released_code_gives_it(
    adapting: FitConfig, order: str, stale: bool, monkeypatch: pytest.MonkeyPatch
):
    """The last version leaves the labels of the target batch before; they survive a checkpoint."""
    config = replace(adapting, method=replace(adapting.method, source_steps=order, last_steps=4 if stale else 2))
    session = open_session(config)
    training, batches = session.training, session.batches()
    seen = []
    forward = type(training.learner.branch).forward
    monkeypatch.setattr(
        type(training.learner.branch),
        "forward",
        lambda self, x, labels, predict: seen.append(labels) or forward(self, x, labels, predict),
    )
    for step in range(6):
        if step == 5:  # a step of the source in both orders
            state = training.state_dict()
            training.target_labels = None
            training.load_state_dict(state)
        training_step(training, *next(batches))
    assert training.from_source(5) and not training.from_source(4)
    before, labelled = seen[-4], seen[-2]  # labelled and unlabelled in each step
    assert torch.equal(before, labelled) == stale
