"""PASCAL VOC 2012 with the additional annotations of SBD (Everingham et al.; Hariharan et al., ICCV 2011)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from train.data.classes import IGNORE_INDEX, VOC, VOC_PALETTE, read_lines
from train.data.dataset import SegmentationDataset, find_folder
from train.data.files import id_table, read_ids
from train.errors import UserError

TABLE = id_table({i: i for i in range(len(VOC))} | {IGNORE_INDEX: IGNORE_INDEX})

LISTS = {"train": ("train_aug.txt", "trainaug.txt"), "val": ("val.txt",)}
LIST_FOLDERS = (".", "ImageSets/Segmentation", "..")


def open_voc(root: Path, split: str, scale: float = 1.0) -> SegmentationDataset:
    """Open VOC 2012 with ``train_aug`` (10582 images) or ``val`` (1449 images).

    Layout, ``root`` being the folder ``VOC2012`` itself or one that has it (or ``VOCdevkit/VOC2012``) in it::

        VOC2012/JPEGImages/<id>.jpg
        VOC2012/SegmentationClassAug/<id>.png       8-bit class ids; 255 = border, ignored
        VOC2012/train_aug.txt, VOC2012/val.txt      or in ImageSets/Segmentation/ or beside VOC2012

    A line of a list is an id, or ``/JPEGImages/<id>.jpg /SegmentationClassAug/<id>.png``.

    Raises:
        UserError: a missing folder, list or file, an id listed twice.
    """
    base = find_folder(Path(root), "VOC2012/JPEGImages", "VOCdevkit/VOC2012/JPEGImages", "JPEGImages").parent
    labels = find_folder(base, "SegmentationClassAug")
    listings = [base / folder / name for folder in LIST_FOLDERS for name in LISTS[split]]
    listing = next((path for path in listings if path.is_file()), None)
    if listing is None:
        raise UserError(f"data folder {base} lacks {LISTS[split][0]}: expected the ids of the images, one a line")
    pairs: dict[str, tuple[Path, Path]] = {}
    for line in read_lines(listing, "the ids of the images of this split"):
        item = Path(line.split()[0]).stem
        if item in pairs:
            raise UserError(f"{listing} lists '{item}' twice: list every id once")
        pairs[item] = base / "JPEGImages" / f"{item}.jpg", labels / f"{item}.png"
    read_label = partial(read_ids, table=TABLE, expected=f"class ids of 0 to 20 and {IGNORE_INDEX}")
    return SegmentationDataset("voc", VOC, VOC_PALETTE, pairs, read_label, listing, scale, split == "train")
