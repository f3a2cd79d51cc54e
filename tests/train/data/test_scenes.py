"""Generated scenes: the same pixels again, every class, and colours that do not tell the class."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from train_helpers import pixel_counts

from train.data.classes import VOC as CLASSES
from train.data.dataset import SegmentationDataset
from train.data.datasets import open_dataset
from train.data.scenes.canvas import Canvas
from train.data.scenes.layouts import make_scenes
from train.data.scenes.objects import ASPECTS, PLACES
from train.data.scenes.shapes import SHAPES, draw
from train.errors import UserError

COUNTS = {"cityscapes": 12, "voc": 20, "gta5": 12}
KINDS = tuple(COUNTS)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    return {kind: make_scenes(kind, folder / kind, train=COUNTS[kind], val=6) for kind in KINDS}


def items(dataset: SegmentationDataset) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_occurs_and_none_covers_all(roots: dict[str, Path], kind: str):
    train, val = (pixel_counts(open_dataset(kind, split, roots[kind])) for split in ("train", "val"))
    assert (train > 0).all() and train.max() / train.sum() < (0.85 if kind == "voc" else 0.35)
    assert kind == "voc" or (val > 0).all()
    for split, count in (("train", COUNTS[kind]), ("val", 6)):
        opened = open_dataset(kind, split, roots[kind])
        assert len(opened) == count and opened[0][1].shape == ((120, 160) if kind == "voc" else (128, 256))
    assert any((label == 255).any() for _, label in items(open_dataset(kind, "val", roots[kind])))


@pytest.mark.parametrize("kind", KINDS)
def test_scenes_depend_on_seed_and_number_only(roots: dict[str, Path], kind: str, tmp_path: Path):
    many = open_dataset(kind, "train", roots[kind])
    for name, seed, same in (("again", 0, True), ("other", 1, False), ("negative", -1, False)):
        make_scenes(kind, tmp_path / name, train=2, val=1, seed=seed)
        few = open_dataset(kind, "train", tmp_path / name)
        for item, (image, label) in zip(few.ids, items(few), strict=True):
            expected_image, expected_label = many[many.ids.index(item)]
            assert torch.equal(image, expected_image) == torch.equal(label, expected_label) == same
    assert not torch.equal(many[0][0], open_dataset(kind, "val", roots[kind])[0][0])


def test_colour_alone_does_not_tell_the_class(roots: dict[str, Path]):
    """A classifier by the nearest of 512 colours errs in most pixels of other images; knowing the place helps."""
    for kind in ("cityscapes", "gta5"):
        votes = np.zeros((2, 512 * 8, 256))
        right, total = np.zeros(2), 0
        for split in ("train", "val"):
            for image, label in items(open_dataset(kind, split, roots[kind])):
                codes = (image.long() // 32 * torch.tensor([64, 8, 1])[:, None, None]).sum(0).numpy()
                rows = np.broadcast_to(np.arange(label.shape[0])[:, None] * 8 // label.shape[0], label.shape)
                used = label.numpy() != 255
                truth = label.numpy()[used]
                for way, keys in enumerate((codes[used], (codes * 8 + rows)[used])):
                    if split == "train":
                        np.add.at(votes[way], (keys, truth), 1)
                    else:
                        right[way] += (votes[way].argmax(1)[keys] == truth).sum()
                total += len(truth) * (split == "val")
        assert right[0] / total < 0.5 and right[1] > 1.1 * right[0]


def test_the_game_looks_different(roots: dict[str, Path]):
    """A domain gap: the generated GTA5 is more saturated, for the same classes."""

    def saturation(kind: str) -> float:
        images = torch.stack([image for image, _ in items(open_dataset(kind, "train", roots[kind]))]).float()
        return float((images.amax(1) - images.amin(1)).mean())

    assert saturation("gta5") > 1.3 * saturation("cityscapes")


def test_scenes_are_quick_at_any_size(tmp_path: Path):
    start = time.process_time()
    make_scenes("cityscapes", tmp_path / "wide", train=4, val=1)
    assert time.process_time() - start < 5 * 0.3  # 0.045 s an image on a quiet core
    for number, size in enumerate(((32, 32), (200, 64), (33, 150))):
        for kind in KINDS:
            root = make_scenes(kind, tmp_path / f"{kind}{number}", train=2, val=1, size=size)
            assert open_dataset(kind, "train", root)[0][1].shape == size


def test_bad_requests(tmp_path: Path):
    for arguments, expected in (
        ({"kind": "ade"}, "'ade'"),
        ({"kind": "voc", "train": 0}, "0 + 6 images"),
        ({"kind": "voc", "size": (31, 64)}, "31x64"),
    ):
        with pytest.raises(UserError, match=expected.replace("+", r"\+")):
            make_scenes(root=tmp_path / "new", **arguments)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    with pytest.raises(UserError, match="not empty"):
        make_scenes("voc", tmp_path / "old")


def test_every_object_can_be_drawn():
    rng = np.random.default_rng(0)
    for name in SHAPES:
        picture, where = draw(rng, name, (40, 60), (0.5, 0.4, 0.3))
        assert picture.shape == (40, 60, 3) and where.shape == (40, 60)
        assert where.mean() > 0.1 and picture[where].max() > 0.05
        assert where[:8].any() and where[-8:].any() and where[:, :8].any() and where[:, -8:].any()  # fills its box
        draw(rng, name, (3, 2), (0.5, 0.4, 0.3))
    things = {thing for place in PLACES.values() for thing in place}
    assert things == set(ASPECTS) == set(CLASSES[1:]) and things <= set(SHAPES)


@pytest.mark.parametrize(("top", "left"), [(-2, -3), (4, 6), (-9, 0), (0, 9), (1, 1), (-1, 5)])
def test_pictures_are_cut_at_the_edges_of_the_canvas(top: int, left: int):
    rng = np.random.default_rng(0)
    picture, where = rng.random((3, 5, 3), np.float32), rng.random((3, 5)) < 0.7
    canvas = Canvas((5, 8))
    canvas.paste(picture, where, 7, top, left)
    for y, x in np.ndindex(5, 8):
        inside = 0 <= y - top < 3 and 0 <= x - left < 5 and where[y - top, x - left]
        assert canvas.label[y, x] == (7 if inside else 255)
        assert np.array_equal(canvas.image[y, x], picture[y - top, x - left] if inside else np.zeros(3))
