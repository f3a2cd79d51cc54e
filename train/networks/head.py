"""A segmentation head on cached features of a frozen encoder (see `train.data.features`)."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from train.config import ModelConfig
from train.networks.base import Network


class FeatureHead(Network):
    """A 1x1 and a 3x3 convolution; the contrastive feature is what comes before the classifier.

    Args:
        num_classes: number of output channels C.
        config: width (``decoder_channels``), ``in_channels`` and ``decoder_dropout``.
    """

    def __init__(self, num_classes: int, config: ModelConfig) -> None:
        super().__init__()
        width = self.feature_channels = config.decoder_channels
        self.decoder = nn.Sequential(
            nn.Dropout2d(config.decoder_dropout),
            Conv2dNormActivation(config.in_channels, width, 1),
            Conv2dNormActivation(width, width, 3),
        )
        self.dropout = nn.Dropout(config.decoder_dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def normalise(self, images: Tensor) -> Tensor:
        """Cached features are standardised already."""
        return images

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, C, h, w]`` and features ``[B, width, h, w]`` of ``x [B, in_channels, h, w]``."""
        features = self.decoder(x)
        return self.classifier(self.dropout(features)), features
