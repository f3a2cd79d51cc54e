"""The rows of the paper: their names, their command line, their splits, and the second source of Table 3."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from train.command_line import main
from train.config import DataConfig, FitConfig
from train.data.batches import Batches
from train.data.datasets import open_dataset
from train.data.scenes.layouts import make_scenes
from train.data.splits import choose_labelled, split_labelled_by_sequence
from train.models import build_learner
from train.networks.deeplab_v2 import DeepLabV2
from train.networks.deeplab_v3plus import DeepLabV3Plus
from train.paper.rows import rows, rows_of_table
from train.paper.variants import RowOptions, parse_row, row_config
from train.session import Session, open_session
from train.step import training_step

CITYSCAPES = [
    *("dv2-imagenet/1-30", "dv2-coco/1-30", "dv3plus-imagenet/1-30", "dv2-imagenet/1-15"),
    *("dv2-imagenet/1-8", "dv2-coco/1-8", "dv3plus-imagenet/1-8", "dv2-imagenet/1-6"),
    *("dv2-imagenet/1-4", "dv2-coco/1-4", "dv3plus-imagenet/1-4", "dv2-imagenet/1-3"),
]
VOC = [f"{net}/1-{part}" for part in (50, 20, 8) for net in ("dv2-imagenet", "dv2-coco", "dv3plus-imagenet")]
GTA5 = [f"dv2-imagenet/1-{part}" for part in (30, 15, 6, 3)]


def test_names_in_the_order_of_the_tables():
    names = [f"cityscapes/{name}" for name in CITYSCAPES] + [f"voc/{name}" for name in VOC]
    names += [f"gta5/{name}" for name in GTA5]
    assert list(rows()) == names and len(names) == 25
    assert [len(rows_of_table(table)) for table in (1, 2, 3)] == [12, 9, 4]


def test_list_has_a_line_for_each_row(capsys: pytest.CaptureFixture[str]):
    assert main(["rows"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(rows())
    assert " ".join(lines[2].split()) == (
        "cityscapes/dv3plus-imagenet/1-30 table 1 100 labelled deeplab_v3plus batch 7 + 3 crop 512 of 1 size "
        "lr 0.0004 mIoU 64.8"
    )


@pytest.mark.parametrize("name", rows())
def test_command_line_of_a_row(name: str):
    row = rows()[name]
    config = parse_row(["--row", name, "--data", "folder", "--split", "2", "--variant", "released"])
    config.check()
    assert config.method.variant == "released" and config.data.labelled == row.target.labelled
    assert (config.data.root, config.data.split_seed) == (Path("folder") / row.dataset, 2)
    assert config.data.source_root == (Path("folder/gta5") if name.startswith("gta5") else None)
    coco = "folder/weights/resnet101COCO-41f33a49.pth"
    assert config.model.weights == (coco if "-coco/" in name else "imagenet")
    assert config.run.out == Path("runs") / name / "released-contrast" / "split2"


def test_options_override_the_values_of_a_row():
    row = ["--row", "voc/dv2-coco/1-20", "--data", "d"]
    config = parse_row([*row, "--method", "pseudo", "--steps", "9", "--crop", "64", "--labelled", "0.5", "--out", "o"])
    assert (config.method.method, config.optim.steps, config.data.crop, config.data.labelled) == ("pseudo", 9, 64, 0.5)
    assert config.run.out == Path("o") and config.data.labelled_batch == 14
    assert parse_row([*row, "--method", "supervised"]).run.out.parent.name == "paper-supervised"
    assert parse_row([*row, "--weights", "mine.pth"]).model.weights == "mine.pth"
    reference = parse_row(["--row", "gta5/dv2-imagenet/1-30", "--data", "d", "--all-labels"])
    assert reference.data.labelled == 1.0 and reference.run.out.parent.name == "paper-all-labels"
    assert reference.data.source_root is None and reference.method.method == "supervised"
    with pytest.raises(SystemExit):
        parse_row([*row, "--no-such-option"])


@pytest.mark.parametrize("name", rows())
def test_network_and_branch_of_a_row_at_full_size(name: str):
    """On the meta device, which has shapes only; `test_networks.py` has those of the maps at these crops."""
    row = rows()[name]
    config = row_config(RowOptions(name, Path("folder")))
    classes = {"cityscapes": 19, "voc": 21}[row.dataset]
    with torch.device("meta"):
        model = replace(config.model, pretrained=False)
        learner = build_learner(replace(config, model=model), classes, 255, row.target.labelled)
    network, branch = learner.network, learner.branch
    plus, coco = "dv3plus" in name, "coco" in name
    assert [len(stage) for stage in network.backbone.children() if isinstance(stage, nn.Sequential)] == (
        [3, 4, 6, 3] if plus else [3, 4, 23, 3]
    )
    assert type(network) is (DeepLabV3Plus if plus else DeepLabV2) and network.bgr == coco
    assert config.data.crop == {"cityscapes": 512, "voc": 321}[row.dataset]
    channels = 256 if plus else 2048
    last = network.classifier if plus else network.classifier.convs[1]
    assert last.weight.shape[:2] == (classes, channels)
    assert branch is not None and branch.memory.rows.shape == (classes, 256, 256)
    assert branch.project.first.weight.shape == (256, channels)
    assert branch.quota == max(1, round(256 / row.target.labelled))


# ---- which images are labelled


def test_split_seed_draws_the_labelled_images_apart_from_the_training_seed(tiny: FitConfig):
    train = open_dataset("folder", "train", tiny.data.root)
    drawn = [choose_labelled(train, replace(tiny.data, split_seed=split), seed=9) for split in (0, 1, None, 9)]
    assert drawn[0] != drawn[1] and drawn[2] == drawn[3]
    assert drawn[0] == choose_labelled(train, replace(tiny.data, split_seed=0), seed=5)


def test_split_files(tiny: FitConfig, tmp_path: Path):
    train = open_dataset("folder", "train", tiny.data.root)
    order = [7, 3, 11, *(index for index in range(12) if index not in (7, 3, 11))]
    (tmp_path / "split.pkl").write_bytes(pickle.dumps(np.array(order)))
    (tmp_path / "split.txt").write_text("\n".join(train.ids[index] for index in order[:3]))
    for name in ("split.pkl", "split.txt"):
        data = replace(tiny.data, split_file=tmp_path / name, split_seed=4, labelled=3)
        labelled, unlabelled = choose_labelled(train, data, seed=0)
        assert labelled == [3, 7, 11] and len(unlabelled) == 9
        assert choose_labelled(train, replace(data, labelled=0.25), seed=0) == (labelled, unlabelled)


def test_camvid_labels_the_same_share_of_every_sequence():
    ids = [f"Seq{number}_{frame:03d}" for number in range(3) for frame in range(8)]
    data = DataConfig(dataset="camvid", labelled=6, split_seed=3)
    chosen = choose_labelled(Items(ids), data, seed=0)
    assert chosen == split_labelled_by_sequence(ids, 6, 3)
    assert [sum(index // 8 == number for index in chosen[0]) for number in range(3)] == [2, 2, 2]


class Items(list):
    """Stands for a data set of which only the ids matter."""

    @property
    def ids(self) -> list[str]:
        return list(self)


# ---- two sources of labels


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    for kind in ("cityscapes", "gta5"):
        make_scenes(kind, root / kind, train=6, val=1, size=(48, 64))
    return root


@pytest.fixture
def adapting(tiny: FitConfig, scenes: Path) -> FitConfig:
    data = replace(tiny.data, dataset="cityscapes", root=scenes / "cityscapes", source_root=scenes / "gta5", labelled=4)
    return replace(tiny, data=data, method=replace(tiny.method, last_steps=2, memory_start=-1, confidence=0.0))


def moved(session: Session, step: int) -> Session:
    session.training.step = step
    return session


@pytest.mark.parametrize(("order", "sources"), [("alternate", (1, 3, 5)), ("last", (7,))])
def test_batches_take_turns_and_go_on_where_they_were(adapting: FitConfig, order: str, sources: tuple[int, ...]):
    config = replace(adapting, method=replace(adapting.method, source_steps=order))
    session = open_session(config)
    assert session.source is not None and len(session.source) == 6
    seed = config.optim.seed
    streams = {
        False: iter(Batches(session.train, session.labelled, 3, 32, seed, "labelled")),
        True: iter(Batches(session.source, range(6), 3, 32, seed, "source")),
    }
    expected = [next(streams[step in sources]) for step in range(8)]
    unlabelled = iter(Batches(session.train, session.unlabelled, 2, 32, seed, "unlabelled"))
    plain = [next(unlabelled) for _ in range(8)]
    for start in (0, 4, 7):
        batches = moved(session, start).batches()
        for step in range(start, 8):
            labelled, second = next(batches)
            assert torch.equal(labelled[0], expected[step][0]) and torch.equal(labelled[1], expected[step][1]), step
            assert second is not None and torch.equal(second[0], plain[step][0])


def test_only_the_target_is_counted_and_remembered(adapting: FitConfig):
    session = open_session(adapting)
    training, batches = session.training, session.batches()
    assert training.learner.branch is not None
    training.class_weights.label_batches = 99
    for step in range(8):
        rows_before = training.learner.branch.memory.rows.clone()
        seen = training.class_weights.seen["labels"]
        losses = training_step(training, *next(batches))
        source = step in (1, 3, 5)
        assert torch.equal(rows_before, training.learner.branch.memory.rows) == source, step
        assert training.class_weights.seen["labels"] == seen + (not source)
        assert ("contrast_labelled" in losses) == (step > 2)  # of both domains
