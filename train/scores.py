"""IoU of a network by class, and tables of such numbers. Imports neither torch nor the networks."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path


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


def write_per_image(path: Path, images: dict[str, dict[str, Scores]], classes: tuple[str, ...]) -> None:
    """Write the IoU of each image in percent as CSV, the image with the lowest mean of the first network first.

    Args:
        path: the file.
        images: scores by id and name of the network.
        classes: names of the classes, whose IoU is that of the first network; empty where a class does not occur.
    """

    def number(share: float) -> str:
        return "" if math.isnan(share) else f"{100 * share:.1f}"

    networks = list(next(iter(images.values())))
    first = networks[0]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", *(f"mean {name}" for name in networks), *classes])
        # without a labelled pixel there is no mean: last
        for item, scores in sorted(images.items(), key=lambda entry: (math.isnan(m := entry[1][first].miou), m)):
            means = [number(scores[name].miou) for name in networks]
            writer.writerow([item, *means, *(number(scores[first].iou[name]) for name in classes)])
