"""The log of a run: metrics.jsonl (one JSON object a logged step), tensorboard events, and the scores in them."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.config import FitConfig
from train.config_file import same_as_written
from train.run_folder import not_written, replacing
from train.scores import Scores

METRICS = "metrics.jsonl"

Record = dict[str, Any]  # "step" and flat "group/name" numbers

BEST = "student, best on val"
"""Name of the scores of the evaluation with the highest mean IoU.

The paper reports these. They are too high, because the images that choose them also measure them. A student that was
renewed at the end (see `train.loop`) counts too.
"""


class MetricsLog:
    """Appends records to ``out/metrics.jsonl`` and ``out/tensorboard``.

    Args:
        out: folder of the run.
        start: steps already taken; what an interrupted run logged after them is dropped, so no step appears twice.
    """

    def __init__(self, out: Path, start: int) -> None:
        self.path = out / METRICS
        kept = [record for record in read_metrics(out) if record["step"] <= start]
        with replacing(self.path) as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        self.file = open(self.path, "a")  # noqa: SIM115 - closed by close()
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only a run that is trained needs it

        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Record ``numbers`` after ``step`` steps; those that are not finite become null.

        Raises:
            UserError: they cannot be written.
        """
        record = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        try:
            self.file.write(json.dumps({"step": step, **record}) + "\n")
            self.file.flush()
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:
            raise not_written(f"log {self.path}", error) from error

    def close(self) -> None:
        """Close the files; on a full disk, :meth:`write` has raised the error already."""
        for file in (self.file, self.board):
            with suppress(OSError):
                file.close()


def read_metrics(out: Path) -> list[Record]:
    """Records of a run, in order; a line that a killed run left unfinished is skipped."""
    path = out / METRICS
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def score_numbers(scores: dict[str, Scores]) -> dict[str, float]:
    """Scores under their names in the log."""
    numbers = {f"miou/{network}": score.miou for network, score in scores.items()}
    for network, score in scores.items():
        numbers |= {f"iou_{network}/{name}": iou for name, iou in score.iou.items()}
    return numbers


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
    names = ("student", "renewed")
    students = [_scores(record, name, classes) for record in evaluated for name in names if f"miou/{name}" in record]
    return scores | {BEST: max(students, key=lambda s: -math.inf if math.isnan(s.miou) else s.miou)}


def finished(run: FitConfig) -> bool:
    """Whether the log shows the last step, with these options, and its evaluation. The data need not exist."""
    records = read_metrics(run.run.out)
    done = bool(records) and records[-1]["step"] == run.optim.steps and "miou/student" in records[-1]
    return done and same_as_written(run)


def _scores(record: Record, network: str, classes: tuple[str, ...]) -> Scores:
    numbers = {key: value for key, value in record.items() if value is not None}  # a class that does not occur is null
    iou = {name: numbers.get(f"iou_{network}/{name}", math.nan) for name in classes}
    return Scores(iou, numbers.get(f"miou/{network}", math.nan))
