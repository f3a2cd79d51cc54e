"""Scores against counting pixel by pixel, and evaluation without side effects."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from train.config import FitConfig
from train.data.folder import open_folder
from train.evaluate import evaluate, evaluate_checkpoint, predict, scores_of
from train.logs import BEST
from train.scores import Scores
from train.session import build_training


def test_scores_of_a_confusion_matrix():
    scores = scores_of(torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]]), ("a", "b", "c"))
    assert scores.iou["a"] == pytest.approx(3 / 6) and scores.iou["b"] == pytest.approx(4 / 7)
    assert math.isnan(scores.iou["c"])  # neither labelled nor predicted anywhere: no part of the mean
    assert scores.miou == pytest.approx((3 / 6 + 4 / 7) / 2)


def test_evaluate_counts_every_labelled_pixel_of_every_image(tiny: FitConfig, folder: Path):
    learner, data = build_training(tiny, 3, 255, 6, 6).learner, open_folder(folder, "val")
    hits, unions = [0] * 3, [0] * 3
    for index in range(len(data)):
        image, mask = data[index]
        for truth, guess in zip(mask.flatten().tolist(), predict(learner, image).flatten().tolist(), strict=True):
            if truth == 255:
                continue
            for label in {truth, guess}:
                unions[label] += 1
            hits[truth] += truth == guess
    expected = [hit / union for hit, union in zip(hits, unions, strict=True)]
    assert list(evaluate(learner, data).iou.values()) == pytest.approx(expected)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_changes_nothing(tiny: FitConfig, folder: Path, training: bool):
    learner = build_training(tiny, 3, 255, 6, 6).learner.train(training)
    state, random = {k: v.clone() for k, v in learner.state_dict().items()}, torch.get_rng_state()
    evaluate(learner, open_folder(folder, "val"))
    assert learner.training == training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in learner.state_dict().items())


def test_prediction_has_the_size_asked_for(tiny: FitConfig):
    learner, image = build_training(tiny, 3, 255, 6, 6).learner, torch.zeros(3, 32, 48, dtype=torch.uint8)
    assert predict(learner, image).shape == (32, 48) and predict(learner, image, (64, 96)).shape == (64, 96)


def test_checkpoint_scores_as_at_the_end_of_the_training(finished_once: tuple[FitConfig, dict[str, Scores]]):
    config, scores = finished_once
    best = scores[BEST]
    assert set(scores) == {"student", "teacher", BEST}
    assert evaluate_checkpoint(config.run.out / "last.pt") == {name: scores[name] for name in ("student", "teacher")}
    assert evaluate_checkpoint(config.run.out / "best.pt")["student"] == best
