"""The learner (network, contrast branch, precision), and how it is built from a configuration."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from pixcontrast import ContrastBranch
from train.config import FitConfig
from train.contrast import build_branch
from train.networks import MEANS, build_network, load_weights
from train.networks.base import Network
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
