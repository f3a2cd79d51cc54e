"""The interface of all networks, and what those of the paper share: backbone, mean colour, initial weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from train.networks.backbone import Backbone

Colour = tuple[float, float, float]
"""Red, green, blue in 0..255."""

MEANS: dict[str, Colour] = {
    "cityscapes": (73.15835921, 82.90891754, 72.39239876),
    "voc": (122.6789143, 116.66876762, 104.00698793),
}
"""Mean colours that the paper's experiments subtract."""


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear resize of ``x`` [B, C, h, w] to ``size``, corners aligned, as the paper does everywhere."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class Network(nn.Module):
    """A segmentation network: ``forward`` maps normalised images to logits and to the contrastive feature.

    Attributes:
        feature_channels: channels of the contrastive feature.
    """

    feature_channels: int

    def normalise(self, images: Tensor) -> Tensor:
        """Map ``images`` [B, 3, H, W], float in 0..1, RGB, to the range that the network takes."""
        raise NotImplementedError


class DeepLab(Network):
    """Base of the paper's networks; a subclass adds the head and calls :meth:`initialise`.

    Args:
        backbone: the ResNet.
        mean: mean colour of the data set, RGB, 0..255.
        bgr: whether the pretrained weights need the channels in the order blue, green, red.
        imagenet_weights: torchvision's weights for this backbone, if there are any.
    """

    mean: Tensor

    def __init__(
        self, backbone: Backbone, mean: Colour, bgr: bool = False, imagenet_weights: WeightsEnum | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.bgr = bgr
        self.imagenet_weights = imagenet_weights
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) / 255, persistent=False)

    def initialise(self) -> None:
        """Draw the weights of all convolutions from N(0, 0.01), as the paper's code does before it loads weights."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the mean colour from ``images`` [B, 3, H, W], float in 0..1, RGB; BGR if the network needs it.

        There is no division by a standard deviation: batch statistics absorb the scale.
        """
        images = images - self.mean
        return images.flip(1) if self.bgr else images
