"""ResNet with dilated stages: torchvision's, changed where DeepLab differs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet


def freeze_norms(module: nn.Module) -> None:
    """Freeze scale and shift of every BatchNorm; its running statistics are still updated."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.requires_grad_(False)


class Backbone(ResNet):
    """ResNet of bottleneck blocks that returns its first and its last map.

    Scale and shift of BatchNorm are frozen at 1 and 0, or at loaded values; it normalises by the batch in training.

    Args:
        blocks: number of blocks in each of the four stages.
        dilations: of the last three stages; a stage with a dilation above 1 has stride 1 instead of 2.
        caffe: stride in the first 1x1 convolution of a stage instead of its 3x3 one, and a max-pooling that rounds its
            size up: the form of the weights that were converted from Caffe.
    """

    def __init__(self, blocks: Sequence[int], dilations: Sequence[int], caffe: bool = False) -> None:
        dilated = [dilation > 1 for dilation in dilations]
        super().__init__(Bottleneck, list(blocks), replace_stride_with_dilation=dilated)
        del self.avgpool, self.fc
        for stage, dilation in zip((self.layer2, self.layer3, self.layer4), dilations, strict=True):
            for block in stage:  # torchvision gives the first one the dilation of the stage before
                block.conv2.dilation = block.conv2.padding = (dilation, dilation)
                if caffe:
                    block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
        self.maxpool.ceil_mode = caffe
        freeze_norms(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Map ``x`` [B, 3, H, W], normalised.

        Returns:
            the map of the first stage [B, 256, h, w] at stride 4, and of the last [B, 2048, h', w'].
        """
        early = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return early, self.layer4(self.layer3(self.layer2(early)))
