"""The folder data set and its errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import error_of, pixel_counts

from train.data.classes import default_colour
from train.data.datasets import open_dataset
from train.data.folder import open_folder


@pytest.fixture
def folder(small_folder: Path) -> Path:
    return small_folder


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
    assert "'test'" in error_of(lambda: open_dataset("folder", "test", folder))
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
    save_mask(folder / "masks" / "a.png", 0, mode="RGBA")
    assert "masks/a.png has pixel format 'RGBA'" in error_of(lambda: dataset[0])
    save_mask(folder / "masks" / "a.png", 1, mode="1")
    assert dataset[0][1].unique().tolist() == [1]


def test_masks_of_16_bits(folder: Path):
    pixels = np.full((12, 20), 2, np.uint16)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(folder / "masks" / "a.png")
    dataset = open_dataset("folder", "train", folder)
    assert dataset[0][1].tolist() == pixels.tolist()
    pixels[3, 4] = 256 + 1  # whose low byte is a class
    Image.fromarray(pixels).save(folder / "masks" / "a.png")
    assert "values outside the classes: 257;" in error_of(lambda: open_dataset("folder", "train", folder)[0])


def test_masks_of_colours(folder: Path):
    (folder / "classes.txt").write_text("road 128 64 128\ntraffic light 250 170 30\nsky 70 130 180\n")
    ids = np.arange(12 * 20).reshape(12, 20) % 3
    colours = np.array([[128, 64, 128], [250, 170, 30], [70, 130, 180]], np.uint8)[ids]
    Image.fromarray(colours).save(folder / "masks" / "a.png")
    assert open_dataset("folder", "train", folder)[0][1].tolist() == ids.tolist()
    colours[1, 2] = (1, 2, 3)
    Image.fromarray(colours).save(folder / "masks" / "a.png")
    message = error_of(lambda: open_dataset("folder", "train", folder)[0])
    assert "a.png has colours that classes.txt does not list: (1, 2, 3);" in message


@pytest.mark.parametrize("file", ["images/a.png", "images/b.jpg", "masks/a.png"])
@pytest.mark.parametrize("damage", ["truncated", "foreign", "empty"])
def test_unreadable_files(folder: Path, file: str, damage: str):
    dataset = open_dataset("folder", "train", folder)
    path = folder / file
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "foreign": b"not a picture", "empty": b""}[damage])
    message = error_of(lambda: pixel_counts(dataset))
    assert str(path) in message and "cannot read" in message
