"""The training step: which parts run when, what reaches the teacher and the memory, and that it learns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch

from train.config import FitConfig
from train.session import Training, build_training, open_session
from train.step import pseudo_labels, training_step, update_teacher

Method = Literal["supervised", "pseudo", "contrast"]


def with_method(config: FitConfig, method: Method, **changes) -> FitConfig:
    return replace(config, method=replace(config.method, method=method, **changes))


def run(config: FitConfig, steps: int) -> tuple[Training, list[dict[str, torch.Tensor]]]:
    session = open_session(config)
    batches = session.batches()
    return session.training, [training_step(session.training, *next(batches)) for _ in range(steps)]


def test_parts_begin_when_the_configuration_says(tiny: FitConfig):
    supervised, semi = {"supervised", "total"}, {"supervised", "total", "pseudo", "entropy"}
    contrast = semi | {"contrast_labelled", "contrast_unlabelled"}
    assert [set(losses) for losses in run(with_method(tiny, "supervised"), 4)[1]] == [supervised] * 4
    assert [set(losses) for losses in run(with_method(tiny, "pseudo"), 4)[1]] == [semi] * 4
    assert [set(losses) for losses in run(tiny, 5)[1]] == [semi] * 3 + [contrast] * 2  # after step 2, from 0


def test_losses_are_detached_and_add_up(tiny: FitConfig):
    for losses in run(tiny, 5)[1]:
        assert not any(loss.requires_grad for loss in losses.values())
        assert sum(v for k, v in losses.items() if k != "total").item() == pytest.approx(losses["total"].item())


def test_memory_fills_after_its_start_with_at_most_the_quota(tiny: FitConfig):
    session = open_session(tiny)
    branch, batches = session.training.learner.branch, session.batches()
    assert branch is not None and branch.quota == 3  # 16 rows over 6 labelled images, rounded
    for step in range(4):
        before = branch.memory.counts.clone()
        training_step(session.training, *next(batches))
        added = branch.memory.counts - before
        assert added.max() <= branch.quota * 3
        assert (added.sum() > 0) == (step > tiny.method.memory_start)


def test_methods_start_from_the_same_weights(tiny: FitConfig):
    networks = [
        open_session(with_method(tiny, method)).training.learner.network for method in ("supervised", "contrast")
    ]
    for first, second in zip(*(network.state_dict().values() for network in networks), strict=True):
        assert torch.equal(first, second)


def test_weights_switch_the_losses_off(tiny: FitConfig):
    config = with_method(tiny, "contrast", pseudo_weight=0.0, entropy_weight=0.0, contrast_weight=0.0)
    for losses in run(config, 4)[1]:
        assert losses["total"].item() == losses["supervised"].item()


def test_pseudo_labels_are_ramped(tiny: FitConfig):
    first = [run(with_method(tiny, "pseudo", ramp=ramp), 1)[1][0] for ramp in (0, 4)]
    assert first[1]["pseudo"].item() == pytest.approx(math.exp(-5) * first[0]["pseudo"].item(), rel=1e-5)
    assert first[1]["entropy"].item() == first[0]["entropy"].item() > 0


def test_ramp_in_one_step_switches_the_pseudo_labels_on(tiny: FitConfig):
    losses = run(with_method(tiny, "pseudo", ramp=2, ramp_shape="step"), 4)[1]
    assert [step["pseudo"].item() > 0 for step in losses] == [False, False, True, True]


def test_teacher_follows_the_warmup_of_its_average(tiny: FitConfig):
    weights = {}
    for warmup in (1e9, 10.0, 1.0):
        config = replace(tiny, optim=replace(tiny.optim, ema_warmup=warmup, ema=0.99))
        training = run(config, 2)[0]
        weights[warmup] = training.learner.network.classifier.weight - training.teacher.network.classifier.weight
    # the share of the teacher kept in step 1 is 1/2, 10/11, and that of the cosine
    assert weights[1.0].norm() < weights[10.0].norm() < weights[1e9].norm()


def test_teacher_is_the_average_with_the_decay_of_the_step(tiny: FitConfig):
    session = open_session(replace(tiny, optim=replace(tiny.optim, ema=0.9)))
    t, batches = session.training, session.batches()
    expected = None
    for decay in (0.0, min(1 - 1 / 11, 1 - 0.1 * (math.cos(math.pi / 8) + 1) / 2)):  # of steps 0 and 1
        training_step(t, *next(batches))
        weights = [p.detach().double() for p in t.learner.parameters()]
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected or weights, weights, strict=True)]
        for parameter, mean in zip(t.teacher.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.double(), mean, rtol=1e-6, atol=1e-8)


def test_memory_rows_are_projections_of_the_teacher(tiny: FitConfig):
    """With heads of the teacher set to give a constant, all rows are that constant."""
    session = open_session(replace(tiny, method=replace(tiny.method, memory_start=-1, confidence=0.0)))
    t = session.training
    assert t.learner.branch is not None and t.teacher.branch is not None
    with torch.no_grad():
        t.teacher.branch.project.last.weight.zero_()
        t.teacher.branch.project.last.bias.fill_(1.0)
    training_step(t, *next(session.batches()))
    memory = t.learner.branch.memory
    assert memory.counts.sum() > 0
    for rows, count in zip(memory.rows, memory.counts.tolist(), strict=True):
        torch.testing.assert_close(rows[:count], torch.full_like(rows[:count], rows.shape[1] ** -0.5))


def test_classes_are_weighed_once_the_contrast_begins(tiny: FitConfig):
    weighed, plain = (run(with_method(tiny, "pseudo", class_weights=on), 4)[1] for on in (True, False))
    same = [torch.equal(a["supervised"], b["supervised"]) for a, b in zip(weighed, plain, strict=True)]
    assert same == [True, True, True, False]


def test_unlabelled_masks_are_never_read(tiny: FitConfig):
    results = []
    for fill in (None, 1):
        session = open_session(tiny)
        batches = session.batches()
        for _ in range(4):
            labelled, unlabelled = next(batches)
            assert unlabelled is not None
            if fill is not None:
                unlabelled = (unlabelled[0], torch.full_like(unlabelled[1], fill))
            losses = training_step(session.training, labelled, unlabelled)
        results.append(losses["total"])
    assert torch.equal(*results)


def test_teacher_averages_parameters_and_keeps_its_buffers(tiny: FitConfig):
    training = build_training(tiny, 3, 255, 6, 6)
    teacher, learner = training.teacher, training.learner
    assert not any(p.requires_grad for p in teacher.parameters())
    with torch.no_grad():
        for tensor in (*learner.parameters(), *(b for b in learner.buffers() if b.is_floating_point())):
            tensor += 1
    old = {name: p.clone() for name, p in teacher.named_parameters()}
    buffers = [b.clone() for b in teacher.buffers()]
    update_teacher(teacher, learner, 0.75)
    for name, parameter in teacher.named_parameters():
        expected = 0.75 * old[name] + 0.25 * learner.get_parameter(name)
        assert torch.allclose(parameter, expected, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(buffers, teacher.buffers(), strict=True))
    update_teacher(teacher, learner, 0.0)
    assert all(torch.equal(*pair) for pair in zip(teacher.parameters(), learner.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_teacher_mode(tiny: FitConfig, mode: Literal["train", "eval"]):
    session = open_session(with_method(tiny, "contrast", teacher_mode=mode))
    name, before = next((n, b.clone()) for n, b in session.training.teacher.named_buffers() if "running_mean" in n)
    training_step(session.training, *next(session.batches()))
    after, learned = (part.get_buffer(name) for part in (session.training.teacher, session.training.learner))
    assert not torch.equal(before, after) and session.training.teacher.training == (mode == "train")
    assert torch.equal(after, learned) == (mode == "eval")  # in eval it makes no statistics of its own


def test_a_teacher_in_eval_mode_has_the_statistics_of_the_learner(tiny: FitConfig):
    """It makes none of its own: with those of its start, its pseudo-labels would be noise."""
    training, _ = run(with_method(tiny, "contrast", teacher_mode="eval"), 5)
    learner, moved = dict(training.learner.named_buffers()), 0
    for name, own in training.teacher.named_buffers():
        if "memory" in name.split("."):
            continue
        assert torch.equal(own, learner[name]), name
        moved += "running_mean" in name and bool(own.any())
    assert moved > 3


def test_pseudo_labels_are_the_most_probable_classes(tiny: FitConfig):
    teacher = build_training(tiny, 3, 255, 6, 6).teacher.eval()
    images = torch.rand(2, 3, 32, 32)
    classes, confidence = pseudo_labels(teacher, images)
    logits = torch.nn.functional.interpolate(teacher(images)[0], (32, 32), mode="bilinear", align_corners=True)
    assert torch.equal(classes, logits.argmax(1))
    assert torch.allclose(confidence, logits.exp().amax(1) / logits.exp().sum(1))


def test_training_learns_the_rectangles(tiny: FitConfig):
    config = replace(with_method(tiny, "supervised"), optim=replace(tiny.optim, steps=60, lr=0.1))
    losses = [step["supervised"].item() for step in run(config, 60)[1]]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_bfloat16_gives_nearly_the_same_losses(tiny: FitConfig):
    config = replace(tiny, optim=replace(tiny.optim, precision="bfloat16"))
    t, half = run(config, 6)
    single = run(tiny, 6)[1]
    assert t.learner.branch is not None and t.learner.branch.memory.counts.sum() > 0
    assert all(p.dtype == torch.float32 for p in (*t.learner.parameters(), *t.teacher.parameters()))
    for step, (losses, expected) in enumerate(zip(half, single, strict=True)):
        assert losses.keys() == expected.keys()
        for name, loss in losses.items():
            assert loss.dtype == torch.float32 and loss.isfinite(), name
            # later the teacher's labels differ here and there, which is no matter of rounding
            if step == 0:
                assert 0 < abs(loss.item() - expected[name].item()) < 0.02 * expected["total"].item(), name


def test_training_in_bfloat16_learns_the_rectangles(tiny: FitConfig):
    optim = replace(tiny.optim, steps=60, lr=0.1, precision="bfloat16")
    losses = [step["supervised"].item() for step in run(replace(with_method(tiny, "supervised"), optim=optim), 60)[1]]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_features_are_in_the_precision_of_the_learner_and_logits_in_float32(tiny: FitConfig):
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        config = replace(tiny, optim=replace(tiny.optim, precision=precision))
        logits, features = build_training(config, 3, 255, 6, 6).teacher(torch.rand(2, 3, 32, 32))
        assert (logits.dtype, features.dtype) == (torch.float32, dtype)
