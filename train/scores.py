"""IoU of a network by class, and tables of such numbers. Imports neither torch nor the networks."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Scores:
    """IoU by name of the class, 0..1, NaN where it occurs neither in labels nor in predictions; and their mean."""

    iou: dict[str, float]
    miou: float


def percent(share: float) -> str:
    """0.4321 as ``43.2``; NaN, the IoU of a class that does not occur, as a dash."""
    return "–" if math.isnan(share) else f"{100 * share:.1f}"


def markdown_table(table: list[list[str]]) -> str:
    """A Markdown table; the first entry is the heading, and all columns but the first are aligned to the right."""
    rows = [table[0], ["---", *["---:"] * (len(table[0]) - 1)], *table[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def scores_table(columns: dict[str, Scores]) -> str:
    """Markdown table of IoU in percent: a line for each class and the mean, a column for each entry of ``columns``."""
    table = [["IoU, %", *columns]]
    for name in next(iter(columns.values())).iou:
        table.append([name, *(percent(scores.iou[name]) for scores in columns.values())])
    return markdown_table([*table, ["**mean**", *(f"**{percent(s.miou)}**" for s in columns.values())]])
