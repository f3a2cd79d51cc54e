"""A recipe for short trainings of a small network: minutes on a CPU. The demo and the ablation follow it."""

from __future__ import annotations

from train.config import DataConfig, FitConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from train.errors import UserError


def short_recipe(steps: int, seed: int, device: str = "auto", pretrained: bool = True) -> FitConfig:
    """EfficientNet-Lite0 cut at stride 16 with a narrow DeepLabV3+ head, for a few hundred steps on the built-in data.

    Args:
        steps: length of the training; the warm-ups are parts of it.
        seed: of the labelled images, the batches, the augmentation and the initial weights.
        device: see `RunConfig`.
        pretrained: start from ImageNet weights.

    Raises:
        UserError: fewer steps than the warm-ups need.
    """
    if steps < 30:
        raise UserError(f"--steps is {steps}: give at least 30, for the warm-ups to fit in")
    return FitConfig(
        DataConfig(crop=64, labelled_batch=8, unlabelled_batch=4),
        ModelConfig(
            pretrained=pretrained,
            encoder_maps=(1, 3),
            atrous_rates=(1, 2, 3),
            aspp_channels=64,
            skip_channels=32,
            decoder_channels=64,
            aspp_dropout=0.1,
            decoder_dropout=0.1,
            # A few hundred images and steps are too few to settle the statistics of all layers.
            encoder_statistics="imagenet",
            train_encoder_norm=True,
        ),
        # Warm-ups take a larger share of a short training than in the paper, and the teacher is less confident.
        MethodConfig(
            ramp=steps // 3,
            memory_start=steps // 6,
            contrast_start=steps // 4,
            contrast_dim=128,
            confidence=0.8,
        ),
        OptimConfig(steps=steps, optimizer="adamw", lr=5e-4, weight_decay=0.01, ema=0.99, seed=seed),
        RunConfig(device=device, log_every=5, evaluate_every=max(1, steps // 6), checkpoint_every=max(1, steps // 6)),
    )
