"""The learner (network, contrast branch, precision), and how it is built from a configuration."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from pixcontrast import ContrastBranch
from train.checkpoint import read_checkpoint
from train.config import FitConfig
from train.contrast import build_branch
from train.errors import UserError
from train.networks import MEANS, LoadReport, build_network, load_weights
from train.networks.base import Network
from train.networks.weights import copy_where_it_fits
from train.paper.released import as_ours
from train.streams import seed_for


class Learner(nn.Module):
    """What is optimised and averaged: the segmentation network and, for the contrast, its branch.

    Args:
        network: the segmentation network.
        branch: contrast branch on the network's features, or None for a method without contrast.
        precision: of matrix products and convolutions; weights, statistics and sums are float32 in any case.
    """

    def __init__(
        self,
        network: Network,
        branch: ContrastBranch | None = None,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        self.network = network
        self.branch = branch
        self.precision = precision

    def autocast(self) -> torch.autocast:
        """Context of the learner's precision; needed around calls of the branch alone."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "bfloat16")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise and segment ``images`` [B, 3, H, W], float in 0..1.

        Returns:
            logits in float32 and features in the learner's precision, at decoder stride.
        """
        with self.autocast():
            logits, features = self.network(self.network.normalise(images))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), features

    def in_parts(self, images: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        """:meth:`forward` of ``parts`` parts of the batch, one after the other; 1 is a plain forward.

        Only the outputs are kept for backward, which computes each part again, with the same dropout, when it gets
        there. So activations of one part are in memory at a time, and losses can be of the whole batch. BatchNorm
        normalises each part by its own statistics, and updates the running ones by each part once.
        """
        if parts == 1:
            return self(images)
        outputs = [
            checkpoint(self, part, use_reentrant=False, context_fn=lambda: (nullcontext(), KeptStatistics(self)))
            for part in images.tensor_split(parts)
        ]
        logits, features = (torch.cat(maps) for maps in zip(*outputs, strict=True))
        return logits, features


class KeptStatistics:
    """Context in which BatchNorm updates copies of its running statistics; it can be entered again."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]

    def __enter__(self) -> None:
        self.buffers = [(layer, name, buffer) for layer in self.norms for name, buffer in layer.named_buffers()]
        for layer, name, buffer in self.buffers:
            setattr(layer, name, buffer.clone())

    def __exit__(self, *_: object) -> None:
        for layer, name, buffer in self.buffers:
            setattr(layer, name, buffer)


def build_learner(config: FitConfig, num_classes: int, ignore_index: int, num_labelled: int) -> Learner:
    """The network with the weights it starts from and, for a method with contrast, its branch.

    Args:
        config: the whole configuration.
        num_classes: C.
        ignore_index: label of pixels without a class.
        num_labelled: labelled images, which decide how many rows each may add to the memory.

    Raises:
        UserError: an unusable encoder, or weights that are missing or do not fit.
    """
    seed_for(config.optim.seed, "network")
    network = build_segmentation(config, num_classes)
    seed_for(config.optim.seed, "branch")
    if not config.method.contrasts:
        return Learner(network, precision=config.optim.precision)
    branch = build_branch(config.method, network.feature_channels, num_classes, ignore_index, num_labelled)
    return Learner(network, branch, config.optim.precision)


def build_segmentation(config: FitConfig, num_classes: int) -> Network:
    """The network with the weights it starts from. For a network of the paper, prints which tensors were loaded.

    Raises:
        UserError: an unusable encoder, or weights that are missing or do not fit.
    """
    model = config.model
    model = replace(model, pretrained=model.pretrained and model.init is None)
    if model.network == "timm":
        from train.networks.timm_deeplab import TimmDeepLab  # importing timm takes seconds

        return TimmDeepLab(num_classes, model)
    if model.network == "head":
        from train.networks.head import FeatureHead

        return FeatureHead(num_classes, model)
    mean = MEANS.get(config.data.dataset, MEANS["voc"])  # that of VOC is nearly that of ImageNet
    network = build_network(model.network, num_classes, mean, model.branches)
    if model.pretrained:
        print(load_weights(network, model.weights), flush=True)
    return network


def initialise(learner: Learner, config: FitConfig) -> LoadReport:
    """Copy the student of ``config.model.init`` into ``learner``, but for the memory and for what has another size.

    Raises:
        UserError: an unreadable checkpoint, another network, or one that lacks a part but the classifier.
    """
    path, network = config.model.init, config.model.network
    assert path is not None
    content = read_checkpoint(path, partial(as_ours, network=network))
    if (own := content["config"]["model"]["network"]) != network:
        raise UserError(f"--init {path} is of --network {own}, not {network}: give that, or another file")

    def needed(name: str) -> bool:
        return name.startswith("network.") and not name.startswith("network.classifier.")

    given = without_memory(content["training"]["learner"])
    return copy_where_it_fits(learner, given, str(path), "network without its classifier", needed)


def without_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a learner without the rows that its branch remembers."""
    return {name: value for name, value in state.items() if not name.startswith(("branch.memory.", "branch.queues."))}


def drop_memory(learner: Learner) -> Learner:
    """Take the memory out of the branch of a teacher, which fills none."""
    for name in ("memory", "queues"):
        if hasattr(learner.branch, name):
            delattr(learner.branch, name)
    return learner


def synchronise_batchnorm(network: nn.Module) -> Any:
    """``network`` with the same layers, but in training mode statistics over the batches of all ranks."""
    from timm.layers import convert_sync_batchnorm  # torch's conversion would drop the activation in timm's layers

    return convert_sync_batchnorm(network)


def to_channels_last(module: nn.Module) -> None:
    """Store the kernels of all convolutions channels last; CPU and GPU are faster with the outputs that follow.

    ``Module.to(memory_format=...)`` would also restride 1x1 and depthwise kernels, and so change every dropout mask.
    """
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
