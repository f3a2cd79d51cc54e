"""Hugging Face Trainer and a small SegFormer, with the InfoNCE objective: python examples/hf_trainer.py"""

import torch
from shapes import CLASSES, Shapes, steps_from_command_line
from transformers import (
    PrinterCallback,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from pixcontrast import ContrastBranch


class ContrastSegformer(SegformerForSemanticSegmentation):
    """SegFormer whose loss also contrasts the features of its second stage."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        self.contrast = ContrastBranch(
            config.hidden_sizes[1], config.num_labels, objective="infonce", dim=64, capacity=64, quota=8,
            max_views=4, loss_weight=0.1, ignore_index=config.semantic_loss_ignore_index,
        )  # fmt: skip

    def forward(self, pixel_values, labels):
        out = super().forward(pixel_values, labels=labels, output_hidden_states=True)
        features = out.hidden_states[1]  # [B, 32, h/8, w/8]
        contrast = self.contrast(features, labels, predict=out.logits.argmax(1))
        self.contrast.remember(features.detach(), None, labels)
        return {"loss": out.loss + contrast, "logits": out.logits}


class Print(TrainerCallback):
    def on_log(self, args, state, control, logs=None, model=None, **_):
        if "loss" in logs:
            rows = model.contrast.memory.counts.tolist()
            print(f"step {state.global_step}: loss {float(logs['loss']):.3f}, memory {rows}")


def collate(batch):
    images, labels = zip(*batch, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


steps = steps_from_command_line(__doc__)
config = SegformerConfig(
    num_labels=len(CLASSES), hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 1], decoder_hidden_size=64,
    num_attention_heads=[1, 2, 4, 6],
)  # fmt: skip
options = TrainingArguments(
    "runs/hf", max_steps=steps, per_device_train_batch_size=8, learning_rate=2e-3, logging_steps=20,
    logging_first_step=True, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, log_level="error",
)  # fmt: skip
data = Shapes(8 * steps)
trainer = Trainer(ContrastSegformer(config), options, collate, train_dataset=data, callbacks=[Print()])
trainer.remove_callback(PrinterCallback)
trainer.train()
