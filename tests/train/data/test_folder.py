"""The folder data set with its errors, the labelled split, and the batches."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import error_of, pixel_counts

from train.data.batches import Batches
from train.data.classes import default_colour
from train.data.dataset import SegmentationDataset
from train.data.datasets import open_dataset
from train.data.folder import open_folder
from train.data.splits import split_labelled

# --- folder -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, images a (png), b (jpg, palette mask) and c, of 20 x 12 pixels."""
    root = tmp_path / "mine"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    (root / "classes.txt").write_text("road\ntraffic light 250 170 30\n\nsky\n")
    (root / "train.txt").write_text("b\na\n")
    (root / "val.txt").write_text("c\n")
    generator = np.random.default_rng(0)
    for item, ending in (("a", "png"), ("b", "jpg"), ("c", "PNG")):
        Image.fromarray(generator.integers(0, 256, (12, 20, 3), np.uint8)).save(root / "images" / f"{item}.{ending}")
        mask = Image.fromarray(generator.choice(np.array([0, 1, 2, 255], np.uint8), (12, 20)))
        if item == "b":
            mask = mask.convert("P")
            mask.putpalette([7] * 768)
        mask.save(root / "masks" / f"{item}.png")
    return root


def save_mask(path: Path, value: int, size: tuple[int, int] = (20, 12), mode: str = "L") -> None:
    Image.new(mode, size, value).save(path)


def test_folder_reads_images_masks_and_classes(folder: Path):
    dataset = open_dataset("folder", "train", folder)
    assert dataset.ids == ["a", "b"] and dataset.classes == ("road", "traffic light", "sky")
    assert dataset.palette == (default_colour(0), (250, 170, 30), default_colour(2)) and dataset.ignore_index == 255
    for index, file in enumerate(("a.png", "b.jpg")):
        image, mask = dataset[index]
        expected = np.asarray(Image.open(folder / "images" / file).convert("RGB"))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
        assert np.array_equal(mask.numpy(), np.asarray(Image.open(folder / "masks" / f"{file[0]}.png")))
    masks = [np.asarray(Image.open(folder / "masks" / f"{item}.png")) for item in "ab"]
    assert pixel_counts(dataset).tolist() == [sum(int((mask == c).sum()) for mask in masks) for c in range(3)]


def test_folder_cache_keeps_items_and_is_safe_to_write_to(folder: Path):
    dataset = open_folder(folder, "train")
    uncached = open_folder(folder, "train", cache_bytes=0)
    image, mask = dataset[0]
    before = image.clone(), mask.clone()
    image.zero_(), mask.zero_()
    (folder / "images" / "a.png").unlink()
    assert all(torch.equal(a, b) for a, b in zip(dataset[0], before, strict=True))
    assert "a.png" in error_of(lambda: uncached[0])


def test_default_colours_are_those_of_voc():
    assert [default_colour(i) for i in (0, 1, 2, 3, 14)] == [
        (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (192, 128, 128)
    ]  # fmt: skip
    assert len({default_colour(i) for i in range(255)}) == 255


def test_names_and_splits_that_do_not_exist(folder: Path):
    assert "'city'" in error_of(lambda: open_dataset("city", "train"))
    assert "'test'" in error_of(lambda: open_dataset("landcover", "test"))
    assert "root" in error_of(lambda: open_dataset("folder", "train"))
    message = error_of(lambda: open_dataset("folder", "train", folder / "nowhere"))
    assert str(folder / "nowhere") in message and "does not exist" in message


@pytest.mark.parametrize("missing", ["images", "masks", "classes.txt", "train.txt"])
def test_missing_parts_are_named(folder: Path, missing: str):
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert str(path) in error_of(lambda: open_dataset("folder", "train", folder))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("classes.txt", "\n", "is empty"),
        ("classes.txt", "road\nroad\n", "'road' occurs twice"),
        ("classes.txt", "road\n", "1 classes"),
        ("classes.txt", "\n".join(f"class{i}" for i in range(256)), "256 classes"),
        ("classes.txt", "road 1 2 256\nsky\n", "'road 1 2 256'"),
        ("train.txt", "\n", "is empty"),
        ("train.txt", "a\nb\na\n", "'a' twice"),
        ("train.txt", "a\nmissing\n", "'missing'"),
        ("train.txt", "a.png\n", "ids have no ending"),
    ],
)
def test_bad_lists(folder: Path, file: str, text: str, expected: str):
    (folder / file).write_text(text)
    message = error_of(lambda: open_dataset("folder", "train", folder))
    assert str(folder / file) in message and expected in message


def test_list_that_is_not_text(folder: Path):
    (folder / "train.txt").write_bytes(b"\xff\xfe\x00a\x80")
    assert "train.txt" in error_of(lambda: open_dataset("folder", "train", folder))


def test_image_without_mask_and_two_images_of_one_id(folder: Path):
    (folder / "images" / "a.jpeg").write_bytes(b"")
    message = error_of(lambda: open_dataset("folder", "train", folder))
    assert "a.png" in message and "a.jpeg" in message
    (folder / "images" / "a.jpeg").unlink()
    (folder / "masks" / "a.png").unlink()
    message = error_of(lambda: open_dataset("folder", "train", folder))
    assert str(folder / "images" / "a.png") in message and str(folder / "masks" / "a.png") in message


def test_mask_value_outside_the_classes(folder: Path):
    pixels = np.full((12, 20), 2, np.uint8)
    pixels[3, 4], pixels[5, 6], pixels[7, 8] = 3, 254, 255
    Image.fromarray(pixels).save(folder / "masks" / "b.png")
    dataset = open_dataset("folder", "train", folder)
    for action in (lambda: dataset[1], lambda: pixel_counts(dataset)):
        message = error_of(action)
        assert str(folder / "masks" / "b.png") in message and "3, 254;" in message and "0 to 2" in message


def test_mask_of_another_kind_or_size(folder: Path):
    dataset = open_dataset("folder", "train", folder)
    save_mask(folder / "masks" / "a.png", 1, size=(12, 20))
    message = error_of(lambda: dataset[0])
    assert "20x12" in message and "12x20" in message and "a.png" in message
    save_mask(folder / "masks" / "a.png", 0, mode="RGB")
    assert "'RGB'" in error_of(lambda: dataset[0])
    save_mask(folder / "masks" / "a.png", 0, mode="I;16")
    assert "masks/a.png has pixel format" in error_of(lambda: dataset[0])
    save_mask(folder / "masks" / "a.png", 1, mode="1")
    assert dataset[0][1].unique().tolist() == [1]


@pytest.mark.parametrize("file", ["images/a.png", "images/b.jpg", "masks/a.png"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_unreadable_files(folder: Path, file: str, damage: str):
    dataset = open_dataset("folder", "train", folder)
    path = folder / file
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "foreign": b"not a picture", "empty": b""}[damage])
    message = error_of(lambda: pixel_counts(dataset))
    assert str(path) in message and "cannot read" in message


# --- labelled split ---------------------------------------------------------------------------------------------------


def test_split_is_a_seeded_nested_partition():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = split_labelled(100, 20, seed=3)
    random.random(), np.random.rand(), torch.rand(5)
    assert split_labelled(100, 20, seed=3) == first == split_labelled(100, 0.2, seed=3)
    assert split_labelled(100, 20, seed=4) != first
    labelled, unlabelled = first
    assert len(labelled) == 20 and sorted(labelled + unlabelled) == list(range(100))
    assert labelled == sorted(labelled) and labelled != list(range(20)) and unlabelled == sorted(unlabelled)
    assert set(labelled) < set(split_labelled(100, 50, seed=3)[0])


def test_split_counts_and_fractions():
    assert len(split_labelled(7, 1, 0)[0]) == 1 and split_labelled(7, 1.0, 0) == (list(range(7)), [])
    assert len(split_labelled(211, 1 / 20, 0)[0]) == 11 and len(split_labelled(9, 0.001, 0)[0]) == 1
    for wrong in (0, -1, 8, 0.0, 1.5, -0.5, float("nan")):
        assert str(wrong) in error_of(lambda wrong=wrong: split_labelled(7, wrong, 0))


# --- batches ----------------------------------------------------------------------------------------------------------


def take(batches: Batches, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(itertools.islice(batches, count))


def assert_same(first, second) -> None:
    assert len(first) == len(second) > 0
    for (images, masks), (other_images, other_masks) in zip(first, second, strict=True):
        assert torch.equal(images, other_images) and torch.equal(masks, other_masks)


@pytest.fixture(scope="module")
def landcover() -> SegmentationDataset:
    return open_dataset("landcover", "train")


def test_batches_shapes_and_content(landcover):
    for images, masks in take(Batches(landcover, range(30), 4, (48, 64), 0, "labelled"), 3):
        assert images.shape == (4, 3, 48, 64) and images.dtype == torch.uint8
        assert masks.shape == (4, 48, 64) and masks.dtype == torch.int64
        assert not (masks == 255).all()


def test_batches_resume_anywhere(landcover):
    """Also across epochs: 10 images in batches of 4 are 2 batches an epoch."""
    straight = take(Batches(landcover, range(10), 4, 32, 5, "labelled"), 9)
    for start in (0, 1, 2, 7):
        resumed = Batches(landcover, range(10), 4, 32, 5, "labelled", start=start)
        assert_same(take(resumed, 9 - start), straight[start:])


def test_batches_depend_on_seed_and_stream(landcover):
    base = take(Batches(landcover, range(40), 4, 32, 5, "labelled"), 2)
    for seed, stream in ((6, "labelled"), (5, "unlabelled"), (-1, "labelled")):
        other = take(Batches(landcover, range(40), 4, 32, seed, stream), 2)
        assert not all(torch.equal(a[0], b[0]) for a, b in zip(base, other, strict=True))


def test_batches_are_the_same_with_workers_and_leave_the_global_state_alone(landcover):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    alone = take(Batches(landcover, range(20), 3, 40, 1, "u", start=4), 5)
    shared = take(Batches(landcover, range(20), 3, 40, 1, "u", start=4, workers=2), 5)
    assert_same(alone, shared)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]
    torch.manual_seed(99)
    assert_same(alone, take(Batches(landcover, range(20), 3, 40, 1, "u", start=4), 5))


def test_every_epoch_is_a_permutation(landcover):
    indices = [3, 14, 15, 92, 65, 35]
    batches = Batches(landcover, indices, 2, 32, 0, "x")
    epochs = [[index for i in range(3) for _, index in batches.samples(epoch * 3 + i)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(indices) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    numbers = [number for i in range(6) for number, _ in batches.samples(i)]
    assert numbers == list(range(12))


def test_incomplete_batch_is_dropped_and_small_sets_repeat(landcover):
    batches = Batches(landcover, range(5), 2, 32, 0, "x")
    for epoch in range(3):
        order = [index for i in range(2) for _, index in batches.samples(2 * epoch + i)]
        assert len(set(order)) == 4
    small = Batches(landcover, [7, 8, 9], 7, 32, 0, "x")
    for number in range(4):
        drawn = [index for _, index in small.samples(number)]
        assert len(drawn) == 7 and sorted(drawn[:3]) == sorted(drawn[3:6]) == [7, 8, 9] and drawn[6] in (7, 8, 9)
    assert len(take(Batches(landcover, [7], 3, 32, 0, "x"), 2)[0][0]) == 3
    doubled = Batches(landcover, range(30), 60, 32, 0, "x")
    orders = [[index for _, index in doubled.samples(number)] for number in range(3)]
    assert len({tuple(half) for order in orders for half in (order[:30], order[30:])}) == 6


def test_crops_move_and_cut_image_and_mask_alike(folder: Path):
    """The mask is written into the image, so any misalignment shows; the image is unique in every pixel."""
    codes = np.arange(240, dtype=np.uint8).reshape(12, 20)
    mask = (codes % 3).astype(np.uint8)
    Image.fromarray(np.stack([codes, mask, codes], -1)).save(folder / "images" / "a.png")
    Image.fromarray(mask).save(folder / "masks" / "a.png")
    dataset = open_dataset("folder", "train", folder)
    corners = set()
    for images, masks in take(Batches(dataset, [0], 2, (5, 6), 0, "x"), 60):
        assert torch.equal(images[:, 1].long(), masks)
        for image in images[:, 0].long():
            assert (image[:, 1:] - image[:, :-1] == 1).all() and (image[1:] - image[:-1] == 20).all()
            corners.add(int(image[0, 0]))
    rows, columns = {corner // 20 for corner in corners}, {corner % 20 for corner in corners}
    assert rows == set(range(8)) and columns == set(range(15))


def test_small_images_are_padded(folder: Path):
    dataset = open_dataset("folder", "train", folder)
    image, mask = dataset[0]
    images, masks = take(Batches(dataset, [0], 1, (16, 20), 0, "x"), 1)[0]
    assert torch.equal(images[0, :, :12], image) and torch.equal(masks[0, :12], mask)
    assert (images[0, :, 12:] == 0).all() and (masks[0, 12:] == 255).all()
    images, masks = take(Batches(dataset, [0], 1, 24, 0, "x"), 1)[0]
    assert images.shape == (1, 3, 24, 24) and (masks[0, :, 20:] == 255).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_file_arrives_as_one_line(folder: Path, workers: int):
    (folder / "masks" / "a.png").write_bytes(b"")
    dataset = open_dataset("folder", "train", folder)
    message = error_of(lambda: take(Batches(dataset, [0, 1], 2, 8, 0, "x", workers=workers), 1))
    assert message.startswith("cannot read mask")


def test_batches_refuse_nothing_to_read(landcover):
    assert "unlabelled" in error_of(lambda: Batches(landcover, [], 2, 32, 0, "unlabelled"))
    assert "batch size 0" in error_of(lambda: Batches(landcover, [1], 0, 32, 0, "x"))
    assert "crop size 0" in error_of(lambda: Batches(landcover, [1], 1, 0, 0, "x"))
