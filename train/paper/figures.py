"""The figures of the paper's supplement from checkpoints: predictions beside labels, attention, the memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from pixcontrast import ContrastBranch
from train.checkpoint import config_of
from train.config import DataConfig
from train.data.dataset import SegmentationDataset
from train.data.datasets import open_dataset
from train.distributed import choose_device
from train.errors import UserError
from train.evaluate import check_classes, confusion, load_learners, predict, scores_of
from train.models import Learner
from train.paper.introspection import attention_map, memory_rows
from train.paper.pages import Row, colour, draw_memory_plane, draw_page, fitted, heat_map, pages, weight_colours
from train.scores import percent


@dataclass(frozen=True)
class FiguresConfig:
    """Pictures like those of the paper's supplement: image, predictions and labels of some images, row by row."""

    checkpoint: tyro.conf.Positional[Path]
    """File last.pt or best.pt of a run folder, or best_model.pth of the authors' code."""
    reference: Path | None = None
    """Checkpoint of another network for a column beside, such as the fully supervised one; its student is shown."""
    network: Literal["student", "teacher"] = "student"
    """Which network of the checkpoint."""
    images: tuple[str, ...] = ()
    """Names of the images: file names without their endings."""
    count: int = 20
    """Without --images: how many, evenly spaced in the order of the names."""
    split: Literal["train", "val", "test"] = "val"
    """Images to choose from; of the published data sets, camvid has test."""
    root: Path | None = None
    """Folder of the data, if it is not where it was during the training."""
    attention: bool = False
    """Also draw how much each pixel weighs in the contrast of the class predicted for it."""
    memory: bool = False
    """Also draw all rows of the memory in the plane in which they vary most."""
    out: Path = Path("runs/figures")
    """Folder of the pictures."""
    device: str = "auto"
    """auto takes CUDA, then Apple's MPS, then the CPU; or a torch device such as cuda:1."""


@dataclass(frozen=True)
class Shown:
    """A column: a network, the images at its scale, a title, and the branch with the memory if there is one."""

    learner: Learner
    data: SegmentationDataset
    title: str
    memory: ContrastBranch | None


def figures(config: FiguresConfig) -> list[Path]:
    """Draw what ``config`` asks for.

    Returns:
        the files: ``predictions-1.png`` and so on, ``attention-1.png`` and so on, ``memory.png``.

    Raises:
        UserError: unusable options, checkpoints or data; checkpoints of different classes.
    """
    device = choose_device(config.device)
    networks = open_networks(config, device)
    if (config.attention or config.memory) and networks[0].memory is None:
        raise UserError(
            f"checkpoint {config.checkpoint} has no contrast branch: --attention and --memory need a run of "
            f"--method contrast"
        )
    indices = choose_images(networks[0].data, config.images, config.count)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        return _draw(config, networks, indices, device)
    except OSError as error:
        raise UserError(f"pictures cannot be written to {config.out} ({error}): choose another --out") from error


def _draw(config: FiguresConfig, networks: list[Shown], indices: list[int], device: torch.device) -> list[Path]:
    ours, data = networks[0], networks[0].data
    shown = [(network.learner, network.data) for network in networks]
    progress = tqdm(indices, desc="predictions", unit="image", leave=False)
    rows = [prediction_row(shown, index, device) for index in progress]
    files = _draw_pages(config.out, "predictions", ["image", *(n.title for n in networks), "labels"], rows, data)
    if config.attention:
        progress = tqdm(indices, desc="attention", unit="image", leave=False)
        maps = [attention_map(ours.learner, data[index][0].to(device)) for index in progress]
        colours = weight_colours([weights for _, weights in maps])
        rows = [attention_row(data, index, *pair, colours) for index, pair in zip(indices, maps, strict=True)]
        titles = ["image", "predicted class\nof each feature", "attention"]
        files += _draw_pages(config.out, "attention", titles, rows, data, colours)
    if config.memory:
        assert ours.memory is not None
        draw_memory_plane(config.out / "memory.png", memory_rows(ours.memory), data)
        files.append(config.out / "memory.png")
    return files


def prediction_row(
    networks: list[tuple[Learner, SegmentationDataset]], index: int, device: torch.device | str = "cpu"
) -> Row:
    """Image, predictions and labels of an item, small enough for a page, and the mean IoU of each network on it.

    Args:
        networks: each with the data at the size it takes; image and labels are those of the first.
        index: of the item.
    """
    image, labels = networks[0][1][index]
    data, size = networks[0][1], (labels.shape[0], labels.shape[1])
    # at the resolution of the labels, at which networks are scored
    maps = [predict(learner, own[index][0].to(device), size) for learner, own in networks]
    pictures = [colour(fitted(classes, size), data.palette, data.ignore_colour) for classes in (*maps, labels)]
    mious = (scores_of(confusion(m, labels.to(device), data), data.classes).miou for m in maps)
    note = f"IoU {' | '.join(map(percent, mious))} %"
    return Row(data.ids[index], [fitted(image, size).permute(1, 2, 0).numpy(), *pictures], note)


def attention_row(data: SegmentationDataset, index: int, classes: Tensor, weights: Tensor, colours: Any) -> Row:
    """Image, predicted classes [h, w] and weights [h, w] of an item; ``colours`` are those of all weights."""
    image, labels = data[index]
    size = labels.shape[0], labels.shape[1]
    image = fitted(image, size)
    picture = colour(fitted(classes, size), data.palette, data.ignore_colour)
    heat = heat_map(image, fitted(weights, size), colours)
    return Row(data.ids[index], [image.permute(1, 2, 0).numpy(), picture, heat])


def choose_images(data: SegmentationDataset, names: tuple[str, ...], count: int) -> list[int]:
    """Indices of the images of these names, in their order; without names, of ``count`` evenly spaced ones.

    Raises:
        UserError: a name that the data does not have, or a count below one.
    """
    index_of = {item: index for index, item in enumerate(data.ids)}
    for name in names:
        if name not in index_of:
            raise UserError(
                f"--images: there is no image {name!r} in this split of {data.name}, whose images are "
                f"{data.ids[0]} to {data.ids[-1]}: give names of files without their endings"
            )
    if names:
        return [index_of[name] for name in names]
    if count < 1:
        raise UserError(f"--count is {count}: give at least 1")
    count = min(count, len(data))
    return [(2 * number + 1) * len(data) // (2 * count) for number in range(count)]


def _draw_pages(
    out: Path, name: str, titles: list[str], rows: list[Row], data: SegmentationDataset, weights: Any = None
) -> list[Path]:
    files = []
    for number, page in enumerate(pages(rows), start=1):
        files.append(out / f"{name}-{number}.png")
        draw_page(files[-1], titles, page, data, weights)
    return files


def open_networks(config: FiguresConfig, device: torch.device) -> list[Shown]:
    """The network of the checkpoint and, if there is one, of the reference, both for the images of the first.

    Raises:
        UserError: an unreadable checkpoint or data set, a network that is not in it, or images of other classes.
    """
    shown: list[Shown] = []
    images: DataConfig | None = None
    for path, network in ((config.checkpoint, config.network), (config.reference, "student")):
        if path is None:
            continue
        learners, content = load_learners(path, device)
        if network not in learners:
            raise UserError(
                f"checkpoint {path} has no {network}: it was trained on labels only, or by the authors' code; leave "
                f"--network out"
            )
        own = config_of(content, path).data
        images = images or own
        data = open_dataset(images.dataset, config.split, config.root or images.root, own.scale)
        check_classes(path, content, data)
        shown.append(Shown(learners[network].eval(), data, _title(content, network), learners["student"].eval().branch))
    return shown


def _title(content: dict[str, Any], network: str) -> str:
    """Title of a column: the method, and how many images were labelled."""
    if content.get("released"):
        return "released checkpoint"
    method, data = content["config"]["method"]["method"], content["data"]
    labelled, images = data["labelled"], data["images"]
    if method == "supervised" and labelled == len(images):
        return "fully supervised"
    name = {
        "contrast": "ours",
        "pseudo": "pseudo-labels",
        "supervised": "supervised",
        "supervised_contrast": "with contrast",
    }[method]
    return f"{name}{' (teacher)' if network == 'teacher' else ''}\n{labelled} of {len(images)} labelled"
