"""Our numbers beside the paper's, as Markdown and CSV."""

from __future__ import annotations

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from train.logs import BEST
from train.paper.rows import Row
from train.scores import Scores, markdown_table, percent

Results = dict[Row, dict[int, dict[str, Scores]]]
"""Of each row and split that is finished, the scores by name (see `train.logs`)."""

MEAN = "mean"

EXPLANATION = (
    "Mean IoU, %, on the validation images: mean and, from two splits on, sample standard deviation over the splits. "
    "The paper reports the best of all evaluations on these images, which is a little too high; so the difference is "
    "that of our best. *Last* and *teacher* are after the last step."
)


@dataclass(frozen=True)
class Line:
    """One number of one row, in percent; NaN where there is none."""

    ours: list[float]
    """Of each finished split."""
    printed: float
    """The paper's mean over three splits."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.ours) if self.ours else math.nan

    @property
    def spread(self) -> float:
        """Sample standard deviation over the splits; NaN if one of them has none, where `stdev` would raise."""
        return statistics.stdev(self.ours) if len(self.ours) > 1 and not math.isnan(self.mean) else math.nan

    @property
    def difference(self) -> float:
        return self.mean - self.printed


def lines_of(row: Row, splits: dict[int, dict[str, Scores]], result: str) -> dict[str, Line]:
    """Numbers of ``row`` for one of the results: the mean over the classes under :data:`MEAN`, then each class."""
    scores = [by_name[result] for by_name in splits.values() if result in by_name]
    lines = {MEAN: Line([100 * score.miou for score in scores], row.miou)}
    for name, printed in row.iou.items():
        lines[name] = Line([100 * score.iou[name] for score in scores], printed)
    return lines


def write_comparison(path: Path, title: str, results: Results) -> None:
    """Write ``path`` (Markdown) and, beside it, the same numbers for programs (.csv).

    Args:
        title: heading.
        results: all rows of the table, in order; those without finished splits are shown as not run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    notes = [f"- `{row.name}`: {row.note}." for row in results if row.note]
    parts = [f"# {title}", EXPLANATION, _summary(results)]
    if notes:
        parts += ["Doubts about the printed numbers:", "\n".join(notes)]
    for row, splits in results.items():
        if splits:
            parts += [f"## {row.name}", _classes(row, splits)]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    _write_csv(path.with_suffix(".csv"), results)


def _summary(results: Results) -> str:
    """Table of mean IoU, a line for each row."""
    table = [["row", "splits", "best on val", "last", "teacher", "printed", "difference"]]
    for row, splits in results.items():
        best, last, teacher = (lines_of(row, splits, result)[MEAN] for result in (BEST, "student", "teacher"))
        ours = [_with_spread(best), _with_spread(last), _with_spread(teacher)] if splits else ["not run", "–", "–"]
        numbers = ", ".join(map(str, splits)) or "–"
        table.append([f"`{row.name}`", numbers, *ours, f"{best.printed:.1f}", _signed(best.difference)])
    return markdown_table(table)


def _classes(row: Row, splits: dict[int, dict[str, Scores]]) -> str:
    """Table of one row, a line for each class: our best evaluation on each split beside the printed mean."""
    table = [["IoU, %", *(f"split {split}" for split in splits), "mean", "spread", "printed", "difference"]]
    for name, line in lines_of(row, splits, BEST).items():
        ours = [_number(value) for value in (*line.ours, line.mean, line.spread)]
        table.append([name, *ours, f"{line.printed:.1f}", _signed(line.difference)])
    return markdown_table(table)


def _write_csv(path: Path, results: Results) -> None:
    """One line for each row, result (best, last, teacher) and class; numbers that do not exist are empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "result", "class", "splits", "mean", "spread", "printed", "difference"])
        for row, splits in results.items():
            for result in (BEST, "student", "teacher"):
                for name, line in lines_of(row, splits, result).items():
                    numbers = (line.mean, line.spread, line.printed, line.difference)
                    cells = ["" if math.isnan(number) else f"{number:.2f}" for number in numbers]
                    writer.writerow([row.name, result, name, len(line.ours), *cells])


def _with_spread(line: Line) -> str:
    return _number(line.mean) + ("" if math.isnan(line.spread) else f" ± {line.spread:.1f}")


def _number(value: float) -> str:
    return percent(value / 100)


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.1f}"
