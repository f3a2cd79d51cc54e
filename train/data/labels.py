"""Label pictures of published data sets: what is on disk becomes class ids in memory, by look-up."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.data.files import IGNORE_INDEX, Palette, _decode, read_mask
from train.errors import UserError

FOREIGN = -1
"""Entry of a look-up table for a value that the data set never writes."""


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
    values = read_mask(path, IGNORE_INDEX).numpy()  # all 256 values pass; the table decides
    ids = table[values]
    if ids.min() == FOREIGN:
        foreign = np.unique(values[ids == FOREIGN]).tolist()
        shown = ", ".join(map(str, foreign[:8])) + (", ..." if len(foreign) > 8 else "")
        raise UserError(f"label {path} has the values {shown}: expected {expected}; is it another kind of label file?")
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
    place = np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)
    ids = order[place]
    return np.where(known[ids] == codes, ids, IGNORE_INDEX).astype(np.uint8)
