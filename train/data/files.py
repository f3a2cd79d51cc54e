"""Reading single images, masks and label pictures, with one clear error for each way they can be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from train.data.classes import IGNORE_INDEX, Palette
from train.errors import UserError, reason

IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits per channel; others would be clipped
MASK_MODES = ("1", "L", "P")
FOLDER_MASK_MODES = (*MASK_MODES, "I;16", "RGB")

FOREIGN = -1
"""Entry of a look-up table for a value that the data set never writes."""


def read_image(path: Path) -> Tensor:
    """Read an image as RGB, uint8 ``[3, H, W]``."""
    picture = _decode(path, "image", IMAGE_MODES, "an 8-bit RGB or grey image")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def read_mask(path: Path, num_classes: int, palette: Palette = ()) -> Tensor:
    """Read a mask, uint8 ``[H, W]``: class ids (grey or palette indices; 255 is ignored) or RGB colours.

    Args:
        path: its file.
        num_classes: how many class ids there are.
        palette: colour of each class, for RGB masks.

    Raises:
        UserError: unreadable file, another pixel format, a value or colour that is no class.
    """
    picture = _decode(path, "mask", FOLDER_MASK_MODES, "class ids in one channel, or the colours of classes.txt")
    pixels = np.array(picture)
    if picture.mode == "RGB":
        ids = _ids_of_colours(pixels, palette)
        unknown = sorted({tuple(colour) for colour in pixels[ids == IGNORE_INDEX].tolist()})
        if unknown:
            raise UserError(
                f"mask {path} has colours that classes.txt does not list: {_some(unknown)}; add 'name r g b' lines, or "
                "convert the mask to class ids with 255 for what is ignored"
            )
        return torch.from_numpy(ids)
    outside = [value for value in np.unique(pixels).tolist() if num_classes <= value != IGNORE_INDEX]
    if outside:
        raise UserError(
            f"mask {path} has values outside the classes: {_some(outside)}; allowed are 0 to {num_classes - 1} "
            f"({num_classes} classes in classes.txt) and {IGNORE_INDEX} (ignore): correct the mask or classes.txt"
        )
    return torch.from_numpy(pixels.astype(np.uint8))


def id_table(ids: Mapping[int, int]) -> np.ndarray:
    """Look-up table int16 ``[256]``: class id of every value on disk, `FOREIGN` for values that ``ids`` lacks."""
    table = np.full(256, FOREIGN, np.int16)
    table[list(ids)] = list(ids.values())
    return table


def read_ids(path: Path, table: np.ndarray, expected: str) -> Tensor:
    """Read a one-channel label and map its values to class ids, uint8 ``[H, W]``.

    Args:
        path: 8-bit grey or palette PNG.
        table: class id of each value, from `id_table`.
        expected: the values of this data set in words, for the error.

    Raises:
        UserError: unreadable file, or a value that the table calls foreign.
    """
    values = _read_values(path)
    ids = table[values]
    if ids.min() == FOREIGN:
        foreign = _some(np.unique(values[ids == FOREIGN]).tolist())
        raise UserError(f"label {path} has the values {foreign}: expected {expected}; is it another kind of label?")
    return torch.from_numpy(ids.astype(np.uint8))


def read_colours(path: Path, palette: Palette) -> Tensor:
    """Read a label of class colours, uint8 ``[H, W]``: index of each pixel's colour in ``palette``, else 255.

    Args:
        path: palette or RGB PNG; the file's own palette may be in any order.
        palette: RGB colour of each class.

    Raises:
        UserError: unreadable file, or a picture without colours.
    """
    picture = _decode(path, "label", ("P", "RGB"), "class colours (palette or RGB PNG)")
    if picture.mode == "RGB":
        return torch.from_numpy(_ids_of_colours(np.array(picture), palette))
    colours = np.zeros((256, 3), np.uint8)
    own = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
    colours[: len(own)] = own
    return torch.from_numpy(_ids_of_colours(colours, palette)[np.array(picture)])


def _ids_of_colours(colours: np.ndarray, palette: Palette) -> np.ndarray:
    """Class ids uint8 ``[...]`` of ``colours`` uint8 ``[..., 3]``."""
    digits = np.array([1 << 16, 1 << 8, 1])
    known = np.array(palette) @ digits
    order = known.argsort()
    codes = colours @ digits
    position = np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)
    ids = order[position]
    return np.where(known[ids] == codes, ids, IGNORE_INDEX).astype(np.uint8)


def _read_values(path: Path) -> np.ndarray:
    """Values of a one-channel picture, uint8 ``[H, W]``."""
    return np.array(_decode(path, "mask", MASK_MODES, "8-bit ids, one channel (grey or palette PNG)")).astype(np.uint8)


def _some(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def _decode(path: Path, what: str, modes: tuple[str, ...], expected: str) -> Image.Image:
    """Open and fully decode a picture, so that a truncated file is found here."""
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        advice = "truncated or not an image? replace the file"
        raise UserError(f"cannot read {what} {path} ({reason(error)}): {advice}") from None
    if picture.mode not in modes:
        raise UserError(f"{what} {path} has pixel format '{picture.mode}': expected {expected}; convert it")
    return picture
