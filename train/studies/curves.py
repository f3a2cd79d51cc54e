"""Pictures of the demo's report: loss and mean IoU over the steps, and the rows of the memory in a plane."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from train.data.dataset import SegmentationDataset
from train.logs import Record
from train.paper.introspection import MemoryRows, principal_plane


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


def draw_memory_planes(path: Path, memories: dict[str, MemoryRows], data: SegmentationDataset) -> None:
    """The rows of each memory, by title, in the plane in which they vary most; the colour is the class."""
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    for axis, (title, memory) in zip(figure.subplots(1, len(memories)), memories.items(), strict=True):
        coordinates, shares = principal_plane(torch.nn.functional.normalize(memory.rows, dim=1))
        points, classes = coordinates.cpu().numpy(), memory.classes.cpu().numpy()
        for label, (name, rgb) in enumerate(zip(data.classes, data.palette, strict=True)):
            own = points[classes == label]
            colour = np.array(rgb) / 255
            axis.scatter(*own.T, s=16, color=colour, edgecolors="0.3", linewidths=0.3, label=name, alpha=0.9)
        axis.set(title=title, xlabel=f"{100 * shares[0]:.0f} % of the variance", ylabel=f"{100 * shares[1]:.0f} %")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_aspect("equal", adjustable="datalim")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, markerscale=2)
    figure.suptitle("Features of labelled pixels in the memory, in a plane, coloured by class")
    figure.savefig(path, dpi=130)


def smooth(values: list[float], window: int = 9) -> list[float]:
    """Mean over the last ``window`` values at each position (fewer at the beginning)."""
    return [float(np.mean(values[max(0, end - window) : end])) for end in range(1, len(values) + 1)]


def _series(records: list[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values at which ``name`` was recorded."""
    pairs = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]
