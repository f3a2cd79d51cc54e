"""Opening a data set by its name."""

from __future__ import annotations

from pathlib import Path

from train.data.camvid import open_camvid
from train.data.cityscapes import open_cityscapes
from train.data.dataset import SegmentationDataset
from train.data.folder import open_folder
from train.data.gta5 import open_gta5
from train.data.voc import open_voc
from train.errors import UserError

LANDCOVER = Path(__file__).parent / "landcover"
"""Folder of the embedded land-cover tiles, itself a valid ``folder`` data set."""

PUBLISHED = {"cityscapes": open_cityscapes, "voc": open_voc, "gta5": open_gta5, "camvid": open_camvid}
"""Published data sets, which the user downloads, and their functions; the docstrings show the folders."""


def open_dataset(name: str, split: str, root: Path | None = None, scale: float = 1.0) -> SegmentationDataset:
    """Open a data set by name.

    Args:
        name: ``"landcover"`` (embedded tiles, needs no ``root``), ``"folder"`` (your own, see `open_folder`) or one of
            `PUBLISHED`.
        split: ``"train"``, ``"val"`` or, for camvid and landcover, ``"test"``.
        root: folder of the data; not for ``"landcover"``.
        scale: factor of the size at which images of `PUBLISHED` are read, see `SegmentationDataset`; labels of
            ``"val"`` keep their size.

    Raises:
        UserError: unknown name or split, missing root, a scale out of range, or anything wrong with the files.
    """
    if split not in ("train", "val", "test"):
        raise UserError(f"unknown split '{split}': expected 'train', 'val' or 'test'")
    if split == "test" and name not in ("camvid", "landcover", "features"):
        raise UserError(
            f"data set '{name}' has no split 'test': expected 'train' or 'val'; camvid and landcover have one"
        )
    if name not in ("landcover", "folder", "features", *PUBLISHED):
        known = ", ".join(f"'{published}'" for published in PUBLISHED)
        raise UserError(
            f"unknown data set '{name}': expected 'landcover' (embedded), 'folder' (your own data), {known}"
        )
    if name not in PUBLISHED and scale != 1.0:
        raise UserError(f"scale {scale}: data set '{name}' is read at its own size only; leave it 1")
    if name == "landcover":
        return open_folder(LANDCOVER, split, name="landcover")
    if name == "features":
        from train.data.features import FeatureDataset

        return FeatureDataset(root or Path("features"), split)
    if root is None:
        content = "with images/, masks/ and classes.txt" if name == "folder" else "that the data set is unpacked in"
        raise UserError(f"data set '{name}' needs a root: give the folder {content}")
    if name == "folder":
        return open_folder(root, split)
    return PUBLISHED[name](root, split, scale)


def check_overlap(first: SegmentationDataset, second: SegmentationDataset) -> None:
    """Refuse two splits that have images in common.

    Raises:
        UserError: naming how many, and one of them.
    """
    files = {image for image, _ in first.pairs.values()}
    if both := sorted(image for image, _ in second.pairs.values() if image in files):
        raise UserError(
            f"{first.source} and {second.source} have {len(both)} images in common, such as {both[0]}: "
            f"a split must not have images of another one, remove them from one of the two"
        )
