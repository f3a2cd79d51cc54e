"""Writing generated scenes to disk just as the published data sets lie there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from train.data import cityscapes, voc
from train.data.classes import CITYSCAPES_PALETTE
from train.data.scenes.canvas import IGNORED, Size
from train.data.scenes.objects import draw_objects
from train.data.scenes.street import draw_street
from train.errors import UserError

Kind = Literal["cityscapes", "voc", "gta5"]
Save = Callable[[Path, str, int, np.ndarray, np.ndarray], str]

SIZES: dict[str, Size] = {"cityscapes": (128, 256), "voc": (120, 160), "gta5": (128, 256)}
"""Height and width unless given."""

OWN_CAR = 1
"""Value of ignored pixels in the Cityscapes files: "ego vehicle"."""


def make_scenes(kind: Kind, root: Path, train: int = 24, val: int = 6, size: Size | None = None, seed: int = 0) -> Path:
    """Write a small generated data set that `train.data.open_dataset` opens like the published one.

    The same arguments give the same pixels, and image ``i`` does not depend on how many there are.

    Args:
        kind: ``"cityscapes"``: streets. ``"gta5"``: streets that look like a game's. ``"voc"``: objects.
        root: an empty or new folder.
        train, val: number of images of each split.
        size: height and width in pixels, at least 32 each; `SIZES` unless given.
        seed: any integer.

    Returns:
        ``root``.

    Raises:
        UserError: unknown kind, no images, size too small, or ``root`` is not empty.
    """
    root, size = Path(root), size or SIZES.get(kind, (0, 0))
    if kind not in SIZES:
        raise UserError(f"unknown kind of scenes '{kind}': expected one of {', '.join(SIZES)}")
    if min(train, val) < 1 or min(size) < 32:
        raise UserError(f"{train} + {val} images of {size[0]}x{size[1]}: expected at least 1 + 1 images of 32x32")
    if root.is_dir() and any(root.iterdir()):
        raise UserError(f"folder {root} is not empty: give a new one, or delete it first")
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        names = []
        for index in range(count):
            rng = np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, list(SIZES).index(kind), number, index])
            if kind == "voc":
                image, label = draw_objects(rng, size, index)
            else:
                image, label = draw_street(rng, size, index, rendered=kind == "gta5")
            names.append(_SAVE[kind](root, split, index, image, label))
        if kind == "voc":
            _write_list(root / "VOC2012" / voc.LISTS[split][0], names)
        elif kind == "gta5":
            _write_list(root / f"{split}.txt", names)
    return root


def _save_cityscapes(root: Path, split: str, index: int, image: np.ndarray, label: np.ndarray) -> str:
    town = f"town{index % 3}"
    name = f"{town}_{index:06d}_000019"
    values = np.full(256, OWN_CAR, np.uint8)
    values[: len(cityscapes.LABEL_IDS)] = cityscapes.LABEL_IDS
    folders = [f"{part}_trainvaltest/{part}/{split}/{town}/{name}" for part in ("leftImg8bit", "gtFine")]
    _save(root / (folders[0] + cityscapes.IMAGE_ENDING), image)
    _save(root / (folders[1] + cityscapes.LABEL_ENDING), values[label])
    return name


def _save_voc(root: Path, split: str, index: int, image: np.ndarray, label: np.ndarray) -> str:
    name = f"{2007 if split == 'train' else 2008}_{index:06d}"
    _save(root / "VOC2012" / "JPEGImages" / f"{name}.jpg", image)
    _save(root / "VOC2012" / "SegmentationClassAug" / f"{name}.png", label)
    return name


def _save_gta5(root: Path, split: str, index: int, image: np.ndarray, label: np.ndarray) -> str:
    name = f"{index + (1 if split == 'train' else 12404):05d}"
    picture = Image.fromarray(np.where(label == IGNORED, len(CITYSCAPES_PALETTE), label).astype(np.uint8)).convert("P")
    picture.putpalette([value for colour in (*CITYSCAPES_PALETTE, (0, 0, 0)) for value in colour])
    _save(root / "images" / f"{name}.png", image)
    (root / "labels").mkdir(exist_ok=True)
    picture.save(root / "labels" / f"{name}.png")
    return name


_SAVE: dict[str, Save] = {"cityscapes": _save_cityscapes, "voc": _save_voc, "gta5": _save_gta5}


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=92)


def _write_list(path: Path, names: list[str]) -> None:
    path.write_text("\n".join(names) + "\n", encoding="utf-8")
