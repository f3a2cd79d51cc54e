"""The embedded land-cover tiles: classes, index, geometry of the split, alignment of images and labels, size."""

from __future__ import annotations

import csv
import itertools

import pytest
import torch
from train_helpers import pixel_counts

from train.data.datasets import LANDCOVER, open_dataset
from train.data.splits import covering_seed, split_labelled
from train.errors import UserError

SPLITS = ("train", "val", "test")


def read_tiles() -> list[dict[str, str]]:
    with open(LANDCOVER / "tiles.csv") as file:
        return list(csv.DictReader(file))


def test_landcover_has_every_class_in_every_split_and_valid_masks():
    for split, least in (("train", 120), ("val", 25), ("test", 45)):
        dataset = open_dataset("landcover", split)
        counts = pixel_counts(dataset)
        assert dataset.name == "landcover" and len(dataset) >= least
        assert dataset.classes == ("water", "forest", "grass+crops", "bare ground", "ice")
        assert len(dataset.palette) == len(counts) == 5
        assert counts.min() / counts.sum() > 0.03
        assert counts.max() / counts.sum() < 0.5
        image, mask = dataset[0]
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert mask.shape == (96, 96) and mask.dtype == torch.int64


def test_landcover_index_agrees_with_the_folder():
    tiles = read_tiles()
    for split in SPLITS:
        assert [tile["id"] for tile in tiles if tile["split"] == split] == open_dataset("landcover", split).ids
    ids = {tile["id"] for tile in tiles}
    assert len(ids) == len(tiles) and {tile["split"] for tile in tiles} == set(SPLITS)
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
        assert distance(a, b) >= (0 if a["split"] == b["split"] else 16), (a["id"], b["id"])


def test_landcover_water_is_blue_where_labels_say_so():
    """Image and labels are aligned: water is told from land by its colour, best without any shift."""
    agreement = {}
    data = open_dataset("landcover", "test")
    tiles = [item for item in (data[i] for i in range(len(data))) if (item[1] == 4).sum() == 0]
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


def test_landcover_labels_have_no_grain():
    """No label is ignored, few neighbouring pixels differ, and hardly any pixel is alone among its eight neighbours."""
    for split in SPLITS:
        data = open_dataset("landcover", split)
        masks = torch.stack([data[index][1] for index in range(len(data))])
        assert int((masks == 255).sum()) == 0
        changes = (masks[:, :, 1:] != masks[:, :, :-1]).float().mean() + (masks[:, 1:] != masks[:, :-1]).float().mean()
        assert changes / 2 < 0.04  # 0.12 in the labels as published, of seven classes
        same = torch.nn.functional.one_hot(masks, 5).permute(0, 3, 1, 2).float()
        window = torch.nn.functional.avg_pool2d(same, 5, 1) * 25
        own = window.gather(1, masks[:, None, 2:-2, 2:-2])
        assert (own < 8).float().mean() < 0.001  # a smaller spot or a thinner line than this is grain


def test_labelled_draws_have_every_class():
    train = open_dataset("landcover", "train")
    draws = [covering_seed(train, 5, seed) for seed in range(4)]
    assert len(set(draws)) == 4
    for seed, draw in enumerate(draws):
        assert 1000 * seed <= draw < 1000 * (seed + 1)
        labelled, _ = split_labelled(len(train), 5, draw)
        counts = sum(torch.bincount(train[index][1].flatten(), minlength=5) for index in labelled)
        assert counts.min() >= 0.02 * counts.sum()
    with pytest.raises(UserError, match="--labelled 1: in none of 1000 draws"):
        covering_seed(train, 1, 0, least=0.19)


def test_landcover_is_small_and_attributed():
    assert sum(path.stat().st_size for path in LANDCOVER.rglob("*") if path.is_file()) <= 3e6
    text = (LANDCOVER / "ATTRIBUTION.md").read_text()
    assert "Blue Marble" in text and "MCD12C1" in text
