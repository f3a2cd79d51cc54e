"""The ``folder`` data set: images/, masks/, classes.txt, train.txt, val.txt."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unicodedata import normalize

from train.data.classes import read_classes, read_lines
from train.data.dataset import CACHE_BYTES, SegmentationDataset, pictures
from train.data.files import read_mask
from train.errors import UserError


def open_folder(root: Path, split: str, name: str = "folder", cache_bytes: int = CACHE_BYTES) -> SegmentationDataset:
    """Open images with masks of class ids from a folder.

    Layout::

        root/classes.txt             one class a line, ``name`` or ``name r g b``; line number (from 0) = class id
        root/images/<id>.jpg         or .jpeg, .png
        root/masks/<id>.png          class ids, grey or palette, 255 = ignored; or RGB, the colours of classes.txt; same
                                     size as the image
        root/train.txt, root/val.txt the ids of each split, one a line

    Args:
        root: the folder.
        split: name of the split file without ``.txt``.
        name, cache_bytes: as in `SegmentationDataset`.

    Raises:
        UserError: missing folder or file, bad class list, an id without image or mask, an id given twice.
    """
    root = Path(root)
    for folder in (root, root / "images", root / "masks"):
        if not folder.is_dir():
            raise UserError(
                f"data folder {folder} does not exist: expected a folder with images/, masks/, classes.txt, "
                "train.txt and val.txt; check the path"
            )
    classes, palette = read_classes(root / "classes.txt")
    images: dict[str, list[Path]] = {}
    for path in pictures(root / "images"):  # macOS writes an umlaut as two letters, an editor as one
        images.setdefault(normalize("NFC", path.stem), []).append(path)
    listing = root / f"{split}.txt"
    pairs: dict[str, tuple[Path, Path]] = {}
    for item in read_lines(listing, "the ids of the images of this split"):
        found = images.get(normalize("NFC", item), [])
        if item in pairs:
            raise UserError(f"{listing} lists '{item}' twice: list every id once")
        if not found:
            raise UserError(
                f"{listing} lists '{item}', but there is no image {root / 'images' / item} with the ending .jpg, .jpeg "
                "or .png: add it or remove the line (ids have no ending)"
            )
        if len(found) > 1:
            raise UserError(f"images {found[0]} and {found[1]} have the same id '{item}': remove or rename one")
        pairs[item] = found[0], root / "masks" / f"{found[0].stem}.png"
    read_label = partial(read_mask, num_classes=len(classes), palette=palette)
    return SegmentationDataset(name, classes, palette, pairs, read_label, listing, cache_bytes=cache_bytes)
