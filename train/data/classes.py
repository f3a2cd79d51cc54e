"""Names and colours of classes: of the published data sets, and of ``classes.txt``. Imports neither torch nor numpy."""

from __future__ import annotations

from pathlib import Path

from train.errors import UserError

IGNORE_INDEX = 255

Palette = tuple[tuple[int, int, int], ...]

CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

CITYSCAPES_PALETTE: Palette = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip

VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip

CAMVID_PALETTE: Palette = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip


def default_colour(class_id: int) -> tuple[int, int, int]:
    """Entry ``class_id + 1`` of the PASCAL VOC colour map (entry 0 is black, the colour of ignored pixels)."""
    bits = class_id + 1
    channels = [0, 0, 0]
    for shift in range(7, -1, -1):  # every third bit of the id belongs to one channel, lowest id bit first
        for channel in range(3):
            channels[channel] |= (bits >> channel & 1) << shift
        bits >>= 3
    return channels[0], channels[1], channels[2]


VOC_PALETTE: Palette = tuple(default_colour(i - 1) for i in range(len(VOC)))
"""The VOC colour map from its entry 0: black is the class ``background`` here."""


def read_lines(path: Path, what: str) -> list[str]:
    """The stripped, non-empty lines of a text file; ``what`` they are, for the error."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: expected a text file with {what}, one a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): expected a UTF-8 text file with {what}, one a line") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} is empty: expected {what}, one a line")
    return lines


def read_classes(path: Path) -> tuple[tuple[str, ...], Palette]:
    """Read ``classes.txt``: one class a line, ``name`` or ``name r g b``; line number = class id.

    Classes without a colour get that of the PASCAL VOC colour map.
    """
    names: list[str] = []
    palette: list[tuple[int, int, int]] = []
    for line in read_lines(path, "the class names"):
        words = line.split()
        colour = default_colour(len(names))
        if len(words) >= 4 and all(word.isdecimal() for word in words[-3:]):
            red, green, blue = (int(word) for word in words[-3:])
            if max(red, green, blue) > 255:
                raise UserError(f"{path}: colour of '{line}' is out of range: expected r g b of 0 to 255 each")
            words, colour = words[:-3], (red, green, blue)
        names.append(" ".join(words))
        palette.append(colour)
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}: class '{repeated[0]}' occurs twice: every class needs a name of its own")
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise UserError(f"{path} has {len(names)} classes: expected 2 to {IGNORE_INDEX} (id {IGNORE_INDEX} is ignore)")
    return tuple(names), tuple(palette)
