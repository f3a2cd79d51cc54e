"""Checkpoints of the authors' layout: every value arrives, the commands take them, and wrong ones are one line."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from train_helpers import error_of, their_heads

from train.checkpoint import read_checkpoint
from train.command_line import main
from train.config import parse_fit
from train.data.datasets import open_dataset
from train.data.scenes.layouts import make_scenes
from train.evaluate import load_learners, predict
from train.models import without_memory
from train.networks.base import DeepLab
from train.paper.figures import FiguresConfig, figures
from train.paper.released import our_tensor
from train.paper.rows import find_row
from train.paper.small_problem import shallow_networks
from train.paper.their_loop import TheirCode
from train.session import open_session

CHECKOUT = os.environ.get("PIXCONTRAST_SEMISEG", "")


@pytest.fixture(autouse=True)
def shallow() -> Iterator[None]:
    with shallow_networks():
        yield


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes") / "cityscapes"
    return make_scenes("cityscapes", root, train=6, val=2, size=(48, 96))


def norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels)


def conv(inputs: int, outputs: int, side: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, side, bias=False)


def named(**modules: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, module in modules.items():
        parent.add_module(name, module)
    return parent


def their_state(version: str, classes: int, seed: int = 0) -> dict[str, Tensor]:
    """The ``state_dict`` of their network with one block in each stage, of random values."""
    torch.manual_seed(seed)
    model: Any = ResNet(Bottleneck, [1, 1, 1, 1])
    del model.fc
    if version == "2":
        model.layer5 = named(conv2d_list=nn.ModuleList(nn.Conv2d(2048, classes, 3) for _ in range(4)))
    else:
        sides = {"aspp1": 1, "aspp2": 3, "aspp3": 3, "aspp4": 3}
        branches = {n: named(atrous_conv=conv(2048, 256, side), bn=norm(256)) for n, side in sides.items()}
        pooled = nn.Sequential(nn.Identity(), conv(2048, 256, 1), norm(256))
        model.aspp = named(**branches, global_avg_pool=pooled, conv1=conv(1280, 256, 1), bn1=norm(256))
        last = nn.Sequential(conv(304, 256, 3), norm(256), nn.ReLU(), conv(256, 256, 3), norm(256))
        end = nn.Conv2d(256, classes, 1)
        model.decoder = named(conv1=conv(256, 48, 1), bn1=norm(48), pre_last_conv=last, last_conv=end)
    for name, head in their_heads(2048 if version == "2" else 256, classes, 256).named_children():
        model.add_module(name, head)
    state = model.state_dict()
    for value in state.values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) / value[0].numel())
    return state


def released_file(
    path: Path, version: str = "2", pretraining: str = "imagenet", classes: int = 19, **changes: Any
) -> tuple[Path, dict[str, Tensor]]:
    """A file as their trainer saves it, and the tensors in it; ``changes`` replace or, being None, remove entries."""
    state = their_state(version, classes)
    training = {"pretraining": pretraining, "batch_size": 5, "data": {"labeled_samples": 100, "split_id_list": 0}}
    config = {"model": "DeepLab", "version": version, "training": training, "ignore_label": 250}
    optimizer = {"state": {}, "param_groups": [{"lr": 2e-4, "params": [0, 1]}]}
    content = {"iteration": 3, "optimizer": optimizer, "config": config, "model": state} | changes
    torch.save({name: value for name, value in content.items() if value is not None}, path)
    return path, state


@pytest.mark.parametrize(
    ("version", "pretraining", "classes", "network"),
    [
        ("2", "imagenet", 19, "deeplab_v2"),
        ("2", "COCO", 21, "deeplab_v2_coco"),
        ("3", "imagenet", 21, "deeplab_v3plus"),
    ],
)
def test_every_tensor_arrives(version: str, pretraining: str, classes: int, network: str, tmp_path: Path):
    path, given = released_file(tmp_path / "best_model.pth", version, pretraining, classes)
    learners, content = load_learners(path)
    learner = learners["student"]
    assert learners.keys() == {"student"} and content["config"]["model"]["network"] == network
    assert isinstance(learner.network, DeepLab) and learner.network.bgr == (pretraining == "COCO")
    assert content["config"]["data"]["scale"] == (0.5 if (version, classes) == ("2", 19) else 1.0)
    assert content["data"]["labelled"] == 100 and len(content["data"]["classes"]) == classes
    own, seen = learner.state_dict(), 0
    for name, value in given.items():
        if not name.endswith("num_batches_tracked"):
            tensor = our_tensor(own, name)
            assert tensor is not None and torch.equal(tensor, value), name
            seen += value.numel()
    kept = [v.numel() for n, v in own.items() if "num_batches" not in n and not n.startswith("branch.memory.")]
    assert seen == sum(kept)  # and nothing of ours is left as it was drawn
    assert learner.branch is not None and learner.branch.variant == "released"


@pytest.mark.skipif(
    not CHECKOUT, reason="set PIXCONTRAST_SEMISEG to a checkout of github.com/Shathe/SemiSeg-Contrastive"
)
@pytest.mark.parametrize("name", ["cityscapes/dv2-imagenet/1-30", "voc/dv2-coco/1-50", "voc/dv3plus-imagenet/1-50"])
def test_their_network_and_ours_give_the_same_logits(name: str, tmp_path: Path):
    row = find_row(name)
    classes = len(row.iou)
    with TheirCode(Path(CHECKOUT), row) as code:
        model = code.build(classes).eval()
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.02 * torch.rand_like(value))
        torch.save({"config": code.config, "model": model.state_dict()}, tmp_path / "best_model.pth")
        image = torch.randint(256, (1, 3, 64, 96))
        learner = load_learners(tmp_path / "best_model.pth")[0]["student"].eval()
        with torch.no_grad():
            expected = model(learner.network.normalise(image / 255.0))
            logits = learner(image / 255.0)[0]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("kind", ["DataParallel", "bare"])
def test_prefixes_and_bare_tensors(kind: str, tmp_path: Path):
    path, given = released_file(tmp_path / "best_model.pth", "3")
    if kind == "bare":  # a classifier of DeepLabV3+ says which network it is
        torch.save(given, path)
    else:
        released_file(path, "3", model={f"module.{name}": value for name, value in given.items()})
    state = load_learners(path)[0]["student"].state_dict()
    assert torch.equal(state["network.classifier.weight"], given["decoder.last_conv.weight"])


def test_evaluate_figures_and_predict_take_it(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    path = str(released_file(tmp_path / "best_model.pth")[0])
    assert main(["evaluate", path, "--root", str(scenes), "--device", "cpu"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| IoU, % | student |" and len(table) == 2 + 19 + 1

    titles: list[list[str]] = []
    monkeypatch.setattr("train.paper.figures.draw_page", lambda path, columns, *rest: titles.append(columns))
    figures(FiguresConfig(Path(path), root=scenes, attention=True, out=tmp_path / "pages", device="cpu"))
    assert titles[0] == ["image", "released checkpoint", "labels"] and titles[1][2] == "attention"
    assert "have none" in error_of(lambda: figures(FiguresConfig(Path(path), root=scenes, memory=True, out=tmp_path)))

    data = open_dataset("cityscapes", "val", scenes, 0.5)
    image = data.pairs[data.ids[0]][0]
    assert main(["predict", path, str(image), str(tmp_path / "maps"), "--device", "cpu"]) == 0
    expected = predict(load_learners(Path(path))[0]["student"], data[0][0], (48, 96))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "maps" / f"{image.stem}.png")), expected)


OPTIONS = ["--dataset", "cityscapes", "--network", "deeplab_v2", "--labelled", "4", "--crop", "32", "--device", "cpu"]
OPTIONS += ["--labelled-batch", "2", "--unlabelled-batch", "2", "--steps", "1"]


def test_a_training_starts_from_it_and_goes_on_without_it(scenes: Path, tmp_path: Path):
    path, given = released_file(tmp_path / "best_model.pth")
    arguments = [*OPTIONS, "--root", str(scenes), "--out", str(tmp_path / "run"), "--init", str(path)]
    training = open_session(parse_fit(arguments)).training
    for learner in (training.learner, training.teacher):
        own = learner.state_dict()
        for name, value in given.items():
            if "num_batches" not in name:
                tensor = our_tensor(own, name)
                assert tensor is not None and torch.equal(tensor, value), name
    assert main(["fit", *arguments]) == 0
    path.unlink()
    assert main(["fit", *arguments]) == 0


def test_a_training_starts_from_one_of_ours(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = [*OPTIONS, "--no-pretrained", "--memory-start", "-1", "--confidence", "0.01", "--root", str(scenes)]
    assert main(["fit", *options, "--out", str(tmp_path / "first")]) == 0
    last = tmp_path / "first" / "last.pt"
    given = read_checkpoint(last)["training"]["learner"]
    assert given["branch.memory.counts"].sum() > 0
    capsys.readouterr()
    again = open_session(parse_fit([*options, "--init", str(last), "--out", str(tmp_path / "second")])).training
    own = again.learner.state_dict()
    weights = {name: value for name, value in without_memory(given).items() if "num_batches" not in name}
    assert all(torch.equal(own[name], value) for name, value in weights.items())
    assert own["branch.memory.counts"].sum() == 0
    voc = make_scenes("voc", tmp_path / "voc", train=6, val=2, size=(48, 64))
    options += ["--dataset", "voc", "--root", str(voc), "--out", str(tmp_path / "third")]
    mixed = open_session(parse_fit([*options, "--init", str(last)])).training.learner.state_dict()
    assert torch.equal(mixed["network.backbone.conv1.weight"], given["network.backbone.conv1.weight"])
    assert torch.equal(mixed["branch.project.last.weight"], given["branch.project.last.weight"])
    report = capsys.readouterr().out
    assert "of another size (network.classifier.convs.0.weight [19, 2048, 3, 3] instead of [21," in report


def without(name: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        state = released_file(path)[1]
        del state[name]
        released_file(path, model=state)

    return make


class Program:
    """Unpickling it would run a program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/nonexistent/ran",)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing tensor": (
        without("layer3.0.bn2.running_var"),
        r"tensors of the network are there at their size, not network\.backbone\.layer3\.0\.bn2\.running_var",
    ),
    "a missing selector": (
        without("contrastive_class_selector_7.0.weight"),
        r"not branch\.select_features\.weight1; given",
    ),
    "no classifier": (
        without("layer5.conv2d_list.0.bias"),
        r"no classifier of 19 \(Cityscapes\) or 21 \(VOC\)",
    ),
    "other classes": (lambda path: released_file(path, classes=7), r"no classifier of 19 .* fit --weights"),
    "no settings": (lambda path: released_file(path, config=None), r"whether its DeepLabV2 is the one for COCO or"),
    "a program": (
        lambda path: released_file(path, config=Program()),
        r"is damaged: .* of another kind",
    ),
    "something else": (
        lambda path: torch.save({"model": {"stem.weight": torch.ones(1)}}, path),
        r"not written by",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_one_clear_line(kind: str, tmp_path: Path):
    path = tmp_path / "best_model.pth"
    make, message = WRONG[kind]
    make(path)
    error = error_of(lambda: load_learners(path))
    assert str(path) in error
    assert re.search(message, error), error


def test_another_network_is_refused(scenes: Path, tmp_path: Path):
    path, _ = released_file(tmp_path / "best_model.pth", pretraining="COCO")
    arguments = [*OPTIONS, "--root", str(scenes), "--out", str(tmp_path / "run"), "--init", str(path)]
    assert "is of --network deeplab_v2_coco, not deeplab_v2" in error_of(lambda: open_session(parse_fit(arguments)))
    released_file(path, config=None)  # does not say which: the option does
    open_session(parse_fit([*arguments, "--network", "deeplab_v2_coco"]))
    assert "does not exist" in error_of(lambda: open_session(parse_fit([*arguments, "--init", "nowhere.pth"])))
