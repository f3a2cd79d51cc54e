"""Data: segmentation data sets, the split into labelled and unlabelled images, endless resumable batches."""

from __future__ import annotations

from pathlib import Path

from train.data.batches import Batches
from train.data.folder import SegmentationDataset, check_dataset
from train.data.splits import split_labelled
from train.errors import UserError

__all__ = ["LANDCOVER", "Batches", "SegmentationDataset", "check_dataset", "open_dataset", "split_labelled"]

LANDCOVER = Path(__file__).parent / "landcover"
"""Folder of the embedded land-cover tiles, itself a valid ``folder`` data set."""


def open_dataset(name: str, split: str, root: Path | None = None) -> SegmentationDataset:
    """Open a data set by name.

    Args:
        name: ``"landcover"`` (embedded tiles, needs no ``root``) or ``"folder"`` (your own, see `SegmentationDataset`).
        split: ``"train"`` or ``"val"``.
        root: folder of the data; only for ``"folder"``.

    Raises:
        UserError: unknown name or split, missing root, or anything wrong with the files.
    """
    if split not in ("train", "val"):
        raise UserError(f"unknown split '{split}': expected 'train' or 'val'")
    if name == "landcover":
        return SegmentationDataset(LANDCOVER, split, name="landcover")
    if name == "folder":
        if root is None:
            raise UserError("data set 'folder' needs a root: give the folder with images/, masks/ and classes.txt")
        return SegmentationDataset(root, split)
    raise UserError(f"unknown data set '{name}': expected 'landcover' (embedded) or 'folder' (your own data)")
