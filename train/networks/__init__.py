"""The networks of Alonso et al., ICCV 2021: DeepLabV2 on ResNet-101 in two forms, DeepLabV3+ on ResNet-50."""

from __future__ import annotations

from train.errors import UserError
from train.networks.base import MEANS, Colour, DeepLab
from train.networks.deeplab_v2 import DeepLabV2
from train.networks.deeplab_v3plus import DeepLabV3Plus
from train.networks.weights import LoadReport, load_weights

__all__ = ["MEANS", "NETWORKS", "Colour", "DeepLab", "LoadReport", "build_network", "load_weights"]

NETWORKS = ("deeplab_v2", "deeplab_v2_coco", "deeplab_v3plus")


def build_network(name: str, num_classes: int, mean: Colour, branches: int = 2) -> DeepLab:
    """A network of the paper with random weights; :func:`load_weights` puts the pretrained ones in.

    Args:
        name: ``deeplab_v2`` (for ImageNet weights), ``deeplab_v2_coco`` (for COCO weights) or ``deeplab_v3plus``.
        num_classes: number of output channels C.
        mean: mean colour of the data set, RGB, 0..255; :data:`MEANS` has the paper's.
        branches: how many of DeepLabV2's four classifiers are summed; the paper's results are of 2.

    Raises:
        UserError: an unknown name, or branches outside 1..4.
    """
    if name not in NETWORKS:
        raise UserError(f"unknown network {name!r}: give one of {', '.join(NETWORKS)}")
    if name == "deeplab_v3plus":
        return DeepLabV3Plus(num_classes, mean)
    return DeepLabV2(num_classes, mean, branches, caffe=name == "deeplab_v2_coco")
