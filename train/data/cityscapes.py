"""Cityscapes (Cordts et al., CVPR 2016): 19 training classes, fine annotations."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from train.data.classes import CITYSCAPES, CITYSCAPES_PALETTE, IGNORE_INDEX
from train.data.dataset import SegmentationDataset, find_folder
from train.data.files import id_table, read_ids

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Value of each class in the files ``*_gtFine_labelIds.png``; the other values up to 33 are not evaluated."""

TABLE = id_table({value: IGNORE_INDEX for value in range(34)} | {value: i for i, value in enumerate(LABEL_IDS)})
"""Class id of each value on disk. The released code of Alonso et al. ignores by 250 instead of 255."""

IMAGE_ENDING, LABEL_ENDING = "_leftImg8bit.png", "_gtFine_labelIds.png"


def open_cityscapes(root: Path, split: str, scale: float = 1.0) -> SegmentationDataset:
    """Open Cityscapes as unpacked from ``leftImg8bit_trainvaltest.zip`` and ``gtFine_trainvaltest.zip``.

    Layout, with or without the outer folders ``leftImg8bit_trainvaltest/`` and ``gtFine_trainvaltest/``::

        root/leftImg8bit/<split>/<city>/<id>_leftImg8bit.png
        root/gtFine/<split>/<city>/<id>_gtFine_labelIds.png

    The paper trains and evaluates DeepLabV2 on images of half size (``scale=0.5``), against labels of full size; the
    labels are therefore scaled for ``split="train"`` only.

    Raises:
        UserError: a missing folder or file.
    """
    folders = (f"leftImg8bit_trainvaltest/leftImg8bit/{split}", f"leftImg8bit/{split}")
    images = find_folder(Path(root), *folders)
    labels = find_folder(Path(root), *(folder.replace("leftImg8bit", "gtFine") for folder in folders))
    pairs = {}
    for image in images.glob(f"*/*{IMAGE_ENDING}"):
        item = image.name.removesuffix(IMAGE_ENDING)
        pairs[item] = image, labels / image.parent.name / f"{item}{LABEL_ENDING}"
    read_label = partial(read_ids, table=TABLE, expected="label ids of 0 to 33")
    classes = CITYSCAPES, CITYSCAPES_PALETTE
    return SegmentationDataset("cityscapes", *classes, pairs, read_label, images, scale, scale_labels=split == "train")
