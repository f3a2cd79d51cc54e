"""Curves of the demo's report: loss and mean IoU over the steps, and the fill of the memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from train.logs import Record


def draw_curves(path: Path, runs: dict[str, list[Record]]) -> None:
    """Loss on the labels, and mIoU of the student, over the steps; one line for each run."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, records in runs.items():
        steps, losses = _series(records, "loss/supervised")
        left.plot(steps, smooth(losses), label=name)
        steps, scores = _series(records, "miou/student")
        right.plot(steps, [100 * score for score in scores], marker="o", markersize=4, label=name)
    left.set(title="Cross-entropy on the labelled images (smoothed)", xlabel="step", yscale="log")
    right.set(title="Mean IoU on the validation tiles, %", xlabel="step")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), frameon=False)
    figure.savefig(path, dpi=130)


def draw_memory(path: Path, records: list[Record], classes: tuple[str, ...]) -> None:
    """How full the memory of each class is over the steps, as a map: one row for each class."""
    series = [_series(records, f"memory_fill/{name}") for name in classes]
    steps = series[0][0]
    figure = Figure(figsize=(9.5, 0.32 * len(classes) + 1.6), layout="constrained")
    axis = figure.subplots()
    fill = 100 * np.array([values for _, values in series])
    mesh = axis.pcolormesh(steps, range(len(classes)), fill, shading="nearest", cmap="viridis", vmin=0, vmax=100)
    axis.set_yticks(range(len(classes)), classes)
    axis.invert_yaxis()
    axis.set(title="Fill of the class memory, %", xlabel="step")
    figure.colorbar(mesh, ax=axis, pad=0.01)
    figure.savefig(path, dpi=130)


def smooth(values: list[float], window: int = 9) -> list[float]:
    """Mean over the last ``window`` values at each position (fewer at the beginning)."""
    return [float(np.mean(values[max(0, end - window) : end])) for end in range(1, len(values) + 1)]


def _series(records: list[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values at which ``name`` was recorded."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]
