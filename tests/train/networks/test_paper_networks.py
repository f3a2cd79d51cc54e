"""The paper's networks: their sizes, their formulas written plainly, and what trains in them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixcontrast import ContrastBranch
from train.errors import UserError
from train.networks import NETWORKS, build_network, deeplab_v2, deeplab_v3plus
from train.networks.backbone import Backbone
from train.networks.base import MEANS, DeepLab
from train.networks.deeplab_v2 import AtrousClassifier

VOC = MEANS["voc"]
BLOCKS = (2, 2, 2, 2)
"""Blocks a stage of the networks that are computed: the first block of a stage and the others differ, no more do."""


@cache
def on_meta(name: str, num_classes: int = 19, branches: int = 2) -> DeepLab:
    """A network that computes shapes only: no memory, no time."""
    with torch.device("meta"):
        return build_network(name, num_classes, VOC, branches)


def shallow_network(name: str, num_classes: int) -> DeepLab:
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for module in (deeplab_v2, deeplab_v3plus):
            patch.setattr(module, "Backbone", lambda blocks, *rest: Backbone(BLOCKS, *rest))
        return build_network(name, num_classes, VOC)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> DeepLab:
    """A float64 network of 5 classes in evaluation mode, whose BatchNorm layers all differ; shallower than the paper's.

    The depth of the paper's is tested on the meta device, and once for real.
    """
    network = shallow_network(request.param, 5).double().eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
    network.name = request.param
    return network


# ---- sizes


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("deeplab_v2", (512, 512), (64, 64)),
        ("deeplab_v2", (321, 321), (41, 41)),
        ("deeplab_v2", (512, 1024), (64, 128)),
        ("deeplab_v2_coco", (512, 512), (65, 65)),
        ("deeplab_v2_coco", (321, 321), (41, 41)),
        ("deeplab_v2_coco", (512, 1024), (65, 129)),
        ("deeplab_v3plus", (512, 512), (128, 128)),
        ("deeplab_v3plus", (321, 321), (81, 81)),
        ("deeplab_v3plus", (1024, 2048), (256, 512)),
    ],
)
def test_maps_have_the_size_of_the_papers_setting(name: str, image: tuple[int, int], expected: tuple[int, int]):
    network = on_meta(name)
    logits, features = network(torch.empty(2, 3, *image, device="meta"))
    assert network.feature_channels == (256 if name == "deeplab_v3plus" else 2048)
    assert logits.shape == (2, 19, *expected) and features.shape == (2, network.feature_channels, *expected)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "side"),
    [("deeplab_v2", 21), ("deeplab_v2_coco", 21), ("deeplab_v3plus", 41)],
)
def test_one_image_through_all_layers(name: str, side: int):
    """Once for real, with all blocks; at a half of the crop of VOC, since the sizes are tested on the meta device."""
    torch.manual_seed(0)
    network = build_network(name, 21, VOC).eval()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_var.fill_(0.05)  # or untrained convolutions would leave nothing of the image
    logits, features = network(network.normalise(torch.rand(1, 3, 161, 161)))
    assert logits.shape == (1, 21, side, side) and features.shape == (1, network.feature_channels, side, side)
    for what, values in (("logits", logits), ("features", features)):
        assert values.isfinite().all(), what
        assert (values.std((2, 3)) > 1e-3).float().mean() > 0.5, what  # the image shows in most channels


def test_one_image_of_odd_size_in_evaluation(network: DeepLab):
    image = network.normalise(torch.rand(1, 3, 65, 97).double())
    before = {name: value.clone() for name, value in network.named_buffers()}
    with torch.inference_mode():
        logits, features = network(image)
        again, _ = network(image)
    stride = 4 if network.name == "deeplab_v3plus" else 8
    assert logits.shape[2:] == features.shape[2:] == (64 // stride + 1, 96 // stride + 1)
    assert logits.isfinite().all() and torch.equal(logits, again)
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())


@pytest.mark.parametrize(
    ("name", "alone", "frozen", "with_heads"),
    [
        ("deeplab_v2", 43_901_068, 105_344, 47.2),
        ("deeplab_v2_coco", 43_901_068, 105_344, 47.2),
        ("deeplab_v3plus", 40_351_667, 53_120, 43.1),
    ],
)
def test_number_of_parameters(name: str, alone: int, frozen: int, with_heads: float):
    network = on_meta(name, branches=4)
    assert sum(p.numel() for p in network.parameters()) == alone
    assert sum(p.numel() for p in network.parameters() if not p.requires_grad) == frozen
    with torch.device("meta"):
        heads = sum(p.numel() for p in ContrastBranch(network.feature_channels, 19).parameters())
    assert round((alone + heads) / 1e6, 1) == with_heads


# ---- the formulas


def plain_backbone(network: DeepLab, x: Tensor) -> tuple[Tensor, Tensor]:
    """The backbone from its tensors: first and last map, BatchNorm over the batch."""
    weights, caffe = network.backbone.state_dict(), network.name == "deeplab_v2_coco"
    dilations = (1, 1, 1, 2) if network.name == "deeplab_v3plus" else (1, 1, 2, 4)

    def conv_bn(x: Tensor, conv: str, bn: str, stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
        x = F.conv2d(x, weights[f"{conv}.weight"], None, stride, padding, dilation)
        return F.batch_norm(x, None, None, weights[f"{bn}.weight"], weights[f"{bn}.bias"], training=True)

    x = F.relu(conv_bn(x, "conv1", "bn1", stride=2, padding=3))
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=caffe)
    maps = []
    for stage, (blocks, dilation) in enumerate(zip(BLOCKS, dilations, strict=True), start=1):
        for index in range(blocks):
            block = f"layer{stage}.{index}"
            stride = 2 if index == 0 and stage > 1 and dilation == 1 else 1
            y = F.relu(conv_bn(x, f"{block}.conv1", f"{block}.bn1", stride if caffe else 1))
            y = conv_bn(y, f"{block}.conv2", f"{block}.bn2", 1 if caffe else stride, dilation, dilation)
            y = conv_bn(F.relu(y), f"{block}.conv3", f"{block}.bn3")
            if index == 0:
                x = conv_bn(x, f"{block}.downsample.0", f"{block}.downsample.1", stride)
            x = F.relu(x + y)
        maps.append(x)
    return maps[0], maps[-1]


def plain_v3plus_head(network: DeepLab, early: Tensor, deep: Tensor) -> tuple[Tensor, Tensor]:
    """ASPP and decoder from their tensors, without dropout."""
    weights = network.state_dict()

    def block(x: Tensor, conv: str, bn: str, padding: int = 0, dilation: int = 1) -> Tensor:
        x = F.conv2d(x, weights[f"{conv}.weight"], None, 1, padding, dilation)
        return F.relu(F.batch_norm(x, None, None, weights[f"{bn}.weight"], weights[f"{bn}.bias"], training=True))

    branches = [block(deep, "aspp.convs.0.0", "aspp.convs.0.1")]
    branches += [block(deep, f"aspp.convs.{i}.0", f"aspp.convs.{i}.1", 6 * i, 6 * i) for i in (1, 2, 3)]
    pooled = block(deep.mean((2, 3), keepdim=True), "aspp.convs.4.1", "aspp.convs.4.2")
    branches.append(pooled.expand_as(branches[0]))
    context = block(torch.cat(branches, 1), "aspp.project.0", "aspp.project.1")
    context = F.interpolate(context, early.shape[2:], mode="bilinear", align_corners=True)
    x = torch.cat([context, block(early, "skip.0", "skip.1")], 1)
    features = block(block(x, "decoder.0.0", "decoder.0.1", 1), "decoder.1.0", "decoder.1.1", 1)
    return F.conv2d(features, weights["classifier.weight"], weights["classifier.bias"]), features


def plain_v2_classifier(classifier: nn.Module, features: Tensor, branches: int) -> Tensor:
    """The sum of the first ``branches`` convolutions from their tensors."""
    weights = classifier.state_dict()
    dilations = (6, 12, 18, 24)[:branches]
    return sum(
        F.conv2d(features, weights[f"convs.{i}.weight"], weights[f"convs.{i}.bias"], padding=d, dilation=d)
        for i, d in enumerate(dilations)
    )


@torch.no_grad()
def test_agrees_with_the_plain_formulas(network: DeepLab):
    """In training mode, so with the statistics of the batch; only dropout is off."""
    x = torch.rand(2, 3, 304, 33).double() - 0.5  # high enough for two pixels 18 apart at stride 16
    for layer in network.train().modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    logits, features = network(x)
    network.eval()
    early, deep = plain_backbone(network, x)
    if network.name == "deeplab_v3plus":
        expected_logits, expected = plain_v3plus_head(network, early, deep)
    else:
        expected_logits, expected = plain_v2_classifier(network.classifier, deep, 2), deep
    torch.testing.assert_close(features, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, 2, 4])
def test_the_classifier_sums_as_many_dilations_as_asked(branches: int):
    classifier = AtrousClassifier(16, 3, branches)
    features = torch.rand(1, 16, 30, 31)
    torch.testing.assert_close(classifier(features), plain_v2_classifier(classifier, features, branches))


def test_unusable_choices_are_one_clear_error():
    with pytest.raises(UserError, match="'deeplab_v4'.*deeplab_v2, deeplab_v2_coco, deeplab_v3plus"):
        build_network("deeplab_v4", 2, VOC)
    for branches in (0, 5):
        with pytest.raises(UserError, match=f"branches is {branches}: .* 1 to 4"):
            on_meta("deeplab_v2", branches=branches)


def test_normalisation_subtracts_the_mean_and_orders_the_channels(network: DeepLab):
    images = torch.rand(2, 3, 4, 5).double()
    expected = (255 * images - torch.tensor(VOC).view(1, 3, 1, 1)) / 255
    if network.name == "deeplab_v2_coco":
        expected = expected[:, [2, 1, 0]]
    torch.testing.assert_close(network.normalise(images), expected, rtol=0, atol=1e-7)
    assert "mean" not in network.state_dict()


# ---- what trains


@pytest.mark.parametrize("name", ["deeplab_v2", "deeplab_v3plus"])
def test_convolutions_start_from_a_narrow_normal_distribution(name: str):
    for layer in shallow_network(name, 19).modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        if isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()


def test_gradients_reach_all_but_the_norms_of_the_backbone_and_unused_classifiers(network: DeepLab):
    network.train().zero_grad()
    logits, features = network(torch.rand(2, 3, 65, 65).double())
    ((logits * torch.randn_like(logits)).sum() + (features * torch.randn_like(features)).sum()).backward()
    network.eval()
    norms = [
        f"backbone.{name}." for name, layer in network.backbone.named_modules() if isinstance(layer, nn.BatchNorm2d)
    ]
    frozen = (*norms, "classifier.convs.2.", "classifier.convs.3.")
    names = [name for name, _ in network.named_parameters()]
    expected = [name for name in names if not name.startswith(frozen)]
    assert [name for name, p in network.named_parameters() if p.requires_grad] == expected
    assert [name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()] == expected
    network.zero_grad()


def test_training_updates_the_statistics_of_every_norm(network: DeepLab):
    statistics = [(name, value) for name, value in network.named_buffers() if name.endswith(("_mean", "_var"))]
    before = [value.clone() for _, value in statistics]
    with torch.no_grad():
        network.train()(torch.rand(2, 3, 65, 65).double())
    network.eval()
    assert [name for (name, value), old in zip(statistics, before, strict=True) if torch.equal(value, old)] == []


def test_dropout_of_v3plus_is_of_the_papers_strength():
    network = on_meta("deeplab_v3plus")
    assert {name: layer.p for name, layer in network.named_modules() if isinstance(layer, nn.Dropout)} == {
        "aspp.project.3": 0.5,
        "dropout": 0.1,
    }
