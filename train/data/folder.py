"""The ``folder`` data set: images/, masks/, classes.txt, train.txt, val.txt."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from train.data.files import IGNORE_INDEX, Palette, read_classes, read_image, read_lines, read_mask
from train.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
CACHE_BYTES = 512 * 2**20


class SegmentationDataset:
    """Images with masks of class ids from a folder.

    Layout::

        root/classes.txt             one class a line, ``name`` or ``name r g b``; line number (from 0) = class id
        root/images/<id>.jpg         or .jpeg, .png
        root/masks/<id>.png          8-bit class ids, grey or palette; 255 = ignored; same size as the image
        root/train.txt, root/val.txt the ids of each split, one a line

    Which files exist is checked here; what is in them, when an item is read first (`check_dataset` reads all).

    Args:
        root: the folder.
        split: name of the split file without ``.txt``.
        name: name of the data set, for reports.
        cache_bytes: decoded items stay in memory up to this total (in each loader process); 0 turns it off.

    Attributes:
        name, classes, palette, ignore_index: name of the data set, names and RGB colours of the classes, 255.
        ids: names of the items, sorted; item ``i`` is ``ids[i]``.

    Raises:
        UserError: missing folder or file, bad class list, an id without image or mask, an id given twice.
    """

    name: str
    classes: tuple[str, ...]
    palette: Palette
    ignore_index: int
    ids: list[str]

    def __init__(self, root: Path, split: str, name: str = "folder", cache_bytes: int = CACHE_BYTES) -> None:
        self.root = Path(root)
        for folder in (self.root, self.root / "images", self.root / "masks"):
            if not folder.is_dir():
                raise UserError(
                    f"data folder {folder} does not exist: expected a folder with images/, masks/, classes.txt, "
                    "train.txt and val.txt; check the path"
                )
        self.name = name
        self.classes, self.palette = read_classes(self.root / "classes.txt")
        self.ignore_index = IGNORE_INDEX
        self.split_file = self.root / f"{split}.txt"
        self.ids = sorted(read_lines(self.split_file, "the ids of the images of this split"))
        self._images = self._find_files()
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._cache_left = cache_bytes

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ignore_colour(self) -> tuple[int, int, int]:
        """RGB of ignored pixels in pictures: black, or white where a class is black, as the background of VOC is."""
        return (255, 255, 255) if (0, 0, 0) in self.palette else (0, 0, 0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Item ``index``: image uint8 ``[3, H, W]`` (RGB) and mask int64 ``[H, W]``, both yours to change.

        Raises:
            UserError: unreadable file, mask value outside the classes, image and mask of different size.
        """
        image, mask = self._cache.get(index) or self._read(index)
        return image.clone(), mask.long()

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, mask_path = self._images[index], self._mask_path(self.ids[index])
        image, mask = read_image(image_path), read_mask(mask_path, len(self.classes))
        if image.shape[1:] != mask.shape:
            raise UserError(
                f"image {image_path} is {image.shape[2]}x{image.shape[1]} pixels but its mask {mask_path} is "
                f"{mask.shape[1]}x{mask.shape[0]}: both must have the same size"
            )
        if image.nbytes + mask.nbytes <= self._cache_left:
            self._cache_left -= image.nbytes + mask.nbytes
            self._cache[index] = image, mask
        return image, mask

    def _mask_path(self, item: str) -> Path:
        return self.root / "masks" / f"{item}.png"

    def _find_files(self) -> list[Path]:
        """Path of the image of each id; complains about ids without exactly one image, or without mask."""
        found: dict[str, list[Path]] = {}
        for path in sorted((self.root / "images").iterdir()):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                found.setdefault(path.stem, []).append(path)
        images = []
        for previous, item in zip([None, *self.ids], self.ids, strict=False):
            paths = found.get(item, [])
            if item == previous:
                raise UserError(f"{self.split_file} lists '{item}' twice: list every id once")
            if not paths:
                raise UserError(
                    f"{self.split_file} lists '{item}', but there is no image {self.root / 'images' / item} with the "
                    "ending .jpg, .jpeg or .png: add it or remove the line (ids have no ending)"
                )
            if len(paths) > 1:
                raise UserError(f"images {paths[0]} and {paths[1]} have the same id '{item}': remove or rename one")
            if not self._mask_path(item).is_file():
                raise UserError(
                    f"image {paths[0]} has no mask {self._mask_path(item)}: add it (all {IGNORE_INDEX} if the image is "
                    f"unlabelled) or remove '{item}' from {self.split_file}"
                )
            images.append(paths[0])
        return images


def check_dataset(dataset: SegmentationDataset) -> Tensor:
    """Read every item once, with a progress bar, and count the pixels of each class.

    Returns:
        Labelled pixels per class, int64 ``[C]``.

    Raises:
        UserError: the first file that is wrong, as in `SegmentationDataset.__getitem__`.
    """
    num_classes = len(dataset.classes)
    counts = torch.zeros(256, dtype=torch.int64)
    for index in tqdm(range(len(dataset)), desc=f"checking {dataset.split_file}", unit="image", leave=False):
        _, mask = dataset[index]
        counts += torch.bincount(mask.flatten(), minlength=256)
    return counts[:num_classes]
