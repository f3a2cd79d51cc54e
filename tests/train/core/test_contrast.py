"""The contrast in the trainer: which pixels are remembered, InfoNCE with each memory, and the numbers that watch it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from train_helpers import assert_same_state, error_of, in_folder

from train.config import FitConfig
from train.contrast import QueueBranch, adaptive_labels, memory_fill, similarities
from train.logs import read_metrics
from train.loop import fit
from train.session import open_session
from train.step import training_step


def changed(config: FitConfig, **changes: Any) -> FitConfig:
    return replace(config, method=replace(config.method, **changes))


def test_adaptive_threshold_keeps_the_surer_pixels_of_each_class():
    """Against the definition, pixel by pixel; probabilities of class 0 are high, of class 1 low, 2 is never right."""
    torch.manual_seed(0)
    for threshold in (0.3, 0.6, 0.95):
        logits = torch.randn(2, 4, 6, 5, dtype=torch.float64)
        logits[:, 0] *= 4
        labels = torch.randint(0, 3, (2, 12, 10))
        labels[:, :2] = 255
        features = torch.zeros(2, 8, 6, 5)
        good = adaptive_labels(features, logits, labels, threshold, 255)
        big = torch.nn.functional.interpolate(logits, (12, 10), mode="bilinear", align_corners=True)
        probability = big.softmax(1)[:, :, ::2, ::2]
        label, remembered = labels[:, ::2, ::2], 0
        for c in range(3):
            mine = (label == c) & (probability.argmax(1) == c)
            values = probability[:, c][mine]
            needed = min(threshold, float(values.mean())) if len(values) else threshold
            expected = mine & ((probability[:, c] > threshold) | (probability[:, c] >= needed))
            remembered += int(expected.sum())
            assert torch.equal(good == c, expected), (threshold, c)
        assert int((good != 255).sum()) == remembered > 0


def test_adaptive_memory_of_a_class_of_which_the_teacher_is_never_sure(tiny: FitConfig):
    filled = {}
    for remember in ("fixed", "adaptive"):
        session = open_session(changed(tiny, remember=remember, confidence=0.99, memory_start=-1))
        for _, batches in zip(range(4), session.batches(), strict=False):
            training_step(session.training, *batches)
        fill = memory_fill(session.training.learner.branch)
        assert fill is not None
        filled[remember] = fill.sum()
    assert filled["fixed"] == 0 and filled["adaptive"] > 0


KINDS = {
    "batch": {"memory_rows": 0},
    "teacher": {"memory_rows": 16},
    "queues": {"memory_rows": 16, "memory": "queues"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["supervised_contrast", "contrast"])
def test_infonce_trains_with_each_memory(tiny: FitConfig, kind: str, method: str):
    config = changed(tiny, objective="infonce", method=method, views=4, anchors=64, **KINDS[kind])
    session = open_session(config)
    t = session.training
    assert t.learner.branch is not None
    for step, (labelled, unlabelled) in zip(range(5), session.batches(), strict=False):
        assert (unlabelled is None) == (method == "supervised_contrast")
        weight = t.learner.branch.project.first.weight.detach().clone()
        losses = training_step(t, labelled, unlabelled)
        names = {name for name in losses if name.startswith("contrast")}
        both = {"contrast_labelled", "contrast_unlabelled"} if method == "contrast" else {"contrast_labelled"}
        assert names == (both if step > 2 else set())
        if step > 2:
            assert losses["contrast_labelled"] > 0 and not torch.equal(weight, t.learner.branch.project.first.weight)
    fill = memory_fill(t.learner.branch)
    assert (fill is None) == (kind == "batch")
    assert fill is None or fill.sum() > 0
    assert isinstance(t.learner.branch, QueueBranch) == (kind == "queues")


def test_queues_hold_the_students_embedding(tiny: FitConfig):
    config = changed(tiny, objective="infonce", memory="queues", memory_rows=64, memory_start=-1)
    session = open_session(config)
    t = session.training
    training_step(t, *next(session.batches()))
    branch = t.learner.branch
    assert isinstance(branch, QueueBranch)
    with torch.no_grad():
        branch.project.last.weight.zero_()
        branch.project.last.bias.fill_(1.0)
    before = [queue.counts.clone() for queue in branch.queues.parts()]
    training_step(t, *next(session.batches()))
    for queue, old in zip(branch.queues.parts(), before, strict=True):
        new = queue.counts - old
        assert new.sum() > 0
        for rows, start, count in zip(queue.rows, old.tolist(), new.tolist(), strict=True):
            alike = torch.full((count, queue.dim), queue.dim**-0.5)
            torch.testing.assert_close(rows[start : start + count], alike, rtol=1e-3, atol=1e-3)  # a step was taken


def test_queues_resume_exactly(tiny: FitConfig, tmp_path):
    config = changed(tiny, objective="infonce", memory="queues", memory_rows=16, views=4)
    fit(in_folder(config, tmp_path / "whole"))
    from train.checkpoint import save_checkpoint

    session = open_session(in_folder(config, tmp_path / "broken"))
    for _, batches in zip(range(5), session.batches(), strict=False):
        training_step(session.training, *batches)
    (tmp_path / "broken").mkdir(exist_ok=True)
    save_checkpoint(session.checkpoint, session.training, session.data)
    torch.rand(7)  # what else draws does not matter
    fit(in_folder(config, tmp_path / "broken"))
    assert_same_state(tmp_path / "whole" / "last.pt", tmp_path / "broken" / "last.pt")


def test_impossible_memories_are_refused(tiny: FitConfig):
    for changes, words in (
        ({"memory": "queues"}, "--memory queues needs --objective infonce"),
        ({"objective": "infonce", "memory": "queues", "memory_sync": "local"}, "--memory queues needs"),
        ({"memory_rows": 0}, "--memory-rows is 0"),
        ({"objective": "infonce", "memory": "queues", "memory_rows": 0}, "--memory-rows is 0"),
        ({"objective": "infonce", "memory_sync": "reduce"}, "--memory-sync reduce is for --objective positive"),
        ({"objective": "infonce", "temperature": 0.0}, "--temperature is 0.0"),
    ):
        assert words in error_of(lambda changes=changes: changed(tiny, **changes).check())
    changed(tiny, objective="infonce", memory_rows=0).check()


def test_similarities_are_those_of_all_pairs():
    torch.manual_seed(1)
    features, labels = torch.randn(2, 5, 4, 3), torch.randint(0, 3, (2, 4, 3))
    labels[0, 0] = 255
    rows = torch.nn.functional.normalize(features, dim=1).permute(0, 2, 3, 1).reshape(-1, 5).double()
    flat = labels.flatten().tolist()
    within, between = [], []
    for c in range(3):
        mine = [i for i, label in enumerate(flat) if label == c]
        pairs = [float(rows[i] @ rows[j]) for i in mine for j in mine if i != j]
        within.append(sum(pairs) / len(pairs))
        for d in range(3):
            others = [i for i, label in enumerate(flat) if label == d and c != d]
            pairs = [float(rows[i] @ rows[j]) for i in mine for j in others]
            between += [sum(pairs) / len(pairs)] if pairs else []
    got = similarities(features, labels)
    assert float(got[0]) == pytest.approx(sum(within) / 3, abs=1e-6)
    assert float(got[1]) == pytest.approx(sum(between) / 6, abs=1e-6)
    empty = similarities(features, torch.full_like(labels, 255))
    assert all(value.isnan() for value in empty)


def test_watching_changes_nothing_and_its_ratio_is_that_of_the_gradients(tiny: FitConfig):
    states = []
    for watching in (False, True):
        session = open_session(tiny)
        t = session.training
        for _, batches in zip(range(5), session.batches(), strict=False):
            watch: dict[str, torch.Tensor] = {}
            training_step(t, *batches, watch if watching else None)
        states.append(t.learner.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert watch.keys() == {"within", "between", "gradient_ratio", "agreement"}
    assert 0 <= watch["agreement"] <= 1 and watch["gradient_ratio"] > 0
    ratios = []
    for weight in (0.1, 0.2):
        session = open_session(changed(tiny, contrast_weight=weight, contrast_start=0, memory_start=-1))
        for _, batches in zip(range(2), session.batches(), strict=False):
            watch = {}
            training_step(session.training, *batches, watch)
        ratios.append(float(watch["gradient_ratio"]))  # of the first step with the contrast
    assert ratios[1] == pytest.approx(2 * ratios[0], rel=1e-4)


def test_watch_is_logged(tiny: FitConfig):
    fit(in_folder(tiny, tiny.run.out, watch=True))
    first, *_, last = read_metrics(tiny.run.out)
    assert {"watch/within", "watch/between", "watch/agreement"} <= first.keys()
    assert "watch/gradient_ratio" in last and "watch/gradient_ratio" not in first


def test_an_empty_memory_is_a_warning(tiny: FitConfig, capsys: pytest.CaptureFixture[str]):
    fit(changed(tiny, confidence=0.9999))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(lines) == 2 and all("memory of all classes is still empty" in line for line in lines)
    assert "step 4 of 8" in lines[0] and "step 8 of 8" in lines[1]


def test_a_filled_memory_is_none(tiny: FitConfig, capsys: pytest.CaptureFixture[str]):
    fit(changed(tiny, remember="adaptive", confidence=0.9))
    record = read_metrics(tiny.run.out)[-1]
    empty = [name for name in ("sky", "grass", "brick") if record[f"memory_fill/{name}"] == 0]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert [", ".join(empty) in line and "step 8" in line for line in lines] == [True] * bool(empty)
