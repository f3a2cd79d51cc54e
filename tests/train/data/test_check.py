"""``python -m train check``, and splits that overlap."""

from __future__ import annotations

import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from train_helpers import error_of

from train.command_line import main
from train.config import FitConfig
from train.data.datasets import open_dataset
from train.data.scenes.layouts import make_scenes
from train.session import open_session


def check(*arguments: object, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of problems; the exit status must be 1 if there are any, else 0."""
    try:
        status: object = main(["check", *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code
    output = capsys.readouterr()
    lines = output.out.splitlines()
    if status == 0:
        assert len(lines) == 1 and lines[0].startswith("no problems")
        return []
    assert status == f"problems: {len(lines)}" and "/3 [" in output.err
    return lines


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_every_problem_is_one_line_with_its_path(small_folder: Path, capsys: pytest.CaptureFixture[str]):
    assert check("folder", small_folder, capsys=capsys) == []
    image, masks = small_folder / "images" / "b.jpg", small_folder / "masks"
    image.write_bytes(image.read_bytes()[:-200])
    save(masks / "a.png", np.full((12, 20), 300, np.uint16))
    save(masks / "c.png", np.full((12, 20), 3, np.uint8))
    lines = check("folder", small_folder, capsys=capsys)
    assert len(lines) == 3
    assert f"mask {masks / 'a.png'} has values outside the classes: 300;" in lines[0]
    assert f"cannot read image {image} (" in lines[1] and "truncated" in lines[1]
    assert f"mask {masks / 'c.png'} has values outside the classes: 3;" in lines[2]

    save(image.with_suffix(".png"), np.zeros((12, 20), np.uint16))
    image.unlink()
    save(masks / "a.png", np.zeros((20, 12), np.uint8))
    save(masks / "c.png", np.full((12, 20, 3), 7, np.uint8))
    lines = check("folder", small_folder, capsys=capsys)
    assert f"a.png is 20x12 pixels but its label {masks / 'a.png'} is 12x20" in lines[0]
    assert (
        "b.png has pixel format 'I;16'" in lines[1]
        and "c.png has colours that classes.txt does not list: (7, 7, 7);" in lines[2]
    )


def test_overlap_of_splits(tiny: FitConfig, small_folder: Path, capsys: pytest.CaptureFixture[str]):
    (small_folder / "train.txt").write_text("a\nc\n")
    (line,) = check("folder", small_folder, capsys=capsys)
    lists = f"{small_folder / 'train.txt'} and {small_folder / 'val.txt'}"
    assert line.startswith(f"{lists} have 1 images in common, such as {small_folder / 'images' / 'c.PNG'}: ")
    data = replace(tiny.data, root=small_folder)
    assert error_of(lambda: open_session(replace(tiny, data=data))) == line


def test_a_split_that_cannot_be_opened_does_not_hide_the_other(small_folder: Path, capsys: pytest.CaptureFixture[str]):
    (small_folder / "val.txt").unlink()
    save(small_folder / "masks" / "b.png", np.full((12, 20), 9, np.uint8))
    with pytest.raises(SystemExit, match="problems: 2"):
        main(["check", "folder", str(small_folder)])
    lines = capsys.readouterr().out.splitlines()
    assert "val.txt is missing" in lines[0] and "b.png has values outside" in lines[1]


@pytest.mark.parametrize("kind", ["cityscapes", "voc", "gta5"])
def test_published_data_sets(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = make_scenes(kind, tmp_path / kind, train=2, val=1, size=(48, 64))
    assert check(kind, root, capsys=capsys) == []
    label = open_dataset(kind, "val", root).pairs
    (path,) = (pair[1] for pair in label.values())
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + content[-12:])  # gta5 looks at the end when it is opened
    (line,) = check(kind, root, capsys=capsys)
    assert f"{path} (" in line


def test_camvid(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number, split in enumerate(("train", "val", "test")):
        save(tmp_path / split / f"{number}.png", np.zeros((9, 9, 3), np.uint8))
        save(tmp_path / f"{split}annot" / f"{number}.png", np.full((9, 9), 5 * number + 3, np.uint8))
    assert check("camvid", tmp_path, capsys=capsys) == []
    (line,) = check("camvid", tmp_path, "--splits", "train", "val", "test", capsys=capsys)
    assert "testannot/2.png has the values 13" in line


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_with_spaces_and_other_letters(small_folder: Path, form: str, capsys: pytest.CaptureFixture[str]):
    """An archive from macOS has the names in the form NFD, an editor writes NFC."""
    name = unicodedata.normalize(form, "Straße 1 (früh) 道路")
    for folder in ("images", "masks"):
        (small_folder / folder / "a.png").rename(small_folder / folder / f"{name}.png")
    (small_folder / "train.txt").write_text(unicodedata.normalize("NFC", name) + "\nb\n", encoding="utf-8")
    assert check("folder", small_folder, capsys=capsys) == []
    save(small_folder / "masks" / f"{name}.png", np.full((12, 20), 7, np.uint8))
    (line,) = check("folder", small_folder, capsys=capsys)
    assert f"{name}.png has values outside" in line
