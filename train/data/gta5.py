"""GTA5 (Richter et al., ECCV 2016): rendered street scenes with the classes and colours of Cityscapes."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from PIL import Image

from train.data.classes import CITYSCAPES, CITYSCAPES_PALETTE, read_lines
from train.data.dataset import Pairs, SegmentationDataset, find_folder, pictures
from train.data.files import read_colours
from train.errors import UserError

PNG_END = b"IEND\xaeB`\x82"
"""The last bytes of every complete PNG."""


def open_gta5(root: Path, split: str = "train", scale: float = 1.0) -> SegmentationDataset:
    """Open GTA5 as unpacked from its archives; colours become class ids in memory, files stay as they are.

    Layout::

        root/images/<id>.png, root/labels/<id>.png       or images/<split>/, labels/<split>/
        root/train.txt, root/val.txt                     ids of the splits, one a line; optional for train

    Without folders or a list for it, ``train`` is all images. The official split comes as ``split.mat`` with the
    numbers of the images; write those of ``trainIds`` to ``train.txt`` as five digits each.

    The first and the last bytes of all files are checked here. Pixels whose colour is none of the 19 are ignored.

    Args:
        root: the folder.
        split: ``"train"`` or ``"val"``.
        scale: as in `SegmentationDataset`; the paper halves the images.

    Raises:
        UserError: a missing folder or file, an official split that is not a list yet, unreadable files.
    """
    images = find_folder(Path(root), f"images/{split}", "images")
    labels = find_folder(Path(root), "labels" if images.name == "images" else f"labels/{split}")
    listing, source = Path(root) / f"{split}.txt", images
    if images.name == split:
        items = [path.stem for path in pictures(images)]
    elif listing.is_file():
        items, source = [Path(line).stem for line in read_lines(listing, "the ids of the images")], listing
    elif (Path(root) / "split.mat").is_file() or split != "train":
        raise UserError(
            f"{listing} is missing: write the ids of the split there, one a line (of the official split, the numbers "
            f"{split}Ids in split.mat, five digits each)"
        )
    else:
        items = [path.stem for path in pictures(images)]
    pairs: Pairs = {item: (images / f"{item}.png", labels / f"{item}.png") for item in items}
    problems = {item: problem for item, pair in pairs.items() if (problem := _problem(*pair))}
    if problems:
        shown = ", ".join(f"{item} ({problem})" for item, problem in sorted(problems.items())[:20])
        more = ", ..." if len(problems) > 20 else ""
        raise UserError(
            f"{len(problems)} of {len(pairs)} pairs in {root} are unreadable: {shown}{more}; replace or remove them"
        )
    classes, read_label = (CITYSCAPES, CITYSCAPES_PALETTE), partial(read_colours, palette=CITYSCAPES_PALETTE)
    return SegmentationDataset("gta5", *classes, pairs, read_label, source, scale, scale_labels=split == "train")


def _problem(image: Path, label: Path) -> str | None:
    """What is wrong with a pair, as far as the headers and ends of the files tell; they are not decoded."""
    sizes = set()
    for kind, path in (("image", image), ("label", label)):
        try:
            with Image.open(path) as picture, open(path, "rb") as file:
                sizes.add(picture.size)
                file.seek(-len(PNG_END), 2)
                if file.read() != PNG_END:
                    return f"{kind} truncated"
        except FileNotFoundError:
            return f"{kind} missing"
        except (OSError, SyntaxError, ValueError):
            return f"{kind} not a picture"
    return "image and label of different size" if len(sizes) > 1 else None
