"""Pictures of a report: bars of ratios, roofline, scaling lines with the floor, shares of training steps."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measure import Outcome
from .report import Report, milliseconds

# one colour for each contender, in all pictures
COLOURS = {
    "pixcontrast": "#1b6ca8",
    "pixcontrast, means kept": "#6fb1de",
    "pixcontrast reference": "#8d96a3",
    "best eager": "#66a182",
    "torch.compile": "#edae49",
    "formula as it stands": "#d1495b",
    "released code": "#7b2d43",
}
OTHER = "#b8a9c9"


def draw(report: Report, folder: Path) -> list[Path]:
    """Write every picture that the report has data for."""
    # all are shown in relation to the first contender, which may be wrong or have failed
    timed = [outcome for outcome in report.outcomes if any(row.ratio for row in outcome.rows)]
    steps = [outcome for outcome in timed if outcome.rest_ms]
    named = [outcome for outcome in timed if not outcome.sweep and not outcome.rest_ms]
    sweeps: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in report.outcomes:
        if outcome.sweep:
            what, size = outcome.sweep.split(": ")
            sweeps.setdefault(what, {}).setdefault(size, []).append(outcome)
    written = []
    if named:
        written += [_draw_ratios(named, folder / "ratios.png"), _draw_roofline(named, folder / "roofline.png")]
    if steps:
        written.append(_draw_steps(steps, folder / "steps.png"))
    written += [_draw_scaling(what, sizes, folder / f"scaling-{what}.png") for what, sizes in sweeps.items()]
    return written


def _draw_ratios(outcomes: list[Outcome], path: Path) -> Path:
    """How many times slower than the first contender of each case; the floor as a black mark."""
    lines = max(len(outcome.rows) for outcome in outcomes)
    columns = min(len(outcomes), 3)
    depth = -(-len(outcomes) // columns)
    figure = Figure(figsize=(4.6 * columns, depth * (0.32 * lines + 1.1)), layout="constrained")
    grid = figure.subplots(depth, columns, squeeze=False).flat
    for outcome, axis in zip(outcomes, grid, strict=False):
        rows = [row for row in outcome.rows if row.ms and row.ratio]
        bars = axis.barh(
            [row.contender for row in rows],
            [row.ratio for row in rows],
            color=[COLOURS.get(row.contender, OTHER) for row in rows],
        )
        axis.bar_label(bars, [f"{row.ratio:.1f} ×   {milliseconds(row.ms)} ms" for row in rows], padding=3, fontsize=8)
        if rows:
            floor = 1 / (rows[0].times_floor or 1)
            ratios = [row.ratio or 1 for row in rows]
            axis.axvline(floor, color="black", linewidth=1.2)
            axis.set_xlim(min(floor, *ratios, 1) / 2, max(ratios) * 30)  # room for the labels
        axis.set(xscale="log", title=outcome.case)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in grid:  # what is left over
        axis.set_axis_off()
    figure.suptitle("Times slower than pixcontrast (black line: floor of the machine)", fontsize=11)
    figure.savefig(path, dpi=130)
    return path


def _draw_steps(outcomes: list[Outcome], path: Path) -> Path:
    """How much of a whole training step the contrast takes, with each contender and at the floor."""
    figure = Figure(figsize=(8, 0.9 * len(outcomes) + 1.2), layout="constrained")
    axis = figure.subplots()
    names = list(dict.fromkeys(row.contender for outcome in outcomes for row in outcome.rows))
    height = 0.8 / len(names)
    for place, outcome in enumerate(outcomes):
        rest = outcome.rest_ms or 0.0
        for line, name in enumerate(names):
            ms = next((row.ms for row in outcome.rows if row.contender == name), None)
            if ms is None:
                continue
            bar = axis.barh(place + (line - (len(names) - 1) / 2) * height, 100 * ms / (ms + rest), height,
                            color=COLOURS.get(name, OTHER), label=name if place == 0 else None)  # fmt: skip
            axis.bar_label(bar, [f"{milliseconds(ms)} ms"], padding=3, fontsize=8)
        floor = 100 * outcome.floor_ms / (outcome.floor_ms + rest)
        axis.plot([floor, floor], [place - 0.4, place + 0.4], color="black", linewidth=1.2,
                  label="floor" if place == 0 else None)  # fmt: skip
    axis.set_yticks(
        range(len(outcomes)),
        [f"{o.case.removeprefix('step-')}\n(rest: {milliseconds(o.rest_ms or 0)} ms)" for o in outcomes],
        fontsize=8,
    )
    axis.set(xlabel="% of a training step", xlim=(0, 1.15 * axis.get_xlim()[1]))
    axis.set_title("What the contrast costs of a whole step", fontsize=11)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    return path


def _draw_scaling(what: str, sweeps: dict[str, list[Outcome]], path: Path) -> Path:
    """Milliseconds, and peak memory where it was measured, over each size that is varied."""
    with_memory = any(row.peak_mib is not None for outcomes in sweeps.values() for o in outcomes for row in o.rows)
    depth = 2 if with_memory else 1
    figure = Figure(figsize=(3.3 * len(sweeps), 3.0 * depth + 0.6), layout="constrained")
    grid = figure.subplots(depth, len(sweeps), squeeze=False)
    for column, (size, outcomes) in enumerate(sweeps.items()):
        _lines(grid[0][column], outcomes, "ms")
        xs = [outcome.x for outcome in outcomes]
        grid[0][column].plot(xs, [outcome.floor_ms for outcome in outcomes], "k--", linewidth=1.2, label="floor")
        grid[0][column].set(title=f"{what}: {size}", ylabel="ms" if column == 0 else "")
        if with_memory:
            _lines(grid[1][column], outcomes, "peak_mib")
            grid[1][column].set(ylabel="peak MiB" if column == 0 else "", ylim=(0.5, None))
        grid[-1][column].set(xlabel=size)
    handles = {
        label: handle for axis in grid[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=130)
    return path


def _lines(axis: Axes, outcomes: list[Outcome], what: str) -> None:
    for name in dict.fromkeys(row.contender for outcome in outcomes for row in outcome.rows):
        found = [(o.x, getattr(row, what)) for o in outcomes for row in o.rows if row.contender == name]
        points = [(x, y) for x, y in found if y is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, color=COLOURS.get(name, OTHER))
    axis.set(xscale="log", yscale="log")
    xs = [outcome.x for outcome in outcomes]
    axis.set_xticks(xs, [str(x) for x in xs])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_roofline(outcomes: list[Outcome], path: Path) -> Path:
    """Useful rate of the first contender of each case over its arithmetic intensity, under the ceilings of the run."""
    figure = Figure(figsize=(8.5, 4.4), layout="constrained")
    axis = figure.subplots()
    intensity = np.logspace(-1.5, 4, 100)
    bandwidth = float(np.median([outcome.rates["gb_per_s"] for outcome in outcomes]))
    markers = cycle("osD^v<>pPXh*d")
    for dtype in dict.fromkeys(str(outcome.work["dtype"]) for outcome in outcomes):
        rates = [o.rates["gflop_per_s"] for o in outcomes if o.work["dtype"] == dtype]
        roof = np.minimum(intensity * bandwidth, float(np.median(rates)))
        (line,) = axis.plot(intensity, roof, label=f"{bandwidth:.0f} GB/s, {dtype.removeprefix('torch.')} matmul")
        for outcome in (o for o in outcomes if o.work["dtype"] == dtype):
            first = outcome.rows[0]
            flops, moved = float(outcome.work["flops"]), float(outcome.work["bytes"])
            if not first.ms or not flops:
                continue
            place, marker = (flops / moved, flops / first.ms / 1e6), next(markers)
            axis.plot(*place, marker, color=line.get_color(), linestyle="none", markersize=7, label=outcome.case)
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be moved", ylabel="GFLOP/s")
    axis.set_title("pixcontrast under the ceilings of this run", fontsize=11)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    return path
