"""The 25 rows of Tables 1 to 3 of Alonso et al., ICCV 2021, by name: data, network and sizes of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from train.errors import UserError
from train.paper.targets import Target, targets

Network = Literal["deeplab_v2", "deeplab_v2_coco", "deeplab_v3plus"]
Dataset = Literal["cityscapes", "voc"]


@dataclass(frozen=True)
class Sizes:
    """What depends on the data set and the network."""

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
    """One row: what the paper printed, and what it takes to measure it again."""

    target: Target
    """The printed numbers."""

    @property
    def name(self) -> str:
        """``cityscapes/dv2-imagenet/1-30`` and the like; Table 3 begins with ``gta5``."""
        experiment = "gta5" if self.adapts else self.target.dataset
        architecture = {"DeepLabV2": "dv2", "DeepLabV3+": "dv3plus"}[self.architecture]
        return f"{experiment}/{architecture}-{self.target.pretraining.lower()}/{self.target.ratio.replace('/', '-')}"

    @property
    def dataset(self) -> Dataset:
        """The data set that is learned without labels and evaluated."""
        return "voc" if self.target.table == 2 else "cityscapes"

    @property
    def adapts(self) -> bool:
        """Whether GTA5 is a second source of labels (Table 3)."""
        return self.target.table == 3

    @property
    def architecture(self) -> str:
        """``DeepLabV2`` or ``DeepLabV3+``.

        For Table 3, whose caption names DeepLabV3+, it is DeepLabV2: the released command trains it, and the printed
        numbers are like those of DeepLabV2 on images of half size.
        """
        return "DeepLabV2" if self.adapts else self.target.architecture

    @property
    def network(self) -> Network:
        """The network as `train.networks.build_network` knows it."""
        if self.architecture == "DeepLabV3+":
            return "deeplab_v3plus"
        return "deeplab_v2_coco" if self.target.pretraining == "COCO" else "deeplab_v2"

    @property
    def sizes(self) -> Sizes:
        return SIZES[self.dataset, self.architecture]

    @property
    def seed(self) -> int:
        """The seed in the released configurations."""
        return 7 if self.dataset == "voc" else 5555


@cache
def rows() -> dict[str, Row]:
    """All rows by name, in the order of the paper's tables."""
    return {row.name: row for row in map(Row, targets())}


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
    return [row for row in rows().values() if row.target.table == table]


def rows_list() -> str:
    """All rows, one a line: name, table, labelled images, network, batch, crop, learning rate, printed mean IoU."""
    return "\n".join(_line(row) for row in rows().values())


def _line(row: Row) -> str:
    sizes, target = row.sizes, row.target
    return (
        f"{row.name:<32} table {target.table}  {target.labelled:>4} labelled  {row.network:<15}  "
        f"batch {sizes.labelled_batch:>2} + {sizes.unlabelled_batch:>2}  crop {sizes.crop} of {sizes.scale:g} size  "
        f"lr {sizes.lr:g}  mIoU {target.miou}"
    )
