"""Scores against counting pixel by pixel, and evaluation without side effects."""

from __future__ import annotations

import csv
import math
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from train_helpers import error_of

from train.command_line import main
from train.config import FitConfig
from train.data.folder import open_folder
from train.evaluate import evaluate, evaluate_checkpoint, load_learners, predict, scores_of
from train.logs import BEST
from train.scores import Scores, write_per_image
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
    for workers in (0, 2):
        scores = evaluate({"student": learner}, data, workers=workers)["student"]
        assert list(scores.iou.values()) == pytest.approx(expected)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_changes_nothing(tiny: FitConfig, folder: Path, training: bool):
    learner = build_training(tiny, 3, 255, 6, 6).learner.train(training)
    state, random = {k: v.clone() for k, v in learner.state_dict().items()}, torch.get_rng_state()
    evaluate({"student": learner}, open_folder(folder, "val"), workers=1)
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


def test_each_image_is_read_once_for_both_networks(tiny: FitConfig, folder: Path, monkeypatch: pytest.MonkeyPatch):
    training, data = build_training(tiny, 3, 255, 6, 6), open_folder(folder, "val")
    read: list[int] = []
    item = type(data).__getitem__
    monkeypatch.setattr(type(data), "__getitem__", lambda self, index: read.append(index) or item(self, index))
    both = evaluate({"student": training.learner, "teacher": training.teacher}, data)
    assert read == [0, 1, 2]
    assert both["teacher"] == evaluate({"other name": training.teacher}, data)["other name"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_image_is_one_line_also_from_a_loader_process(tiny: FitConfig, small_folder: Path, workers: int):
    learner, data = build_training(tiny, 3, 255, 6, 6).learner, open_folder(small_folder, "train")
    path = data.pairs["b"][0]
    path.write_bytes(path.read_bytes()[:100])
    message = error_of(lambda: evaluate({"student": learner}, data, workers=workers))
    assert f"cannot read image {path}" in message


def test_images_are_listed_from_the_worst_to_the_best(
    finished_once: tuple[FitConfig, dict[str, Scores]], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, data = finished_once[0].run.out, open_folder(folder, "val")
    command = ["evaluate", str(out / "last.pt"), "--per-image", str(tmp_path / "images.csv"), "--workers", "1"]
    assert main([*command, "--device", "cpu"]) == 0
    with open(tmp_path / "images.csv", newline="", encoding="utf-8") as file:
        heading, *lines = csv.reader(file)
    assert heading == ["image", "mean student", "mean teacher", "sky", "grass", "brick"]
    assert sorted(line[0] for line in lines) == data.ids and len(lines) == 3
    means = [float(line[1]) for line in lines]
    assert means == sorted(means)
    learner = load_learners(out / "last.pt")[0]["student"]
    for item, mean, _, *ious in lines:
        image, mask = data[data.ids.index(item)]
        guess, valid = predict(learner, image), mask != 255
        expected = []
        for label in range(3):
            hit, either = ((guess == label) & (mask == label)), ((guess == label) | (mask == label)) & valid
            expected.append(100 * hit.sum().item() / either.sum().item() if either.any() else math.nan)
        known = [value for value in expected if not math.isnan(value)]
        assert float(mean) == pytest.approx(sum(known) / len(known), abs=0.051)
        assert ious == ["" if math.isnan(value) else f"{value:.1f}" for value in expected]
    assert main(["evaluate", str(out / "last.pt"), "--per-image", str(tmp_path / "no" / "folder")]) == 2
    assert "no/folder cannot be written" in capsys.readouterr().err
    assert main(["evaluate", str(out / "last.pt"), "--workers", "-1"]) == 2
    assert "--workers is -1: give 0 or more" in capsys.readouterr().err


def test_images_without_labels_are_listed_last(tmp_path: Path):
    def scores(iou: float) -> dict[str, Scores]:
        return {"student": Scores({"a": iou}, iou)}

    images = {"good": scores(0.9), "empty": scores(math.nan), "bad": scores(0.1)}
    write_per_image(tmp_path / "images.csv", images, ("a",))
    lines = (tmp_path / "images.csv").read_text().splitlines()
    assert lines == ["image,mean student,a", "bad,10.0,10.0", "good,90.0,90.0", "empty,,"]


def test_a_killed_loader_process_is_one_line(finished: FitConfig, monkeypatch: pytest.MonkeyPatch):
    def kill_loader(*_: object) -> None:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        time.sleep(10)  # the loader's signal handler raises from here

    others = set(multiprocessing.active_children())
    monkeypatch.setattr("train.evaluate.predict", kill_loader)
    message = error_of(lambda: evaluate_checkpoint(finished.run.out / "last.pt", workers=1))
    assert message.startswith("a loader process ended") and "fewer --workers than 1" in message and "\n" not in message
