"""CamVid (Brostow et al., 2009) in the form that SegNet made usual: 11 classes, three splits in folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from train.data.files import IGNORE_INDEX, Palette
from train.data.labels import id_table, read_ids
from train.data.pairs import PairDataset, find_folder, pictures
from train.data.splits import split_labelled

CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip

PALETTE: Palette = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip

VOID = 11
TABLE = id_table({i: i for i in range(len(CLASSES))} | {VOID: IGNORE_INDEX})


def open_camvid(root: Path, split: str, scale: float = 1.0) -> PairDataset:
    """Open CamVid: ``root/<split>/<id>.png`` (or .jpg) and ``root/<split>annot/<id>.png`` with values of 0 to 11.

    Args:
        root: the folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        scale: as in `PairDataset`.

    Raises:
        UserError: a missing folder or file.
    """
    images, labels = find_folder(Path(root), split), find_folder(Path(root), f"{split}annot")
    pairs = {image.stem: (image, labels / f"{image.stem}.png") for image in pictures(images)}
    read_label = partial(read_ids, table=TABLE, expected=f"class ids of 0 to 10 and {VOID} (void)")
    return PairDataset("camvid", CLASSES, PALETTE, pairs, read_label, images, scale, scale_labels=split == "train")


def split_labelled_by_sequence(ids: Sequence[str], labelled: int | float, seed: int) -> tuple[list[int], list[int]]:
    """Split images into labelled and unlabelled ones, with about the same share of labelled ones in every sequence.

    Frames of one video show nearly the same scene, so that a draw from all images may leave a sequence out. As in
    `split_labelled`, a smaller labelled set is part of every larger one of the same seed.

    Args:
        ids: names of the images; the part before the first ``_`` (of ``Seq05VD_f00000`` the part ``Seq05VD``) is the
            name of the sequence.
        labelled, seed: as in `split_labelled`.

    Returns:
        The labelled and the unlabelled indices, each ascending.

    Raises:
        UserError: ``labelled`` is out of range.
    """
    n = len(ids)
    count = len(split_labelled(n, labelled, seed)[0])
    sequences = [item.split("_")[0] for item in ids]
    sizes, drawn = Counter(sequences), Counter[str]()
    share = np.empty(
        n
    )  # of its sequence that is labelled once this image is; the order of the images by it is the draw
    for index in np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, n]).permutation(n):
        sequence = sequences[index]
        share[index] = (drawn[sequence] + 0.5) / sizes[sequence]
        drawn[sequence] += 1
    order = share.argsort(kind="stable").tolist()
    return sorted(order[:count]), sorted(order[count:])
