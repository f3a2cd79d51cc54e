"""What the published data sets have in common: pairs of an image file and a label file, read at full or half size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor
from torch.nn.functional import interpolate

from train.data.files import IGNORE_INDEX, Palette, read_image
from train.data.folder import CACHE_BYTES, SegmentationDataset
from train.errors import UserError

Pairs = Mapping[str, tuple[Path, Path]]
"""Image file and label file of each id."""


class PairDataset(SegmentationDataset):
    """A published data set, opened by `open_cityscapes`, `open_voc`, `open_gta5` or `open_camvid`.

    Which files exist is checked here; what is in them, when an item is read first. Items are numbered in the order of
    their sorted ids, so that indices mean the same images on every machine.

    Args:
        name: name of the data set, for reports.
        classes, palette: names and RGB colours of the classes.
        pairs: files of each id.
        read_label: reads a label file as class ids, uint8 ``[H, W]``, 255 = ignored.
        source: the folder or list that the ids come from, for messages.
        scale: factor of the size at which images are read, above 0 to 1: bilinear with antialiasing.
        scale_labels: scale labels too (nearest). Without, predictions are to be compared at the label's size.
        cache_bytes: as in `SegmentationDataset`.

    Raises:
        UserError: no pairs, a file that does not exist, a scale out of range.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        palette: Palette,
        pairs: Pairs,
        read_label: Callable[[Path], Tensor],
        source: Path,
        scale: float = 1.0,
        scale_labels: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if not 0.0 < scale <= 1.0:
            raise UserError(f"scale {scale}: expected above 0 and at most 1 (0.5 halves both sides of the images)")
        if not pairs:
            raise UserError(f"no images in {source}: check the path and that the archive is unpacked completely")
        self.name, self.classes, self.palette, self.ignore_index = name, classes, palette, IGNORE_INDEX
        self.ids = sorted(pairs)
        self.scale, self.scale_labels = scale, scale_labels
        self.split_file = source
        self._pairs = [pairs[item] for item in self.ids]
        self._read_label = read_label
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._cache_left = cache_bytes
        for item, (image, label) in zip(self.ids, self._pairs, strict=True):
            if not image.is_file():
                raise UserError(f"{source} lists '{item}', but there is no image {image}: complete the data set")
            if not label.is_file():
                raise UserError(f"image {image} has no label {label}: complete the data set")

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, label_path = self._pairs[index]
        image, label = read_image(image_path), self._read_label(label_path)
        if image.shape[1:] != label.shape:
            raise UserError(
                f"image {image_path} is {image.shape[2]}x{image.shape[1]} pixels but its label {label_path} is "
                f"{label.shape[1]}x{label.shape[0]}: both must have the same size"
            )
        if self.scale != 1.0:
            image, label = self._scaled(image, label)
        if image.nbytes + label.nbytes <= self._cache_left:
            self._cache_left -= image.nbytes + label.nbytes
            self._cache[index] = image, label
        return image, label

    def _scaled(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        size = [max(1, round(side * self.scale)) for side in label.shape]
        image = interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        if self.scale_labels:
            label = interpolate(label[None, None], size, mode="nearest-exact")[0, 0]
        return image, label


def find_folder(root: Path, *places: str) -> Path:
    """The first of ``places`` that is a folder below ``root``.

    Raises:
        UserError: none of them is.
    """
    for place in places:
        if (root / place).is_dir():
            return root / place
    if not root.is_dir():
        raise UserError(f"data folder {root} does not exist: check the path")
    raise UserError(f"data folder {root} lacks {' or '.join(places)}: expected one of these folders in it")


def find_file(root: Path, *places: str) -> Path | None:
    """The first of ``places`` that is a file below ``root``, if any."""
    return next((root / place for place in places if (root / place).is_file()), None)


def pictures(folder: Path) -> list[Path]:
    """The PNG and JPEG files in ``folder``, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
