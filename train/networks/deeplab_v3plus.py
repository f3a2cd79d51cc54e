"""DeepLabV3+ on ResNet-50."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

from train.networks.backbone import Backbone
from train.networks.base import Colour, DeepLab, resize


class DeepLabV3Plus(DeepLab):
    """ASPP at stride 16, decoder at stride 4; the contrastive feature is the decoder's output before the classifier.

    Args:
        num_classes: number of output channels C.
        mean: mean colour of the data set, RGB, 0..255.
    """

    feature_channels = 256

    def __init__(self, num_classes: int, mean: Colour) -> None:
        super().__init__(Backbone((3, 4, 6, 3), (1, 1, 2)), mean, imagenet_weights=ResNet50_Weights.IMAGENET1K_V1)
        self.aspp = ASPP(2048, (6, 12, 18))  # ends in a dropout of 0.5
        self.skip = Conv2dNormActivation(256, 48, kernel_size=1)
        self.decoder = nn.Sequential(Conv2dNormActivation(304, 256), Conv2dNormActivation(256, 256))
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(256, num_classes, 1)
        self.initialise()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Segment ``x`` [B, 3, H, W], normalised: logits [B, C, h, w] and features [B, 256, h, w] at stride 4.

        In training B must be 2 or more: the image pooling gives BatchNorm one value of each image.
        """
        early, deep = self.backbone(x)
        features = self.decoder(torch.cat([resize(self.aspp(deep), early.shape[-2:]), self.skip(early)], dim=1))
        return self.classifier(self.dropout(features)), features
