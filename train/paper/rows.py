"""The 25 rows of Tables 1 to 3 of Alonso et al., ICCV 2021: the printed numbers, and the settings of each row."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from train.data.classes import CITYSCAPES, VOC
from train.errors import UserError

FILE = Path(__file__).with_name("targets.csv")
"""The printed numbers."""


@dataclass(frozen=True)
class Sizes:
    """Settings that depend on the data set and the network."""

    labelled_batch: int
    """Labelled images of each step."""
    unlabelled_batch: int
    """Unlabelled images of each step, each seen twice."""
    crop: int
    """Height and width of the training crops."""
    scale: float
    """Factor of the size at which images are read."""
    lr: float
    """Learning rate at the start."""


SIZES: dict[tuple[str, str], Sizes] = {
    ("cityscapes", "DeepLabV2"): Sizes(5, 2, 512, 0.5, 2e-4),
    ("cityscapes", "DeepLabV3+"): Sizes(7, 3, 512, 1.0, 4e-4),
    ("voc", "DeepLabV2"): Sizes(14, 7, 321, 1.0, 2e-4),
    ("voc", "DeepLabV3+"): Sizes(20, 10, 321, 1.0, 2e-4),
}
"""By data set and architecture, from the configurations that were released with the paper."""


@dataclass(frozen=True, eq=False)  # each row exists once, and can be a key
class Row:
    """One row. The printed numbers are means over three splits of the best evaluations on the validation images.

    They are in percent and as printed, misprints included.
    """

    table: int
    """1: Cityscapes. 2: PASCAL VOC. 3: GTA5 to Cityscapes."""
    ratio: str
    """Labelled share of the training images, such as ``1/30``."""
    labelled: int
    """Labelled images. Inferred for 1/15, 1/6 and 1/3, for which no configuration was released."""
    pretraining: str
    """``ImageNet`` or ``COCO``."""
    printed_architecture: str
    """``DeepLabV2`` (ResNet-101) or ``DeepLabV3+`` (ResNet-50), as the table says."""
    miou: float
    """Printed mean IoU."""
    iou: dict[str, float]
    """Printed IoU by name of the class, in the order of the data set's classes."""
    note: str
    """Misprints and contradictions; empty if there are none."""

    @property
    def name(self) -> str:
        """``cityscapes/dv2-imagenet/1-30`` and the like; Table 3 begins with ``gta5``."""
        experiment = "gta5" if self.adapts else self.dataset
        architecture = {"DeepLabV2": "dv2", "DeepLabV3+": "dv3plus"}[self.architecture]
        return f"{experiment}/{architecture}-{self.pretraining.lower()}/{self.ratio.replace('/', '-')}"

    @property
    def dataset(self) -> Literal["cityscapes", "voc"]:
        """The data set that is learned without labels and evaluated."""
        return "voc" if self.table == 2 else "cityscapes"

    @property
    def adapts(self) -> bool:
        """Whether GTA5 is a second source of labels (Table 3)."""
        return self.table == 3

    @property
    def architecture(self) -> str:
        """``DeepLabV2`` or ``DeepLabV3+``.

        For Table 3, whose caption names DeepLabV3+, it is DeepLabV2: the released command trains it, and the printed
        numbers are like those of DeepLabV2 on images of half size.
        """
        return "DeepLabV2" if self.adapts else self.printed_architecture

    @property
    def network(self) -> Literal["deeplab_v2", "deeplab_v2_coco", "deeplab_v3plus"]:
        """The network as `train.networks.build_network` knows it."""
        if self.architecture == "DeepLabV3+":
            return "deeplab_v3plus"
        return "deeplab_v2_coco" if self.pretraining == "COCO" else "deeplab_v2"

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.dataset, self.architecture]

    @property
    def paper_lr(self) -> float:
        """Learning rate of the variant ``paper``, which gives DeepLabV3+ one rate; the configurations halve it for VOC.

        That the paper means VOC too is inferred from its text.
        """
        return 4e-4 if self.network == "deeplab_v3plus" else self.sizes.lr

    @property
    def seed(self) -> int:
        """The seed in the released configurations."""
        return 7 if self.dataset == "voc" else 5555


@cache
def rows() -> dict[str, Row]:
    """All rows by name, in the order of the paper's tables."""
    with open(FILE, encoding="utf-8", newline="") as file:
        return {row.name: row for row in map(_row, csv.DictReader(file))}


def _row(line: dict[str, str]) -> Row:
    table, labelled, miou = int(line["table"]), int(line["labelled"]), float(line["miou"])
    iou = dict(zip(VOC if table == 2 else CITYSCAPES, map(float, line["iou"].split()), strict=True))
    return Row(table, line["ratio"], labelled, line["pretraining"], line["architecture"], miou, iou, line["note"])


def find_row(name: str) -> Row:
    """The row of that name.

    Raises:
        UserError: there is none.
    """
    if name not in rows():
        raise UserError(f"unknown row {name!r}: python -m train rows lists all of them")
    return rows()[name]


def rows_of_table(table: int) -> list[Row]:
    """The rows of Table 1, 2 or 3, in order."""
    return [row for row in rows().values() if row.table == table]


def rows_list() -> str:
    """All rows, one a line: name, table, labelled images, network, batch, crop, learning rate, printed mean IoU.

    The rate is that of the variant ``paper``, with that of the others behind it where it differs.
    """
    return "\n".join(
        f"{row.name:<32} table {row.table}  {row.labelled:>4} labelled  {row.network:<15}  "
        f"batch {row.sizes.labelled_batch:>2} + {row.sizes.unlabelled_batch:>2}  "
        f"crop {row.sizes.crop} of {row.sizes.scale:g} size  lr {row.paper_lr:g}"
        f"{'' if row.paper_lr == row.sizes.lr else f' (released {row.sizes.lr:g})'}  mIoU {row.miou}"
        for row in rows().values()
    )
