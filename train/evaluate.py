"""Intersection over union of a network on a data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint import config_of, read_checkpoint
from train.data.dataset import SegmentationDataset
from train.data.datasets import open_dataset
from train.distributed import rank, world_size
from train.errors import UserError, reason
from train.models import Learner, build_learner
from train.networks.base import resize
from train.scores import Scores
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


def evaluate(learner: Learner, dataset: SegmentationDataset, device: torch.device | str = "cpu") -> Scores:
    """Evaluate on whole images, one at a time, single scale; the mean is over all classes that occur.

    With several processes, all must call it: each evaluates a part, and all get the scores of the whole. Neither the
    network nor any random state is changed.
    """
    from torchmetrics.classification import MulticlassConfusionMatrix  # takes seconds to import; figures do without

    matrix = MulticlassConfusionMatrix(len(dataset.classes), ignore_index=dataset.ignore_index).to(device)
    for index in range(rank(), len(dataset), world_size()):
        image, mask = dataset[index]
        prediction = predict(learner, image.to(device), (mask.shape[0], mask.shape[1]))
        matrix.update(prediction, mask.to(device))
    return scores_of(matrix.compute(), dataset.classes)  # compute() sums over the ranks


def scores_of(confusion: Tensor, classes: tuple[str, ...]) -> Scores:
    """Scores from a confusion matrix [C, C] of pixel counts: rows are labels, columns are predictions."""
    confusion = confusion.double()
    hits = confusion.diag()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    return Scores(dict(zip(classes, iou.tolist(), strict=True)), float(iou.nanmean()))


def evaluate_checkpoint(
    path: Path, split: str = "val", root: Path | None = None, device: torch.device | str = "cpu"
) -> dict[str, Scores]:
    """Scores of the networks in the checkpoint at ``path``.

    Args:
        split: ``train``, ``val`` or, for camvid, ``test``.
        root: folder of the data; that of the training unless given.
        device: where to compute.

    Raises:
        UserError: an unreadable checkpoint or data set, or data with other classes.
    """
    learners, content = load_learners(path, device)
    data = config_of(content, path).data
    dataset = open_dataset(data.dataset, split, root or data.root, data.scale)
    check_classes(path, content, dataset)
    return {name: evaluate(learner, dataset, device) for name, learner in learners.items()}


def load_learners(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Learner], dict[str, Any]]:
    """Read the networks of a checkpoint.

    Returns:
        ``student`` and, unless the method is ``supervised``, ``teacher``; and the checkpoint's content.

    Raises:
        UserError: an unreadable checkpoint, or one that does not fit this version.
    """
    content = read_checkpoint(path)
    config = config_of(content, path)
    # the checkpoint has all weights, so those of ImageNet are not loaded first
    config = replace(config, model=replace(config.model, pretrained=False))
    data, states = content["data"], {"student": "learner", "teacher": "teacher"}
    if config.method.method == "supervised":
        del states["teacher"]
    learners = {}
    for name, key in states.items():
        learner = build_learner(config, len(data["classes"]), data["ignore_index"], data["labelled"])
        try:
            learner.load_state_dict(content["training"][key])
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
