"""The segmentation network (timm encoder, DeepLabV3+ head) and the learner that adds the contrast branch to it."""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from pixcontrast import ContrastBranch
from train.config import ModelConfig
from train.errors import UserError
from train.networks import DeepLab
from train.weights import load_imagenet_weights


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias that keeps the size, BatchNorm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def resize(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear resize of ``x`` [B, C, h, w] to ``size``, corners aligned, as the paper does everywhere."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


class SegmentationModel(nn.Module):
    """DeepLabV3+ on a timm encoder: ASPP on the deep map, decoder on an early map of stride 4 or 8.

    The contrastive feature is the decoder's output just before the classifier.

    Args:
        num_classes: number of output channels C.
        config: encoder name, strides, widths and dropout.

    Attributes:
        feature_channels: channels of the contrastive feature.

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
            _freeze_norm_affine(encoder)

        self.aspp = ASPP(widths[1], list(config.atrous_rates), config.aspp_channels)
        self.aspp.project[-1] = nn.Dropout(config.aspp_dropout)
        self.skip = conv_bn_relu(widths[0], config.skip_channels, 1)
        self.decoder = nn.Sequential(
            conv_bn_relu(config.aspp_channels + config.skip_channels, config.decoder_channels, 3),
            conv_bn_relu(config.decoder_channels, config.decoder_channels, 3),
        )
        self.dropout = nn.Dropout(config.decoder_dropout)
        self.classifier = nn.Conv2d(config.decoder_channels, num_classes, 1)
        self.feature_channels = config.decoder_channels

    def train(self, mode: bool = True) -> SegmentationModel:
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


def _freeze_norm_affine(module: nn.Module) -> None:
    """Take scale and shift of every BatchNorm out of the training; the batch statistics go on."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False)


class Learner(nn.Module):
    """What is optimised and averaged: the segmentation network and, for the contrast, its branch.

    Args:
        network: the segmentation network.
        branch: contrast branch on the network's features, or None when nothing is contrasted.
        precision: of the products inside; weights, statistics and sums are float32 in any case.
    """

    def __init__(
        self,
        network: SegmentationModel | DeepLab,
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
