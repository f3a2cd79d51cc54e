"""The embedded land-cover tiles: classes, index, geometry of the split, alignment of images and labels, size."""

from __future__ import annotations

import csv
import itertools

import torch
from train_helpers import pixel_counts

from train.data.datasets import LANDCOVER, open_dataset


def read_tiles() -> list[dict[str, str]]:
    with open(LANDCOVER / "tiles.csv") as file:
        return list(csv.DictReader(file))


def test_landcover_has_every_class_in_both_splits_and_valid_masks():
    for split, least in (("train", 200), ("val", 50)):
        dataset = open_dataset("landcover", split)
        counts = pixel_counts(dataset)
        assert dataset.name == "landcover" and len(dataset) >= least
        assert len(dataset.classes) == len(dataset.palette) == len(counts) == 7
        assert counts.min() > 0
        assert counts.max() / counts.sum() < 0.5
        image, mask = dataset[0]
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert mask.shape == (96, 96) and mask.dtype == torch.int64


def test_landcover_index_agrees_with_the_folder():
    tiles = read_tiles()
    for split in ("train", "val"):
        assert [tile["id"] for tile in tiles if tile["split"] == split] == open_dataset("landcover", split).ids
    ids = {tile["id"] for tile in tiles}
    assert {path.stem for path in (LANDCOVER / "images").iterdir()} == ids
    assert {path.stem for path in (LANDCOVER / "masks").iterdir()} == ids


def test_landcover_tiles_do_not_overlap_and_splits_do_not_touch():
    """Distance of two squares along the axis where they are farther apart; columns wrap around the globe."""
    tiles = read_tiles()
    world = 5400

    def distance(a: dict[str, str], b: dict[str, str]) -> int:
        rows = abs(int(a["top"]) - int(b["top"]))
        columns = abs(int(a["left"]) - int(b["left"]))
        return max(rows, min(columns, world - columns)) - int(a["size"])

    for a, b in itertools.combinations(tiles, 2):
        assert distance(a, b) >= (0 if a["split"] == b["split"] else 24), (a["id"], b["id"])


def test_landcover_water_is_blue_where_labels_say_so():
    """Image and labels are aligned: water is told from land by its colour, best without any shift."""
    agreement = {}
    tiles = [open_dataset("landcover", "val")[i] for i in range(0, 54, 3)]
    for shift in ((0, 0), (3, 0), (-3, 0), (0, 3), (0, -3)):
        right = total = 0
        for image, mask in tiles:
            blue = image[2].int() - torch.maximum(image[0], image[1]).int() > 8
            inner = (slice(3, -3), slice(3, -3))
            same = (blue.roll(shift, (0, 1)) == (mask == 0))[inner]
            right, total = right + int(same.sum()), total + same.numel()
        agreement[shift] = right / total
    assert agreement[0, 0] > 0.95
    assert all(agreement[0, 0] > value + 0.003 for shift, value in agreement.items() if shift != (0, 0)), agreement


def test_landcover_is_small_and_attributed():
    assert sum(path.stat().st_size for path in LANDCOVER.rglob("*") if path.is_file()) <= 3e6
    text = (LANDCOVER / "ATTRIBUTION.md").read_text()
    assert "Blue Marble" in text and "MCD12C1" in text
