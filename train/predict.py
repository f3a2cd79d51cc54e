"""Class maps of a folder of images, without labels: PNG files of class ids, and overlays to look at."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from train.checkpoint import config_of
from train.config import DataConfig
from train.data.classes import CAMVID_PALETTE, CITYSCAPES_PALETTE, VOC_PALETTE, Palette, default_colour, read_classes
from train.data.dataset import check_scale, pictures, scaled
from train.data.datasets import LANDCOVER
from train.data.files import read_image
from train.distributed import choose_device
from train.errors import UserError, reason
from train.evaluate import load_learners, predict

PALETTES = {"cityscapes": CITYSCAPES_PALETTE, "voc": VOC_PALETTE, "gta5": CITYSCAPES_PALETTE, "camvid": CAMVID_PALETTE}


@dataclass(frozen=True)
class PredictConfig:
    """Write the class of every pixel of some images as PNG files."""

    checkpoint: tyro.conf.Positional[Path]
    """File last.pt or best.pt of a run folder, or best_model.pth of the authors' code."""
    images: tyro.conf.Positional[Path]
    """A folder of PNG and JPEG files, or one file."""
    out: tyro.conf.Positional[Path]
    """Folder of the results: NAME.png has the class ids, shown in the colours of the classes."""
    overlay: bool = False
    """Write also overlay/NAME.png, the image under half-transparent colours."""
    network: Literal["student", "teacher"] = "student"
    """Which network of the checkpoint."""
    scale: float | None = None
    """Factor of the size at which the network sees the images, above 0 to 1; that of the training unless given."""
    device: str = "auto"
    """auto takes CUDA, then Apple's MPS, then the CPU; or a torch device such as cuda:1."""


def predict_images(config: PredictConfig) -> str:
    """Write the class maps; an image that cannot be read is a line on stderr, and the others are done.

    Returns:
        a line that says how many were written.

    Raises:
        UserError: no images, two of one name, or a checkpoint or a folder that cannot be used.
        SystemExit: with status 1, after the others, if an image could not be read.
    """
    files = pictures(config.images) if config.images.is_dir() else [config.images]
    if not files:
        raise UserError(f"no PNG or JPEG files in {config.images}: check the path")
    names = Counter(file.stem for file in files)
    if names.total() > len(names):
        double = names.most_common(1)[0][0]
        raise UserError(f"several images in {config.images} are called '{double}', as one result would be: rename them")
    if config.out.resolve() == files[0].resolve().parent:
        raise UserError(f"results in {config.out} would replace the images there: give another folder")
    device = choose_device(config.device)
    learners, content = load_learners(config.checkpoint, device)
    if config.network not in learners:
        raise UserError(f"checkpoint {config.checkpoint} has no {config.network}: leave --network out")
    if content["config"]["data"]["dataset"] == "features":
        raise UserError(f"checkpoint {config.checkpoint} is of cached features (--network head), not of images")
    learner, data = learners[config.network].eval(), config_of(content, config.checkpoint).data
    colours = [part for colour in palette_of(data, len(content["data"]["classes"])) for part in colour]
    scale, failed = data.scale if config.scale is None else config.scale, 0
    check_scale(scale)
    for file in tqdm(files, "predicting", unit="image"):
        try:
            image = read_image(file)
        except UserError as error:
            tqdm.write(str(error), sys.stderr)
            failed += 1
            continue
        classes = predict(learner, scaled(image, scale).to(device), (image.shape[1], image.shape[2]))
        write(config.out, file.stem, classes, image if config.overlay else None, colours)
    if failed:
        raise SystemExit(f"images that could not be read: {failed} of {len(files)}")
    return f"{len(files)} class maps in {config.out}"


def write(out: Path, name: str, classes: Tensor, image: Tensor | None, colours: list[int]) -> None:
    """Write ``name.png`` and, if there is an ``image`` [3, H, W], ``overlay/name.png``.

    Args:
        classes: ids [H, W], below 256.
        colours: red, green, blue of each class, one after the other.

    Raises:
        UserError: a file cannot be written.
    """
    ids = Image.fromarray(classes.byte().cpu().numpy())
    ids.putpalette(colours)
    try:
        out.mkdir(parents=True, exist_ok=True)
        ids.save(out / f"{name}.png")
        if image is not None:
            (out / "overlay").mkdir(exist_ok=True)
            under = Image.fromarray(image.permute(1, 2, 0).numpy())
            Image.blend(under, ids.convert("RGB"), 0.5).save(out / "overlay" / f"{name}.png")
    except OSError as error:
        raise UserError(f"results cannot be written to {out} ({reason(error)}): give another folder") from error


def palette_of(data: DataConfig, classes: int) -> Palette:
    """Colours of the data set of a training; where its ``classes.txt`` is no longer there, those of a list of names."""
    if data.dataset in PALETTES:
        return PALETTES[data.dataset]
    names = (LANDCOVER if data.dataset == "landcover" else data.root or Path()) / "classes.txt"
    palette = read_classes(names)[1] if names.is_file() else ()
    return palette if len(palette) == classes else tuple(map(default_colour, range(classes)))
