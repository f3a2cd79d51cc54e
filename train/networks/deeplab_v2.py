"""DeepLabV2 on ResNet-101, without multi-scale input."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models import ResNet101_Weights

from train.errors import UserError
from train.networks.backbone import Backbone
from train.networks.base import Colour, DeepLab

DILATIONS = (6, 12, 18, 24)


class AtrousClassifier(nn.Module):
    """Sum of 3x3 convolutions of growing dilation.

    Args:
        in_channels: channels of the features.
        num_classes: number of output channels C.
        branches: how many of the four convolutions are summed.

    Raises:
        UserError: branches outside 1..4.
    """

    def __init__(self, in_channels: int, num_classes: int, branches: int) -> None:
        super().__init__()
        if not 1 <= branches <= len(DILATIONS):
            raise UserError(f"branches is {branches}: DeepLabV2 has 1 to {len(DILATIONS)} classifiers to sum")
        self.branches = branches
        self.convs = nn.ModuleList(nn.Conv2d(in_channels, num_classes, 3, padding=d, dilation=d) for d in DILATIONS)
        for conv in self.convs[branches:]:  # checkpoints contain them, but they get no gradient
            conv.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        """``features`` [B, in_channels, h, w] to logits [B, C, h, w]."""
        logits = self.convs[0](features)
        for conv in self.convs[1 : self.branches]:
            logits = logits + conv(features)
        return logits


class DeepLabV2(DeepLab):
    """Stride 8 throughout; the contrastive feature is the backbone's last map.

    Args:
        num_classes: number of output channels C.
        mean: mean colour of the data set, RGB, 0..255.
        branches: how many of the four classifiers are summed. The paper's released code, like others of its line,
            returns within the loop over them and so sums the first 2.
        caffe: the form of the COCO weights, whose images are BGR.
    """

    feature_channels = 2048

    def __init__(self, num_classes: int, mean: Colour, branches: int = 2, caffe: bool = False) -> None:
        backbone = Backbone((3, 4, 23, 3), (1, 2, 4), caffe)
        super().__init__(backbone, mean, caffe, None if caffe else ResNet101_Weights.IMAGENET1K_V1)
        self.classifier = AtrousClassifier(self.feature_channels, num_classes, branches)
        self.initialise()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Segment ``x`` [B, 3, H, W], normalised: logits [B, C, h, w] and features [B, 2048, h, w] at stride 8."""
        _, features = self.backbone(x)
        return self.classifier(features), features
