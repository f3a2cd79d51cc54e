"""The published data sets, on generated files in their layouts, and splits as files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import error_of, pixel_counts

from train.data import cityscapes, classes, voc
from train.data.batches import Batches
from train.data.datasets import open_dataset
from train.data.gta5 import open_gta5
from train.data.scenes.layouts import make_scenes

SIZE = (32, 48)
KINDS = ("cityscapes", "voc", "gta5", "camvid")


def make_camvid(root: Path) -> Path:
    """Three frames of two sequences; the label of frame i has the value i, a row of void and a row of class 10."""
    for split, names in (("train", ["0001TP_1", "0001TP_2", "Seq05VD_f1"]), ("val", ["0001TP_3", "0001TP_4"])):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir(parents=True)
        for i, name in enumerate(names):
            label = np.full(SIZE, i, np.uint8)
            label[0], label[1] = 11, 10
            Image.fromarray(np.full((*SIZE, 3), 10 * i, np.uint8)).save(root / split / f"{name}.jpg")
            Image.fromarray(label).save(root / f"{split}annot" / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("originals")
    roots = {kind: make_scenes(kind, folder / kind, 3, 2, SIZE) for kind in ("cityscapes", "voc", "gta5")}
    return {**roots, "camvid": make_camvid(folder / "camvid")}


@pytest.fixture
def roots(originals: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """A copy of each data set that a test may spoil."""
    return {kind: Path(shutil.copytree(root, tmp_path / kind)) for kind, root in originals.items()}


def first(root: Path, pattern: str) -> Path:
    return min(root.rglob(pattern))


IMAGES = {"cityscapes": "*_leftImg8bit.png", "voc": "*.jpg", "gta5": "images/*.png", "camvid": "train/*.jpg"}
LABELS = {
    "cityscapes": "train/*/*_labelIds.png", "voc": "SegmentationClassAug/*.png", "gta5": "labels/*.png",
    "camvid": "trainannot/*.png",
}  # fmt: skip

# --- what all have in common ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_face(originals: dict[str, Path], kind: str):
    for split, count in (("train", 3), ("val", 2)):
        dataset = open_dataset(kind, split, originals[kind])
        assert dataset.name == kind and len(dataset) == len(dataset.ids) == count and dataset.ids == sorted(dataset.ids)
        assert dataset.ignore_index == 255
        assert len(dataset.classes) == len(dataset.palette) == {"voc": 21, "camvid": 11}.get(kind, 19)
        assert len(set(dataset.classes)) == len(set(dataset.palette)) == len(dataset.classes)
        for index in range(count):
            image, label = dataset[index]
            assert image.shape == (3, *SIZE) and image.dtype == torch.uint8
            assert label.shape == SIZE and label.dtype == torch.int64
            assert ((label < len(dataset.classes)) | (label == 255)).all()
        assert pixel_counts(dataset).sum() > 0
    images, labels = next(iter(Batches(dataset, [0, 1], 2, 24, 0, "x")))
    assert images.shape == (2, 3, 24, 24) and labels.shape == (2, 24, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_image_and_label_belong_to_the_id(originals: dict[str, Path], kind: str):
    dataset = open_dataset(kind, "train", originals[kind])
    for index, item in enumerate(dataset.ids):
        path = next(path for path in originals[kind].rglob(IMAGES[kind]) if path.name.startswith(item))
        assert np.array_equal(dataset[index][0].permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))
    labels = [dataset[index][1] for index in range(3)]
    assert not torch.equal(labels[0], labels[1]) and not torch.equal(labels[1], labels[2])


@pytest.mark.parametrize("kind", KINDS)
def test_half_size_for_training_and_full_labels_for_evaluation(originals: dict[str, Path], kind: str):
    half, full = (open_dataset(kind, "train", originals[kind], scale) for scale in (0.5, 1.0))
    image, label = half[0]
    assert image.shape == (3, 16, 24) and label.shape == (16, 24)
    reference = Image.fromarray(full[0][0].permute(1, 2, 0).numpy()).resize((24, 16), Image.Resampling.BILINEAR)
    assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.asarray(reference).astype(int)).max() <= 2
    nearest = Image.fromarray(full[0][1].numpy().astype(np.uint8)).resize((24, 16), Image.Resampling.NEAREST)
    assert np.array_equal(label.numpy(), np.asarray(nearest))
    evaluated = open_dataset(kind, "val", originals[kind], 0.5)
    image, label = evaluated[1]
    assert image.shape == (3, 16, 24)
    assert torch.equal(label, open_dataset(kind, "val", originals[kind])[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_cache_keeps_what_was_read(roots: dict[str, Path], kind: str):
    dataset = open_dataset(kind, "train", roots[kind], 0.5)
    image, label = dataset[0]
    before = image.clone(), label.clone()
    image.zero_(), label.zero_()
    shutil.rmtree(roots[kind])
    assert all(torch.equal(a, b) for a, b in zip(dataset[0], before, strict=True))
    assert "cannot read" in error_of(lambda: dataset[1])


@pytest.mark.parametrize("kind", KINDS)
def test_folders_and_files_that_are_missing(roots: dict[str, Path], kind: str):
    def opened():
        return open_dataset(kind, "train", roots[kind])

    assert "nowhere" in error_of(lambda: open_dataset(kind, "train", roots[kind] / "nowhere"))
    assert f"'{kind}' needs a root" in error_of(lambda: open_dataset(kind, "train"))
    for scale in (0.0, -1.0, 1.5, float("nan")):
        assert f"scale {scale}" in error_of(lambda scale=scale: open_dataset(kind, "train", roots[kind], scale))
    label = first(roots[kind], LABELS[kind])
    label.unlink()
    message = error_of(opened)
    assert label.stem in message and ("no label" in message or "label missing" in message)
    shutil.rmtree(label.parent if kind != "cityscapes" else label.parents[3])
    assert str(roots[kind]) in error_of(opened)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["image", "label"])
def test_truncated_files(roots: dict[str, Path], kind: str, which: str):
    path = first(roots[kind], (IMAGES if which == "image" else LABELS)[kind])
    path.write_bytes(path.read_bytes()[:-40])
    message = error_of(lambda: pixel_counts(open_dataset(kind, "train", roots[kind])))
    assert path.stem.split("_gtFine")[0] in message and "truncated" in message


@pytest.mark.parametrize("kind", KINDS)
def test_image_and_label_of_different_size(roots: dict[str, Path], kind: str):
    path = first(roots[kind], LABELS[kind])
    Image.open(path).crop((0, 0, 30, 20)).save(path)
    message = error_of(lambda: pixel_counts(open_dataset(kind, "train", roots[kind])))
    assert path.stem in message and "size" in message


@pytest.mark.parametrize(
    ("kind", "value", "expected"), [("cityscapes", 34, "0 to 33"), ("cityscapes", 255, "0 to 33"),
                                    ("voc", 21, "0 to 20"), ("camvid", 12, "0 to 10")]
)  # fmt: skip
def test_label_values_that_the_data_set_lacks(roots: dict[str, Path], kind: str, value: int, expected: str):
    path = first(roots[kind], LABELS[kind])
    pixels = np.asarray(Image.open(path)).copy()
    pixels[5, 7] = value
    Image.fromarray(pixels).save(path)
    dataset = open_dataset(kind, "train", roots[kind])
    message = error_of(lambda: dataset[0])
    assert str(path) in message and f"values {value}:" in message and expected in message


def test_unknown_names_and_scale_of_other_data_sets():
    message = error_of(lambda: open_dataset("city", "train"))
    assert all(f"'{kind}'" in message for kind in (*KINDS, "folder", "landcover"))
    assert "'landcover'" in error_of(lambda: open_dataset("landcover", "train", scale=0.5))


# --- Cityscapes -------------------------------------------------------------------------------------------------------


def test_cityscapes_table_and_colours():
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    for value in range(256):
        expected = ids.index(value) if value in ids else 255 if value < 34 else -1
        assert cityscapes.TABLE[value] == expected, value
    names = dict(zip(classes.CITYSCAPES, classes.CITYSCAPES_PALETTE, strict=True))
    assert list(names)[:4] == ["road", "sidewalk", "building", "wall"] and list(names)[11:13] == ["person", "rider"]
    assert names["road"] == (128, 64, 128) and names["sky"] == (70, 130, 180) and names["bicycle"] == (119, 11, 32)
    assert names["train"] == (0, 80, 100) and names["terrain"] == (152, 251, 152) and names["car"] == (0, 0, 142)


def test_cityscapes_values_become_classes(roots: dict[str, Path]):
    path = first(roots["cityscapes"], LABELS["cityscapes"])
    values = np.resize(np.arange(34, dtype=np.uint8), SIZE)
    Image.fromarray(values).save(path)
    label = open_dataset("cityscapes", "train", roots["cityscapes"])[0][1].numpy()
    assert (label[values == 7] == 0).all() and (label[values == 33] == 18).all() and (label[values == 24] == 11).all()
    assert (label[np.isin(values, [0, 1, 3, 9, 10, 14, 18, 29, 30])] == 255).all()


def test_cityscapes_without_the_outer_folders(roots: dict[str, Path]):
    root = roots["cityscapes"]
    before = open_dataset("cityscapes", "train", root)
    for part in ("leftImg8bit", "gtFine"):
        (root / f"{part}_trainvaltest" / part).rename(root / part)
        (root / f"{part}_trainvaltest").rmdir()
    after = open_dataset("cityscapes", "train", root)
    assert after.ids == before.ids == [f"town{i}_{i:06d}_000019" for i in range(3)]
    shutil.rmtree(root / "leftImg8bit" / "train")
    (root / "leftImg8bit" / "train").mkdir()
    assert "no images" in error_of(lambda: open_dataset("cityscapes", "train", root))


# --- VOC --------------------------------------------------------------------------------------------------------------


def test_voc_classes_and_colours():
    names = dict(zip(classes.VOC, classes.VOC_PALETTE, strict=True))
    assert list(names)[:3] == ["background", "aeroplane", "bicycle"] and list(names)[15] == "person"
    assert names["background"] == (0, 0, 0) and names["aeroplane"] == (128, 0, 0) and names["person"] == (192, 128, 128)
    assert names["tvmonitor"] == (0, 64, 128)
    assert voc.TABLE.tolist() == [*range(21), *[-1] * 234, 255]


@pytest.mark.parametrize("place", ["train_aug.txt", "ImageSets/Segmentation/trainaug.txt", "../train_aug.txt"])
@pytest.mark.parametrize("line", ["{}", "/JPEGImages/{}.jpg /SegmentationClassAug/{}.png"])
def test_voc_lists(roots: dict[str, Path], place: str, line: str):
    base = roots["voc"] / "VOC2012"
    names = (base / "train_aug.txt").read_text().split()
    (base / "train_aug.txt").unlink()
    (base / place).parent.mkdir(parents=True, exist_ok=True)
    (base / place).write_text("\n".join(line.format(name, name) for name in reversed(names[:2])) + "\n")
    for root in (roots["voc"], base):
        assert open_dataset("voc", "train", root).ids == names[:2]
    (base / place).write_text(f"{names[0]}\n{names[0]}\n")
    assert "twice" in error_of(lambda: open_dataset("voc", "train", base))
    (base / place).write_text("2001_000001\n")
    assert "no image" in error_of(lambda: open_dataset("voc", "train", base))
    (base / place).unlink()
    assert "train_aug.txt" in error_of(lambda: open_dataset("voc", "train", base))


# --- GTA5 -------------------------------------------------------------------------------------------------------------


def test_gta5_colours_as_palette_in_any_order_and_as_rgb(roots: dict[str, Path]):
    labels = sorted((roots["gta5"] / "labels").iterdir())
    colours = [*classes.CITYSCAPES_PALETTE, (1, 2, 3), (0, 130, 180), (255, 255, 255), (0, 0, 0)]
    ids = np.array([*range(19), 255, 255, 255, 255])
    order = np.random.default_rng(0).permutation(len(colours))
    indices = np.resize(np.arange(len(colours), dtype=np.uint8), SIZE)
    picture = Image.fromarray(indices).convert("P")
    picture.putpalette([channel for i in order for channel in colours[i]])
    picture.save(labels[0])
    picture.convert("RGB").save(labels[1])
    dataset = open_dataset("gta5", "train", roots["gta5"])
    for index in (0, 1):
        assert np.array_equal(dataset[index][1].numpy(), ids[order][indices])
    content = [labels[index].read_bytes() for index in (0, 1)]
    pixel_counts(dataset)
    assert [labels[index].read_bytes() for index in (0, 1)] == content
    Image.fromarray(indices).save(labels[0])
    assert "'L'" in error_of(lambda: open_dataset("gta5", "train", roots["gta5"])[0])


def test_gta5_splits(roots: dict[str, Path]):
    root = roots["gta5"]
    assert open_dataset("gta5", "train", root).ids == ["00001", "00002", "00003"]
    assert open_dataset("gta5", "val", root).ids == ["12404", "12405"]
    (root / "train.txt").unlink()
    (root / "val.txt").unlink()
    assert len(open_dataset("gta5", "train", root)) == 5
    assert "val.txt is missing" in error_of(lambda: open_dataset("gta5", "val", root))
    (root / "split.mat").touch()
    assert "trainIds in split.mat" in error_of(lambda: open_dataset("gta5", "train", root))
    for kind in ("images", "labels"):
        (root / kind / "train").mkdir()
        (root / kind / "00002.png").rename(root / kind / "train" / "00002.png")
    assert open_dataset("gta5", "train", root).ids == ["00002"]


def test_gta5_lists_all_unreadable_pairs(roots: dict[str, Path]):
    root = roots["gta5"]
    for name in ("00002", "00003"):
        shutil.copy(root / "images" / "00001.png", root / "images" / f"{name}.png")
    (root / "images" / "00001.png").write_bytes(b"")
    path = root / "labels" / "00003.png"
    path.write_bytes(path.read_bytes()[:-3])
    message = error_of(lambda: open_gta5(root))
    assert "2 of 3" in message and "00001 (image not a picture)" in message and "00003 (label truncated)" in message
    (root / "images" / "00002.png").unlink()
    assert "00002 (image missing)" in error_of(lambda: open_gta5(root))
    Image.new("RGB", (10, 10)).save(root / "images" / "00002.png")
    assert "00002 (image and label of different size)" in error_of(lambda: open_gta5(root))


# --- CamVid -----------------------------------------------------------------------------------------------------------


def test_camvid_values_become_classes(originals: dict[str, Path]):
    dataset = open_dataset("camvid", "train", originals["camvid"])
    assert dataset.classes[:4] == ("sky", "building", "pole", "road") and dataset.classes[10] == "bicyclist"
    label = dataset[2][1]
    assert (label[0] == 255).all() and (label[1] == 10).all() and (label[2:] == 2).all()
