"""The 25 rows of Tables 1 to 3 of the paper (Alonso et al., ICCV 2021), as printed."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from train.data.classes import CITYSCAPES, VOC

FILE = Path(__file__).with_name("targets.csv")


@dataclass(frozen=True)
class Target:
    """One row: a mean over three splits of the best evaluations on the validation images, in percent.

    Numbers are as printed, misprints included; ``note`` says what is doubtful about them.
    """

    table: int
    """1: Cityscapes. 2: PASCAL VOC. 3: GTA5 to Cityscapes."""
    ratio: str
    """Labelled share of the training images, such as ``1/30``."""
    labelled: int
    """Labelled images. Inferred for 1/15, 1/6 and 1/3, for which no configuration was released."""
    pretraining: str
    """``ImageNet`` or ``COCO``."""
    architecture: str
    """``DeepLabV2`` (ResNet-101) or ``DeepLabV3+`` (ResNet-50), as the table says."""
    miou: float
    """Printed mean IoU."""
    iou: dict[str, float]
    """Printed IoU by name of the class, in the order of the data set's classes."""
    note: str
    """Misprints and contradictions; empty if there are none."""

    @property
    def dataset(self) -> str:
        """Name of the data set that is evaluated, as `train.data.datasets.open_dataset` knows it."""
        return "voc" if self.table == 2 else "cityscapes"

    @property
    def mean(self) -> float:
        """Mean of the printed classes, which should be ``miou`` but for rounding, and is not always."""
        return sum(self.iou.values()) / len(self.iou)


def targets() -> tuple[Target, ...]:
    """All rows, in the order of the paper's tables."""
    with open(FILE, encoding="utf-8", newline="") as file:
        return tuple(_target(row) for row in csv.DictReader(file))


def _target(row: dict[str, str]) -> Target:
    table = int(row["table"])
    classes = VOC if table == 2 else CITYSCAPES
    values = [float(value) for value in row["iou"].split()]
    return Target(
        table,
        row["ratio"],
        int(row["labelled"]),
        row["pretraining"],
        row["architecture"],
        float(row["miou"]),
        dict(zip(classes, values, strict=True)),
        row["note"],
    )
