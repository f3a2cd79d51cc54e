"""A segmentation data set: pairs of an image file and a label file. Every kind of data set is opened as this class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.nn.functional import interpolate

from train.data.classes import IGNORE_INDEX, Palette
from train.data.files import read_image
from train.errors import UserError

CACHE_BYTES = 512 * 2**20

Pairs = Mapping[str, tuple[Path, Path]]
"""Image file and label file of each id."""


@dataclass(eq=False)
class SegmentationDataset:
    """Images with maps of class ids.

    Opening checks which files exist; their content is checked when an item is first read. Items are numbered in the
    order of their sorted ids, so that indices mean the same images on every machine.

    Args:
        name: name of the data set, for reports.
        classes, palette: names and RGB colours of the classes.
        pairs: files of each id.
        read_label: reads a label file as class ids, uint8 ``[H, W]``, 255 = ignored.
        source: the folder or list that the ids come from, for messages.
        scale: factor of the size at which images are read, above 0 to 1: bilinear with antialiasing.
        scale_labels: scale labels too (nearest). Otherwise predictions are compared at the size of the label.
        cache_bytes: decoded items stay in memory up to this total (in each loader process); 0 turns it off.

    Attributes:
        ids: names of the items, sorted; item ``i`` is ``ids[i]``.
        ignore_index: 255.

    Raises:
        UserError: no pairs, a file that does not exist, a scale out of range.
    """

    name: str
    classes: tuple[str, ...]
    palette: Palette
    pairs: Pairs
    read_label: Callable[[Path], Tensor]
    source: Path
    scale: float = 1.0
    scale_labels: bool = True
    cache_bytes: int = CACHE_BYTES
    ignore_index = IGNORE_INDEX

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if not self.pairs:
            raise UserError(f"no images in {self.source}: check the path and that the archive is unpacked completely")
        for item, (image, label) in sorted(self.pairs.items()):
            if not image.is_file():
                raise UserError(f"{self.source} lists '{item}', but there is no image {image}: complete the data set")
            if not label.is_file():
                raise UserError(
                    f"image {image} has no label {label}: add it (all {IGNORE_INDEX} if the image is unlabelled), or "
                    f"remove '{item}' from the data set"
                )
        self.ids = sorted(self.pairs)
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._cache_left = self.cache_bytes

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ignore_colour(self) -> tuple[int, int, int]:
        """RGB of ignored pixels in pictures: black, or white where black is a class, such as the background of VOC."""
        return (255, 255, 255) if (0, 0, 0) in self.palette else (0, 0, 0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Item ``index``: image uint8 ``[3, H, W]`` (RGB) and label int64 ``[H, W]``; the caller may change both.

        Raises:
            UserError: unreadable file, value outside the classes, image and label of different size.
        """
        image, label = self._cache.get(index) or self._read(index)
        return image.clone(), label.long()

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, label_path = self.pairs[self.ids[index]]
        image, label = read_image(image_path), self.read_label(label_path)
        if image.shape[1:] != label.shape:
            raise UserError(
                f"image {image_path} is {image.shape[2]}x{image.shape[1]} pixels but its label {label_path} is "
                f"{label.shape[1]}x{label.shape[0]}: both must have the same size"
            )
        image = scaled(image, self.scale)
        if self.scale_labels and image.shape[1:] != label.shape:
            label = interpolate(label[None, None], image.shape[1:], mode="nearest-exact")[0, 0]
        if image.nbytes + label.nbytes <= self._cache_left:
            self._cache_left -= image.nbytes + label.nbytes
            self._cache[index] = image, label
        return image, label


def check_scale(scale: float) -> None:
    """Refuse a factor of the size of images that is not above 0 and at most 1.

    Raises:
        UserError: it is not.
    """
    if not 0.0 < scale <= 1.0:
        raise UserError(f"scale {scale}: expected above 0 and at most 1 (0.5 halves both sides of the images)")


def scaled(image: Tensor, scale: float) -> Tensor:
    """``image`` uint8 [3, H, W] at ``scale`` times its size: bilinear with antialiasing."""
    size = [max(1, round(side * scale)) for side in image.shape[1:]]
    return image if scale == 1.0 else interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def find_folder(root: Path, *candidates: str) -> Path:
    """The first of ``candidates`` that is a folder below ``root``.

    Raises:
        UserError: none of them is.
    """
    for candidate in candidates:
        if (root / candidate).is_dir():
            return root / candidate
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist: check the path")
    raise UserError(f"data folder {root} lacks {' or '.join(candidates)}: expected one of these folders in it")


def pictures(folder: Path) -> list[Path]:
    """The PNG and JPEG files in ``folder``, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
