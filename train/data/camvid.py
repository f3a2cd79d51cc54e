"""CamVid (Brostow et al., 2009) in the form that SegNet made usual: 11 classes, three splits in folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from train.data.classes import CAMVID, CAMVID_PALETTE, IGNORE_INDEX
from train.data.dataset import SegmentationDataset, find_folder, pictures
from train.data.files import id_table, read_ids

VOID = 11
TABLE = id_table({i: i for i in range(len(CAMVID))} | {VOID: IGNORE_INDEX})


def open_camvid(root: Path, split: str, scale: float = 1.0) -> SegmentationDataset:
    """Open CamVid: ``root/<split>/<id>.png`` (or .jpg) and ``root/<split>annot/<id>.png`` with values of 0 to 11.

    Args:
        root: the folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        scale: as in `SegmentationDataset`.

    Raises:
        UserError: a missing folder or file.
    """
    images, labels = find_folder(Path(root), split), find_folder(Path(root), f"{split}annot")
    pairs = {image.stem: (image, labels / f"{image.stem}.png") for image in pictures(images)}
    read_label = partial(read_ids, table=TABLE, expected=f"class ids of 0 to 10 and {VOID} (void)")
    return SegmentationDataset("camvid", CAMVID, CAMVID_PALETTE, pairs, read_label, images, scale, split == "train")
