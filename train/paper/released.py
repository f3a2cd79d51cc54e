"""Checkpoints that the authors' trainer saves (``best_model.pth``), read as checkpoints of ours.

Each is a dict of ``iteration``, ``optimizer``, ``config`` (their JSON file) and ``model``: the ``state_dict`` of the
network, both heads and two selectors a class, one for features and one for memory rows. It has no memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from train.checkpoint import FORMAT, VERSION
from train.config import DataConfig, FitConfig, MethodConfig, ModelConfig
from train.config_file import to_plain
from train.data.classes import CITYSCAPES, IGNORE_INDEX, VOC
from train.errors import UserError
from train.networks.weights import named_tensors, our_name
from train.paper.rows import SIZES

HEADS = {
    f"{name}ion_head.{index}": f"{name}.{part}"
    for name in ("project", "predict")
    for index, part in ((0, "first"), (1, "norm"), (3, "last"))
}
SELECTORS = {"0.weight": "weight1", "0.bias": "bias1", "1.weight": "norm_weight", "1.bias": "norm_bias"}
SELECTORS |= {
    "1.running_mean": "running_mean",
    "1.running_var": "running_var",
    "3.weight": "weight2",
    "3.bias": "bias2",
}
SELECTOR = "contrastive_class_selector_"
DEEPLAB_V2: dict[Any, str] = {"COCO": "deeplab_v2_coco", "imagenet": "deeplab_v2"}
"""By the pretraining in their configuration."""
DATASETS: dict[int, tuple[Literal["cityscapes", "voc"], tuple[str, ...]]]
DATASETS = {len(CITYSCAPES): ("cityscapes", CITYSCAPES), len(VOC): ("voc", VOC)}
"""Data set and classes by the number of classes."""


def place(name: str) -> tuple[str, int | None]:
    """Name of their tensor in a learner, and for a selector the class: ours are stacked over the classes."""
    module, _, leaf = name.partition(".")
    if module.startswith(SELECTOR):
        stack = "select_memory" if "memory" in module else "select_features"
        return f"branch.{stack}.{SELECTORS.get(leaf)}", int(module.removeprefix(SELECTOR).removeprefix("memory"))
    head, _, leaf = name.rpartition(".")
    return (f"branch.{HEADS[head]}.{leaf}" if head in HEADS else f"network.{our_name(name)}"), None


def our_tensor(tensors: Mapping[str, Tensor | None], name: str) -> Tensor | None:
    """The one of ``tensors`` of a learner that is ``name`` in their network; None if there is none."""
    own, index = place(name)
    tensor = tensors.get(own)
    if index is None or tensor is None:
        return tensor
    return tensor[index : index + 1] if name.split(".")[1] == "3" else tensor[index]


def our_tensors(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors by the names in a learner, those of selectors stacked; the inverse of :func:`our_tensor`."""
    stacks: dict[str, dict[int, Tensor]] = {}
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        own, index = place(name)
        if index is None:
            ours[own] = tensor
        elif not own.endswith("None"):  # a batch counter
            stacks.setdefault(own, {})[index] = tensor[0] if name.split(".")[1] == "3" else tensor
    return ours | {own: torch.stack([parts[i] for i in sorted(parts)]) for own, parts in stacks.items()}


def as_ours(content: Any, path: Path, network: str | None = None) -> Any:
    """A checkpoint of the authors' code in the form of ours, with a student only; any other content as it is.

    Args:
        content: what the file at ``path`` holds; of theirs, a bare ``state_dict`` will do where it says enough.
        network: its network, by our name, where the file does not say it.

    Raises:
        UserError: other classes than those of their data sets, or a network that is not known.
    """
    theirs = named_tensors(content)
    if "layer1.0.conv1.weight" not in theirs:
        return content
    tensors, settings = our_tensors(theirs), content.get("config")
    training = settings.get("training", {}) if isinstance(settings, dict) else {}
    v3plus = "network.classifier.bias" in tensors
    bias = tensors.get("network.classifier.bias" if v3plus else "network.classifier.convs.0.bias")
    if bias is None or len(bias) not in DATASETS:
        raise UserError(
            f"checkpoint {path} has no classifier of 19 (Cityscapes) or 21 (VOC) classes, as the authors' code has: to "
            f"start a training from its other weights, use fit --weights"
        )
    network = "deeplab_v3plus" if v3plus else DEEPLAB_V2.get(training.get("pretraining"), network)
    if network is None:
        raise UserError(
            f"checkpoint {path} does not say whether its DeepLabV2 is the one for COCO or for ImageNet weights, which "
            f"differ in strides: give the whole file that the trainer saved, with config['training']['pretraining']"
        )
    dataset, classes = DATASETS[len(bias)]
    labelled = training.get("data", {}).get("labeled_samples", 1)
    config = FitConfig(
        DataConfig(dataset, labelled=labelled, scale=SIZES[dataset, "DeepLabV3+" if v3plus else "DeepLabV2"].scale),
        ModelConfig(network, pretrained=False),  # type: ignore[arg-type]
        MethodConfig("contrast" if "branch.project.first.weight" in tensors else "supervised", variant="released"),
    )
    data = {"classes": list(classes), "ignore_index": IGNORE_INDEX, "images": [], "labelled": labelled}
    own = {"format": FORMAT, "version": VERSION, "config": to_plain(config), "data": data}
    return own | {"training": {"learner": tensors}, "released": True}
