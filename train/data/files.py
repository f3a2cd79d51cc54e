"""Reading single images, masks and class lists, with one clear error for each way they can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.errors import UserError

IGNORE_INDEX = 255
IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel; others would be clipped
MASK_MODES = ("1", "L", "P")

Palette = tuple[tuple[int, int, int], ...]


def read_image(path: Path) -> Tensor:
    """Read an image as RGB, uint8 ``[3, H, W]``."""
    picture = _decode(path, "image", IMAGE_MODES, "an 8-bit RGB or grey image")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def read_mask(path: Path, num_classes: int) -> Tensor:
    """Read a mask of class ids (grey values or palette indices; 255 is ignored), uint8 ``[H, W]``."""
    picture = _decode(path, "mask", MASK_MODES, "8-bit class ids, one channel (grey or palette PNG)")
    mask = torch.from_numpy(np.array(picture).astype(np.uint8))
    values = torch.bincount(mask.flatten().int(), minlength=256).nonzero().flatten().tolist()
    outside = [value for value in values if num_classes <= value != IGNORE_INDEX]
    if outside:
        shown = ", ".join(map(str, outside[:8])) + (", ..." if len(outside) > 8 else "")
        raise UserError(
            f"mask {path} has values outside the classes: {shown}; allowed are 0 to {num_classes - 1} "
            f"({num_classes} classes in classes.txt) and {IGNORE_INDEX} (ignore): correct the mask or classes.txt"
        )
    return mask


def read_lines(path: Path, what: str) -> list[str]:
    """The stripped, non-empty lines of a text file."""
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


def default_colour(class_id: int) -> tuple[int, int, int]:
    """Entry ``class_id + 1`` of the PASCAL VOC colour map (entry 0 is black, the colour of ignored pixels)."""
    bits = class_id + 1
    channels = [0, 0, 0]
    for shift in range(7, -1, -1):  # every third bit of the id belongs to one channel, lowest id bit first
        for channel in range(3):
            channels[channel] |= (bits >> channel & 1) << shift
        bits >>= 3
    return channels[0], channels[1], channels[2]


def _decode(path: Path, what: str, modes: tuple[str, ...], expected: str) -> Image.Image:
    """Open and fully decode a picture, so that a truncated file is found here."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read {what} {path} ({reason}): truncated or not an image? replace the file") from None
    if picture.mode not in modes:
        raise UserError(f"{what} {path} has pixel format '{picture.mode}': expected {expected}; convert it")
    return picture
