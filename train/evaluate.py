"""Intersection over union of networks on a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint import config_of, read_checkpoint
from train.data.batches import loader_ended, whole_items
from train.data.dataset import SegmentationDataset
from train.data.datasets import open_dataset
from train.distributed import gather, rank, sum_over_ranks, world_size
from train.errors import UserError, reason
from train.models import Learner, build_learner, drop_memory, without_memory
from train.networks.base import resize
from train.networks.weights import copy_where_it_fits
from train.paper.released import as_ours
from train.scores import Scores, write_per_image
from train.step import to_float


@torch.no_grad()
def predict(learner: Learner, image: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Class ids [H, W] int64 of one ``image`` [3, H, W] uint8, in evaluation mode.

    Args:
        size: resolution of the result, that of the image unless given; logits are upsampled to it before the argmax.
    """
    was_training = learner.training
    learner.eval()
    logits, _ = learner(to_float(image)[None])
    learner.train(was_training)
    return resize(logits, size or image.shape[-2:]).argmax(1)[0]


def evaluate(
    learners: Mapping[str, Learner],
    dataset: SegmentationDataset,
    device: torch.device | str = "cpu",
    workers: int = 0,
    images: dict[str, dict[str, Scores]] | None = None,
) -> dict[str, Scores]:
    """Evaluate on whole images, one at a time, single scale; the mean is over all classes that occur.

    Each image is read once for all networks. With several processes, all must call it: each evaluates a part, and all
    get the scores of the whole. Neither the networks nor any random state is changed.

    Args:
        learners: networks by name.
        workers: loader processes; 0 reads the images in this one.
        images: gets the scores of each image by its id and the name of the network; with several processes, on rank 0.
    """
    classes = len(dataset.classes)
    totals = {name: torch.zeros(classes, classes, dtype=torch.int64, device=device) for name in learners}
    own: dict[str, dict[str, Scores]] = {}
    indices = range(rank(), len(dataset), world_size())
    for index, (image, mask) in zip(indices, whole_items(dataset, indices, workers), strict=True):
        image, mask = image.to(device), mask.to(device)
        for name, learner in learners.items():
            matrix = confusion(predict(learner, image, (mask.shape[0], mask.shape[1])), mask, dataset)
            totals[name] += matrix
            if images is not None:
                own.setdefault(dataset.ids[index], {})[name] = scores_of(matrix, dataset.classes)
    if images is not None:
        for part in gather(own):
            images.update(part or {})
    return {name: scores_of(sum_over_ranks(total), dataset.classes) for name, total in totals.items()}


def confusion(prediction: Tensor, mask: Tensor, dataset: SegmentationDataset) -> Tensor:
    """Pixel counts [C, C] int64 of class ids [H, W]: rows are labels, columns are predictions."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # takes seconds to import

    return multiclass_confusion_matrix(
        prediction, mask, len(dataset.classes), ignore_index=dataset.ignore_index, validate_args=False
    )


def scores_of(confusion: Tensor, classes: tuple[str, ...]) -> Scores:
    """Scores from a confusion matrix [C, C] of pixel counts: rows are labels, columns are predictions."""
    confusion = confusion.cpu().double()  # MPS has no float64
    hits = confusion.diag()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    return Scores(dict(zip(classes, iou.tolist(), strict=True)), float(iou.nanmean()))


def evaluate_checkpoint(
    path: Path,
    split: str = "val",
    root: Path | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
    per_image: Path | None = None,
) -> dict[str, Scores]:
    """Scores of the networks in the checkpoint at ``path``, ours or one of the authors' code.

    Args:
        split: ``train``, ``val`` or, for camvid, ``test``.
        root: folder of the data; that of the training unless given.
        device: where to compute.
        workers: loader processes.
        per_image: file for the scores of each image, as CSV.

    Raises:
        UserError: an unreadable checkpoint or data set, data with other classes, a file that cannot be written, or a
            loader process that ended.
    """
    if workers < 0:
        raise UserError(f"--workers is {workers}: give 0 or more")
    learners, content = load_learners(path, device)
    data = config_of(content, path).data
    dataset = open_dataset(data.dataset, split, root or data.root, data.scale)
    check_classes(path, content, dataset)
    images: dict[str, dict[str, Scores]] | None = None if per_image is None else {}
    try:
        scores = evaluate(learners, dataset, device, workers, images)
    except (RuntimeError, EOFError, OSError) as error:
        if ended := loader_ended(error, workers):
            raise ended from None
        raise
    if per_image is not None and rank() == 0:
        try:
            write_per_image(per_image, images or {}, dataset.classes)
        except OSError as error:
            raise UserError(f"--per-image {per_image} cannot be written ({reason(error)})") from error
    return scores


def load_learners(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Learner], dict[str, Any]]:
    """Read the networks of a checkpoint, ours or one of the authors' code.

    Returns:
        ``student`` and, if the method uses it, ``teacher`` (not of the authors' code); and the checkpoint's content, in
        the form of ours.

    Raises:
        UserError: an unreadable checkpoint, or one that does not fit this version.
    """
    content = read_checkpoint(path, as_ours)
    config = config_of(content, path)
    # the checkpoint has all weights, so those of ImageNet are not loaded first
    config = replace(config, model=replace(config.model, pretrained=False))
    data, released = content["data"], content.get("released", False)
    states = {"student": "learner"}
    if config.method.uses_teacher and not released:
        states["teacher"] = "teacher"
    learners = {}
    for name, key in states.items():
        learner = build_learner(config, len(data["classes"]), data["ignore_index"], data["labelled"])
        try:
            state = content["training"][key]
            if released:
                names = without_memory(learner.state_dict()).keys()
                copy_where_it_fits(learner, state, str(path), "network", names.__contains__)
            elif name == "teacher":
                drop_memory(learner).load_state_dict(without_memory(state))
            else:
                learner.load_state_dict(state)
        except (RuntimeError, KeyError) as error:
            raise UserError(f"checkpoint {path} does not fit this version of the program ({reason(error)})") from error
        learners[name] = learner.to(device)
    return learners, content


def check_classes(path: Path, content: dict[str, Any], dataset: SegmentationDataset) -> None:
    """Refuse a data set whose classes are not those of the checkpoint.

    Raises:
        UserError: they differ.
    """
    if list(dataset.classes) != content["data"]["classes"]:
        raise UserError(
            f"checkpoint {path} knows the classes {content['data']['classes']}, the data set has "
            f"{list(dataset.classes)}: both must be of one data set, see --root"
        )
