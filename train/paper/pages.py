"""Drawing: pages of pictures with titles and legend, heat maps, the memory in a plane."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor
from torch.nn.functional import interpolate

from train.data.classes import Palette
from train.data.dataset import SegmentationDataset
from train.paper.introspection import MemoryRows, principal_plane

RGB = tuple[int, int, int]

DPI = 128  # a power of two: sizes in inches are then exact, and a page has the pixels it was given
CELL = (320, 480)
"""Height and width in pixels that a picture on a page is fitted into."""
PAGE_HEIGHT = 2600
"""Pixels that the rows of a page take at most: ten of Cityscapes, seven of VOC."""
GAP, MARGIN, LINE, MIN_COLUMN = 8, 32, 28, 280  # pixels; a line of the legend, and a column that a title fits into


@dataclass(frozen=True)
class Row:
    """A row of pictures: its name, the pictures uint8 [h, w, 3] of one size, as :func:`fitted` makes them, a note."""

    name: str
    pictures: list[np.ndarray]
    note: str = ""


def colour(classes: Tensor, palette: Palette, ignored: RGB) -> np.ndarray:
    """Class ids [H, W] as an RGB picture [H, W, 3] uint8; ids without a class have the colour ``ignored``."""
    table = np.array([*palette, ignored], dtype=np.uint8)
    ids = classes.cpu().numpy()
    return table[np.where((ids >= 0) & (ids < len(palette)), ids, len(palette))]


def fitted(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """``picture`` at the largest size of the aspect ``size`` (height, width) that fits into :data:`CELL`.

    Args:
        picture: an image uint8 [3, H, W], which is smoothed; or a map [H, W] of any dtype, of which each pixel of the
            result has the nearest value, so that no new class appears.
        size: of the labels, which all pictures of a row share.
    """
    scale = min(limit / side for limit, side in zip(CELL, size, strict=True))
    target = [max(1, round(side * scale)) for side in size]
    if picture.dim() == 3:
        return interpolate(picture[None], target, mode="bilinear", antialias=True)[0]
    rows, columns = (
        ((torch.arange(new, device=picture.device) + 0.5) * old / new).long()
        for new, old in zip(target, picture.shape, strict=True)
    )
    return picture[rows][:, columns]


def pages(rows: list[Row]) -> list[list[Row]]:
    """Rows in order, split into as few pages as :data:`PAGE_HEIGHT` allows for, about equally many on each."""
    total = sum(row.pictures[0].shape[0] + GAP for row in rows)
    count = -(-total // PAGE_HEIGHT)
    ends = [len(rows) * page // count for page in range(count + 1)]
    return [rows[start:end] for start, end in pairwise(ends)]


def compose(rows: list[Row]) -> tuple[np.ndarray, list[int], list[int]]:
    """Pictures of ``rows`` on white, unscaled, each in the middle of its cell.

    Returns:
        the grid [H, W, 3] uint8; the middle of each column, from the left; the middle of each row, from the top.
    """
    width = max(MIN_COLUMN, *(row.pictures[0].shape[1] for row in rows))
    columns = len(rows[0].pictures)
    height = sum(row.pictures[0].shape[0] + GAP for row in rows) - GAP
    grid = np.full((height, columns * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    top, middles = 0, []
    for row in rows:
        for column, picture in enumerate(row.pictures):
            left = column * (width + GAP) + (width - picture.shape[1]) // 2
            grid[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        middles.append(top + row.pictures[0].shape[0] // 2)
        top += row.pictures[0].shape[0] + GAP
    return grid, [column * (width + GAP) + width // 2 for column in range(columns)], middles


def draw_page(
    path: Path, titles: list[str], rows: list[Row], data: SegmentationDataset, weights: ScalarMappable | None = None
) -> None:
    """A page of pictures with a title over each column, the name beside each row, and a legend of the classes.

    The pictures keep their pixels, so that colours in the file are exactly those of the classes.

    Args:
        titles: of the columns, of one or two lines.
        data: whose classes and colours the legend shows.
        weights: what :func:`heat_map` was given, shown as a bar below the pictures.
    """
    grid, middles, row_middles = compose(rows)
    entries = [*zip(data.classes, data.palette, strict=True), ("not labelled", data.ignore_colour)]
    width = grid.shape[1] + 2 * MARGIN
    per_line = min(len(entries), max(1, width // (80 + 11 * max(len(name) for name, _ in entries))))
    legend = LINE * (-(-len(entries) // per_line) + 1)
    bottom = legend + (4 * LINE if weights else 0)
    height = bottom + grid.shape[0] + 3 * LINE
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(grid, MARGIN, bottom, origin="upper")
    top = bottom + grid.shape[0]
    for middle, title in zip(middles, titles, strict=True):
        figure.text((MARGIN + middle) / width, (top + GAP) / height, title, ha="center", va="bottom", fontsize=13)
    for middle, row in zip(row_middles, rows, strict=True):
        name = row.name if len(row.name) <= 26 else f"…{row.name[-25:]}"
        position = MARGIN / 2 / width, (top - middle) / height
        name = f"{name}\n{row.note}".strip()
        figure.text(*position, name, rotation=90, ha="center", va="center", fontsize=7, color="0.35")
    handles = [Patch(facecolor=_shares(rgb), edgecolor="black", label=name) for name, rgb in entries]
    middle_of_legend = 0.5, legend / 2 / height
    figure.legend(handles=handles, loc="center", bbox_to_anchor=middle_of_legend, ncols=per_line, frameon=False)
    if weights:
        axis = figure.add_axes((0.25, (legend + 2.5 * LINE) / height, 0.5, 0.8 * LINE / height))
        figure.colorbar(
            weights, cax=axis, orientation="horizontal", extend="both", format="%.2g", ticks=_ticks(weights)
        )
        axis.set_xlabel("weight of the pixel in the contrast of its predicted class (average of the class: 1)")
    figure.savefig(path, dpi=DPI)


def weight_colours(weights: list[Tensor]) -> ScalarMappable:
    """Colours of weights around 1: blue below, red above, white at 1; NaN is left out.

    The scale ends at the 0.5 and 99.5 % points of all ``weights``: a few pixels of a rare class may weigh a hundred
    times as much as the others.
    """
    values = np.concatenate([w[~w.isnan()].cpu().numpy() for w in weights])
    low, high = np.quantile(values, [0.005, 0.995]) if len(values) else (1.0, 1.0)
    return ScalarMappable(TwoSlopeNorm(1.0, min(low, 0.99), max(high, 1.01)), "RdBu_r")


def heat_map(image: Tensor, weights: Tensor, colours: ScalarMappable) -> np.ndarray:
    """The image in grey, tinted by the weights; a pixel of weight 1 or NaN stays grey.

    Args:
        image: uint8 [3, h, w].
        weights: [h, w].

    Returns:
        RGB picture [h, w, 3] uint8.
    """
    tint = colours.to_rgba(weights.nan_to_num(1.0).cpu().numpy())[..., :3]
    grey = image.float().mean(0).cpu().numpy()[..., None]
    # dark pixels keep some tint, or the shade would hide it
    return ((90 + grey * 165 / 255) * tint).round().astype(np.uint8)


def draw_memory_plane(path: Path, memory: MemoryRows, data: SegmentationDataset) -> None:
    """The rows of a memory in the plane in which they vary most; area is weight, colour is the class."""
    coordinates, shares = principal_plane(memory.rows)
    classes, weights = memory.classes.cpu(), memory.weights.cpu()
    colours = np.array(data.palette)[classes] / 255
    figure = Figure(figsize=(10.5, 7.5), dpi=DPI, layout="constrained")
    axis = figure.subplots()
    x, y = coordinates.cpu().numpy().T
    axis.scatter(x, y, s=2 + 26 * weights.numpy(), c=colours, edgecolors="0.25", linewidths=0.3)
    first, second = (100 * shares).tolist()
    axis.set(xlabel=f"first principal component ({first:.0f} % of the variance)", ylabel=f"second ({second:.0f} %)")
    axis.set(title="Rows of the memory, larger where they weigh more")
    axis.set_aspect("equal", adjustable="datalim")
    axis.spines[["top", "right"]].set_visible(False)
    counts = classes.bincount(minlength=len(data.classes)).tolist()
    handles = [
        Line2D([], [], linestyle="", marker="o", color=_shares(rgb), markeredgecolor="0.25", label=f"{name} ({count})")
        for name, rgb, count in zip(data.classes, data.palette, counts, strict=True)
    ]
    axis.legend(handles=handles, title="class (rows)", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=DPI)


def _shares(rgb: RGB) -> tuple[float, float, float]:
    """A colour of 0..255 as matplotlib takes it."""
    return rgb[0] / 255, rgb[1] / 255, rgb[2] / 255


def _ticks(colours: ScalarMappable) -> list[float]:
    """Ticks of the colour bar: its ends, 1, and the middles between them."""
    low, high = colours.get_clim()
    assert low is not None and high is not None
    return [low, (low + 1) / 2, 1.0, (1 + high) / 2, high]
