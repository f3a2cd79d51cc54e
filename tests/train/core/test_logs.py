"""The log of a run, and the scores in it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from train.logs import BEST, MetricsLog, logged_scores, read_metrics


def test_log_drops_what_came_after_the_checkpoint_and_half_a_line(tmp_path: Path):
    lines = [json.dumps({"step": step, "x": step}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "x"')
    log = MetricsLog(tmp_path, start=2)
    log.write(3, {"x": 30.0, "bad": math.nan})
    log.close()
    assert read_metrics(tmp_path) == [{"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "x": 30.0, "bad": None}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_renewed_student_counts_as_a_choice():
    records = [{"step": 1, "miou/student": 0.5}, {"step": 2, "miou/student": 0.25, "miou/renewed": 0.75}]
    scores = logged_scores(records, ())
    assert (scores["student"].miou, scores[BEST].miou) == (0.25, 0.75) and set(scores) == {"student", BEST}


def test_logged_scores_of_runs_without_teacher_or_evaluation():
    classes = ("a", "b")
    assert logged_scores([{"step": 1}], classes) == {}
    records = [{"step": 1, "miou/student": None}, {"step": 2, "miou/student": 0.25, "iou_student/a": 0.25}]
    scores = logged_scores([*records, {"step": 3, "loss/total": 1.0}], classes)
    assert list(scores) == ["student", BEST] and scores[BEST].miou == 0.25
    assert scores[BEST].iou["a"] == 0.25 and scores[BEST].iou["b"] != scores[BEST].iou["b"]
