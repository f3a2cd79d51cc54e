"""DeepLabV3+ on any convolutional encoder of timm.

Not that of segmentation_models.pytorch: its decoder is separable, with a skip of 48 channels at stride 4 and one width
for ASPP and decoder, so that the short recipe (stride 4 or 8, narrow) could not be built.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

from train.config import ModelConfig
from train.errors import UserError
from train.networks.backbone import freeze_norms
from train.networks.base import Network, resize
from train.networks.lite0_weights import load_imagenet_weights


class TimmDeepLab(Network):
    """ASPP on the encoder's deep map, decoder on an early map of stride 4 or 8.

    The contrastive feature is the decoder's output just before the classifier.

    Args:
        num_classes: number of output channels C.
        config: encoder name, strides, widths and dropout.

    Raises:
        UserError: an encoder that timm does not have or cannot cut into maps, or ImageNet weights that do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_classes: int, config: ModelConfig) -> None:
        super().__init__()
        try:
            encoder: Any = timm.create_model(config.encoder, pretrained=False, output_stride=config.output_stride)
            maps = encoder.feature_info
            channels = [entry["num_chs"] for entry in (maps if isinstance(maps, list) else maps.get_dicts())]
            skip, deep = config.encoder_maps
            widths = channels[skip], channels[deep]
            if config.pretrained:
                load_imagenet_weights(encoder, config.encoder)
            encoder.prune_intermediate_layers([skip, deep], prune_head=True)
        except (RuntimeError, AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"encoder {config.encoder!r} with maps {config.encoder_maps} cannot be used ({error}): give a "
                f"convolutional timm model with five maps, such as tf_efficientnet_lite0 or resnet50"
            ) from error
        self.encoder: Any = encoder  # timm models have methods that nn.Module does not
        self.encoder_maps = [skip, deep]
        data = resolve_model_data_config(encoder)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data["std"]).view(1, 3, 1, 1), persistent=False)
        self.encoder_statistics = config.encoder_statistics
        if not config.train_encoder_norm:
            freeze_norms(encoder)

        self.aspp = ASPP(widths[1], list(config.atrous_rates), config.aspp_channels)
        self.aspp.project[-1] = nn.Dropout(config.aspp_dropout)
        self.skip = Conv2dNormActivation(widths[0], config.skip_channels, 1)
        self.decoder = nn.Sequential(
            Conv2dNormActivation(config.aspp_channels + config.skip_channels, config.decoder_channels),
            Conv2dNormActivation(config.decoder_channels, config.decoder_channels),
        )
        self.dropout = nn.Dropout(config.decoder_dropout)
        self.classifier = nn.Conv2d(config.decoder_channels, num_classes, 1)
        self.feature_channels = config.decoder_channels

    def train(self, mode: bool = True) -> TimmDeepLab:
        """Switch to training or evaluation; with ImageNet statistics the encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder_statistics == "imagenet":
            self.encoder.eval()
        return self

    def normalise(self, images: Tensor) -> Tensor:
        """Map ``images`` [B, 3, H, W], float in 0..1, RGB, to the range the encoder was trained with."""
        return (images - self.mean) / self.std

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Segment ``x`` [B, 3, H, W], normalised.

        Returns:
            logits [B, C, h, w] and features [B, feature_channels, h, w] at the stride of the early map.
        """
        early, deep = self.encoder.forward_intermediates(x, indices=self.encoder_maps, intermediates_only=True)
        low = self.skip(early)
        features = self.decoder(torch.cat([resize(self.aspp(deep), low.shape[-2:]), low], dim=1))
        return self.classifier(self.dropout(features)), features
