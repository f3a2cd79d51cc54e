"""Loading of pretrained weights into the paper's networks: every source, and every file that does not do."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import _api

from train.errors import UserError
from train.networks import build_network
from train.networks.base import MEANS, DeepLab
from train.networks.weights import load_weights

VOC = MEANS["voc"]


@cache
def empty_network(name: str) -> DeepLab:
    """A network without memory for its tensors, for weights that will not be loaded."""
    with torch.device("meta"):
        return build_network(name, 19, VOC)


@cache
def backbone_shapes(depth: int) -> dict[str, torch.Size]:
    """Names and sizes of torchvision's ResNet without its classifier, as older files have them."""
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    return {n: v.shape for n, v in state.items() if not n.startswith("fc.") and not n.endswith("batches_tracked")}


def norm_shapes(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{field}": (channels,) for field in ("weight", "bias", "running_mean", "running_var")}


def coco_shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
    """The COCO weights for DeepLabV2: 528 tensors."""
    shapes: dict[str, tuple[int, ...]] = dict(backbone_shapes(101))
    for i in range(4):
        shapes[f"layer5.conv2d_list.{i}.weight"] = (num_classes, 2048, 3, 3)
        shapes[f"layer5.conv2d_list.{i}.bias"] = (num_classes,)
    return shapes


def released_v3plus_shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
    """The DeepLabV3+ of the paper's released code, with one layer of its contrastive heads."""
    shapes: dict[str, tuple[int, ...]] = dict(backbone_shapes(50))
    for i, side in ((1, 1), (2, 3), (3, 3), (4, 3)):
        shapes |= {f"aspp.aspp{i}.atrous_conv.weight": (256, 2048, side, side)} | norm_shapes(f"aspp.aspp{i}.bn", 256)
    shapes |= {"aspp.global_avg_pool.1.weight": (256, 2048, 1, 1)} | norm_shapes("aspp.global_avg_pool.2", 256)
    shapes |= {"aspp.conv1.weight": (256, 1280, 1, 1)} | norm_shapes("aspp.bn1", 256)
    shapes |= {"decoder.conv1.weight": (48, 256, 1, 1)} | norm_shapes("decoder.bn1", 48)
    shapes |= {"decoder.pre_last_conv.0.weight": (256, 304, 3, 3)} | norm_shapes("decoder.pre_last_conv.1", 256)
    shapes |= {"decoder.pre_last_conv.3.weight": (256, 256, 3, 3)} | norm_shapes("decoder.pre_last_conv.4", 256)
    shapes |= {"decoder.last_conv.weight": (num_classes, 256, 1, 1), "decoder.last_conv.bias": (num_classes,)}
    return shapes | {"projection_head.0.weight": (256, 256)}


def constants(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A tensor of each size, the first filled with 0, the next with 1, and so on; each a single number in a file."""
    return {name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


def write(path: Path, content: object, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def test_coco_weights_fit_voc_as_a_whole(tmp_path: Path):
    given = constants(coco_shapes(21))
    network = build_network("deeplab_v2_coco", 21, VOC)
    report = load_weights(network, write(tmp_path / "coco.pth", given, legacy=True))
    assert len(report.loaded) == 528 and str(report) == f"{tmp_path / 'coco.pth'}: 528 of 528 tensors loaded"
    state = network.state_dict()
    assert (state["backbone.layer3.22.bn2.running_var"] == given["layer3.22.bn2.running_var"]).all()
    assert all((state[f"classifier.convs.{i}.bias"] == given[f"layer5.conv2d_list.{i}.bias"]).all() for i in range(4))


def test_coco_weights_fit_cityscapes_but_for_the_classifier(tmp_path: Path):
    path = write(tmp_path / "coco.pth", constants(coco_shapes(21)))
    network = build_network("deeplab_v2_coco", 19, VOC)
    before = network.classifier.convs[0].weight.clone()
    report = load_weights(network, path)
    assert len(report.loaded) == 520 and len(report.mismatched) == 8 and not report.missing and not report.unknown
    assert "520 of 528 tensors loaded; 8 of another size (classifier.convs.0.weight [21, 2048, 3, 3]" in str(report)
    assert "classifier.convs.3.bias [21] instead of [19]" in report.mismatched
    assert torch.equal(network.classifier.convs[0].weight, before)


def test_a_checkpoint_of_the_released_code_fits_as_a_whole(tmp_path: Path):
    given = constants(released_v3plus_shapes(19))
    path = write(tmp_path / "best_model.pth", {"iteration": 3, "config": {"seed": 5555}, "model": given})
    network = build_network("deeplab_v3plus", 19, VOC)
    report = load_weights(network, path)
    assert len(report.loaded) == 312 == len(given) - 1 and not report.missing and not report.mismatched
    assert report.unknown == ["projection_head.0.weight"]

    def value(layer: nn.Module) -> float:
        return layer.weight.flatten()[0].item()

    for i in range(4):
        assert value(network.aspp.convs[i][0]) == given[f"aspp.aspp{i + 1}.atrous_conv.weight"].max()
        assert value(network.aspp.convs[i][1]) == given[f"aspp.aspp{i + 1}.bn.weight"].max()
    assert value(network.aspp.convs[4][2]) == given["aspp.global_avg_pool.2.weight"].max()
    assert value(network.aspp.project[1]) == given["aspp.bn1.weight"].max()
    assert value(network.decoder[0][1]) == given["decoder.pre_last_conv.1.weight"].max()
    assert value(network.decoder[1][1]) == given["decoder.pre_last_conv.4.weight"].max()


def test_a_network_reads_what_it_wrote(tmp_path: Path):
    written, read = (build_network("deeplab_v3plus", 2, VOC) for _ in range(2))
    report = load_weights(read, write(tmp_path / "ours.pth", written.state_dict()))
    assert len(report.loaded) == 312 and not report.missing and not report.unknown
    assert all(torch.equal(a, b) for a, b in zip(written.parameters(), read.parameters(), strict=True))


@pytest.mark.parametrize(("name", "depth", "head"), [("deeplab_v2", 101, 8), ("deeplab_v3plus", 50, 47)])
def test_imagenet_weights_come_from_torchvision(name: str, depth: int, head: int, monkeypatch: pytest.MonkeyPatch):
    urls: list[str] = []

    def download(url: str, **options: object) -> dict[str, Tensor]:
        urls.append(url)
        assert options["check_hash"] and options["weights_only"]
        return constants(
            backbone_shapes(depth) | {"fc.weight": torch.Size((1000, 2048)), "fc.bias": torch.Size((1000,))}
        )

    monkeypatch.setattr(_api, "load_state_dict_from_url", download)
    network = build_network(name, 4, VOC)
    report = load_weights(network, "imagenet")
    version = getattr(torchvision.models, f"ResNet{depth}_Weights").IMAGENET1K_V1
    assert urls == [version.url] and report.source == "imagenet"
    assert len(report.loaded) == len(backbone_shapes(depth)) and len(report.missing) == head
    assert report.unknown == ["fc.weight", "fc.bias"] and not report.mismatched
    assert f"; {head} not given (" in str(report) and ", ...); 2 not in the network (fc.weight, fc.bias)" in str(report)


def test_no_network_and_nothing_to_download_are_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    def download(url: str, **options: object) -> dict[str, Tensor]:
        raise URLError("Name or service not known")

    monkeypatch.setattr(_api, "load_state_dict_from_url", download)
    with pytest.raises(UserError, match=r"https://.*resnet50.*\.pth cannot be downloaded.*not known.*--weights PATH"):
        load_weights(empty_network("deeplab_v3plus"), "imagenet")
    with pytest.raises(UserError, match="no weights to download.*path of the COCO weights"):
        load_weights(empty_network("deeplab_v2_coco"), "imagenet")


def flip(path: Path) -> None:
    """Change a bit in the middle of the weights."""
    content = bytearray(write(path, constants(backbone_shapes(101))).read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def compress(path: Path) -> None:
    """Let a small file unpack to a large one."""
    with zipfile.ZipFile(write(path, {"weight": torch.zeros(2**18)})) as plain:
        parts = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


WRONG_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda path: None, r"absent\.pth do not exist: give --weights"),
    "truncated": (
        lambda path: path.write_bytes(write(path, constants(backbone_shapes(101))).read_bytes()[:5000]),
        r"truncated\.pth are damaged or not a file of PyTorch tensors .*: fetch them again",
    ),
    "flipped": (flip, r"flipped\.pth are damaged .*\(its part flipped/data/\d+ does not have its checksum\)"),
    "compressed": (compress, r"compressed\.pth are damaged .*\(its parts are larger than the file\)"),
    "text": (lambda path: path.write_text("not weights"), r"text\.pth are damaged or not a file of PyTorch tensors"),
    "object": (
        lambda path: write(path, {"model": path}),
        r"object\.pth are damaged or not a file of PyTorch tensors",
    ),
    "number": (lambda path: write(path, 3), r"number\.pth hold no tensors by name"),
    "no_names": (lambda path: write(path, {"model": {0: torch.zeros(1)}}), r"no_names\.pth hold no tensors by name"),
    "other": (
        lambda path: write(path, {"stem.weight": torch.zeros(1)}),
        r"0 of 520 tensors of the backbone .*, not backbone\.conv1\.weight, .*; given are stem\.weight: choose",
    ),
    "shallower": (
        lambda path: write(path, constants(backbone_shapes(50))),
        r"265 of 520 tensors of the backbone .*, not backbone\.layer3\.6\.conv1\.weight, .*; given are ",
    ),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_a_wrong_file_is_one_clear_error(kind: str, tmp_path: Path):
    path = tmp_path / f"{kind}.pth"
    make, message = WRONG_FILES[kind]
    make(path)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(empty_network("deeplab_v2"), path)
    assert "\n" not in str(caught.value)
