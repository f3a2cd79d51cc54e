"""Scores of a run as its log has them: after the last step, and where they were best on the validation images."""

from __future__ import annotations

import math

from train.config import FitConfig
from train.evaluate import Scores
from train.logs import Record, read_metrics
from train.plain import same_as_written

BEST = "student, best on val"
"""Name of the scores of the evaluation with the highest mean IoU.

They are what the paper reports. They are too high, because the images that choose them also measure them. Where the
best student was renewed at the end (see `train.selection`), the result of that counts too.
"""


def logged_scores(records: list[Record], classes: tuple[str, ...]) -> dict[str, Scores]:
    """The last scores of ``student`` and, where there is one, ``teacher``; and under :data:`BEST` the student's best.

    Args:
        records: of a run, in order; not all of them need to have scores.
        classes: names of the classes.
    """
    evaluated = [record for record in records if "miou/student" in record]
    if not evaluated:
        return {}
    networks = [network for network in ("student", "teacher") if f"miou/{network}" in evaluated[-1]]
    scores = {network: _scores(evaluated[-1], network, classes) for network in networks}
    students = [(record, name) for record in evaluated for name in ("student", "renewed") if f"miou/{name}" in record]
    return scores | {BEST: _scores(*max(students, key=_miou), classes)}


def finished(run: FitConfig) -> bool:
    """Whether the last step was taken, with these options, and evaluated; the data need not be there to know it."""
    records = read_metrics(run.run.out)
    done = bool(records) and records[-1]["step"] == run.optim.steps and "miou/student" in records[-1]
    return done and same_as_written(run)


def _miou(evaluation: tuple[Record, str]) -> float:
    record, network = evaluation
    miou = record[f"miou/{network}"]
    return -math.inf if miou is None else miou


def _scores(record: Record, network: str, classes: tuple[str, ...]) -> Scores:
    def number(name: str) -> float:
        value = record.get(name)
        return math.nan if value is None else value  # the log has null for a class that does not occur

    return Scores({name: number(f"iou_{network}/{name}") for name in classes}, number(f"miou/{network}"))
