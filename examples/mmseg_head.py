"""A decode head of mmsegmentation with the InfoNCE objective, trained for some steps: python examples/mmseg_head.py"""

import sys
from unittest.mock import MagicMock

import torch
from shapes import CLASSES, Shapes, steps_from_command_line
from torch.utils.data import DataLoader

try:
    import mmcv.ops  # noqa: F401
except ModuleNotFoundError:  # mmcv-lite: mmsegmentation imports compiled operators that this head never calls
    sys.modules["mmcv._ext"] = MagicMock()
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules

from pixcontrast import ContrastBranch


@MODELS.register_module()
class ContrastHead(FCNHead):
    """Keeps what its classifier sees and adds ``loss_contrast``; other decode heads can be the base as well."""

    def __init__(self, contrast_weight=0.1, capacity=64, **options):
        super().__init__(**options)
        branch = {"capacity": capacity, "quota": 8, "max_views": 4, "loss_weight": contrast_weight}
        self.contrast = ContrastBranch(self.channels, self.num_classes, objective="infonce", **branch)

    def cls_seg(self, feat):
        self.features = feat
        return super().cls_seg(feat)

    def loss_by_feat(self, seg_logits, batch_data_samples):
        losses = super().loss_by_feat(seg_logits, batch_data_samples)
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        losses["loss_contrast"] = self.contrast(self.features, labels, predict=seg_logits.argmax(1))
        self.contrast.remember(self.features.detach(), None, labels)
        return losses


steps = steps_from_command_line(__doc__)
register_all_modules()
norm = {"type": "BN"}
backbone = {"type": "ResNet", "depth": 18, "num_stages": 1, "out_indices": (0,), "strides": (1,), "dilations": (1,)}
head = {"type": "ContrastHead", "in_channels": 64, "channels": 32, "num_classes": len(CLASSES), "norm_cfg": norm}
parts = {"backbone": {**backbone, "norm_cfg": norm}, "decode_head": head}
model = MODELS.build({"type": "EncoderDecoder", **parts}).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for step, (images, labels) in enumerate(DataLoader(Shapes(8 * steps), batch_size=8)):
    losses = model.loss(images, [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels])
    optimizer.zero_grad()
    sum(value for name, value in losses.items() if "loss" in name).backward()
    optimizer.step()
    if step % 20 == 0 or step == steps - 1:
        values = ", ".join(f"{name.removeprefix('decode.')} {float(value):.3f}" for name, value in losses.items())
        print(f"step {step}: {values}, memory {model.decode_head.contrast.memory.counts.tolist()}")
