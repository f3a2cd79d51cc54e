"""Lightning, with the InfoNCE objective of Wang et al. and a memory: python examples/lightning_module.py"""

import lightning
import torch
from shapes import CLASSES, Shapes, steps_from_command_line
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

from pixcontrast import ContrastBranch


class Segmenter(lightning.LightningModule):
    """Any network that gives features and logits; the branch is one more submodule, saved and moved with the others."""

    def __init__(self) -> None:
        super().__init__()
        self.network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(CLASSES))
        self.contrast = ContrastBranch(
            960, len(CLASSES), objective="infonce", dim=64, capacity=64, quota=8, max_views=4, loss_weight=0.1
        )

    def training_step(self, batch, _):
        images, labels = batch
        maps = self.network.backbone(images)
        logits = self.network.classifier(maps)
        logits = torch.nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear")
        features = maps["high"]
        segmentation = cross_entropy(logits, labels, ignore_index=255)
        contrast = self.contrast(features, labels, predict=logits.argmax(1))
        self.contrast.remember(features.detach(), None, labels)
        filled = self.contrast.memory.counts.float().mean()
        self.log_dict({"cross_entropy": segmentation, "contrast": contrast, "memory_rows": filled}, prog_bar=True)
        return segmentation + contrast

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


class Print(lightning.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index % 20 == 0 or index == trainer.max_steps - 1:
            print(f"step {index}:", ", ".join(f"{k} {v:.3f}" for k, v in trainer.callback_metrics.items()))


steps = steps_from_command_line(__doc__)
trainer = lightning.Trainer(
    max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
    callbacks=[Print()], enable_model_summary=False,
)  # fmt: skip
trainer.fit(Segmenter(), DataLoader(Shapes(8 * steps), batch_size=8))
