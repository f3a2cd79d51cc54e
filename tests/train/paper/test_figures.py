"""The supplement's figures: exact colours in the files, who stands in which column, pages that hold all rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from train_helpers import TINY_OPTIONS

from train.command_line import main
from train.config import FitConfig
from train.data.classes import CAMVID_PALETTE
from train.data.datasets import open_dataset
from train.data.scenes.layouts import make_scenes
from train.evaluate import evaluate, load_learners, predict
from train.loop import fit
from train.models import build_learner
from train.paper import figures as figures_module
from train.paper.figures import choose_images, prediction_row
from train.paper.introspection import MemoryRows, attention_map
from train.paper.pages import (
    GAP,
    LINE,
    MARGIN,
    Row,
    colour,
    compose,
    draw_memory_plane,
    fitted,
    heat_map,
    pages,
    weight_colours,
)
from train.scores import percent

SIZE = (64, 128)  # of the scenes, which a page shows 3.75 times as large


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes("cityscapes", tmp_path_factory.mktemp("scenes") / "cityscapes", train=8, val=3, size=SIZE)


@pytest.fixture(scope="module")
def runs(scenes: Path) -> Path:
    """Folder with a run of the whole method on images of half size, and one with all labels on images as they are."""
    options = ["--dataset", "cityscapes", "--root", str(scenes), "--crop", "32", "--labelled-batch", "3"]
    options += ["--unlabelled-batch", "2", *TINY_OPTIONS, "--memory-rows", "8", "--memory-start", "0"]
    options += ["--contrast-start", "1", "--confidence", "0.01", "--steps", "4", "--lr", "0.1"]
    out = scenes.parent
    assert main(["fit", "--out", str(out / "ours"), *options, "--scale", "0.5", "--labelled", "4"]) == 0
    assert main(["fit", "--out", str(out / "all"), *options, "--method", "supervised", "--labelled", "1.0"]) == 0
    return out


# ---- the command


def enlarged(picture: Tensor) -> Tensor:
    """The nearest pixels of a picture [h, w, ...], on 240 x 480."""
    rows, columns = (
        (torch.arange(new) + 0.5) * old // new for new, old in zip((240, 480), picture.shape, strict=False)
    )
    return picture[rows.long()][:, columns.long()]


def test_command_draws_every_column_at_its_place_in_exact_colours(
    runs: Path, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    titles: list[list[str]] = []
    draw_page = figures_module.draw_page

    def spy(path: Path, columns: list[str], *rest) -> None:
        titles.append(columns)
        draw_page(path, columns, *rest)

    monkeypatch.setattr(figures_module, "draw_page", spy)
    ours, reference = runs / "ours" / "last.pt", runs / "all" / "best.pt"
    command = ["figures", str(ours), "--reference", str(reference), "--network", "teacher", "--attention", "--memory"]
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path), "--device", "cpu"]) == 0
    names = ["predictions-1.png", "attention-1.png", "memory.png"]
    assert capsys.readouterr().out.splitlines() == [f"picture: {tmp_path / name}" for name in names]
    assert titles[0] == ["image", "ours (teacher)\n4 of 8 labelled", "fully supervised", "labels"]

    page = np.asarray(Image.open(tmp_path / names[0]).convert("RGB"))
    grid = 3 * 240 + 2 * GAP
    assert page.shape == (3 * LINE + grid + 4 * LINE, 2 * MARGIN + 4 * 480 + 3 * GAP, 3)  # 3 lines of classes
    half, whole = (open_dataset("cityscapes", "val", scenes, scale) for scale in (0.5, 1.0))
    networks = [load_learners(ours)[0]["teacher"].eval(), load_learners(reference)[0]["student"].eval()]
    table = torch.tensor([*half.palette, *[(9, 9, 9)] * 237])
    table[255] = 0  # ignored pixels are black
    ignored = 0
    for index in range(3):
        labels = half[index][1]
        ignored += int((labels == 255).sum())
        # each network sees the images at the size that it was trained on, and answers at that of the labels
        maps = [predict(net, data[index][0], SIZE) for net, data in zip(networks, (half, whole), strict=True)]
        assert labels.shape == maps[0].shape == (64, 128) and half[index][0].shape[1:] == (32, 64)
        expected = [enlarged(table[classes]) for classes in (*maps, labels)]
        expected.insert(0, F.interpolate(half[index][0][None], (240, 480), mode="bilinear")[0].permute(1, 2, 0))
        for column, picture in enumerate(expected):
            top, left = 3 * LINE + index * (240 + GAP), MARGIN + column * (480 + GAP)
            shown = page[top : top + 240, left : left + 480]
            # antialiasing and plain bilinear agree where images grow, up to rounding
            assert np.abs(shown.astype(int) - picture.numpy()).max() <= (column == 0), (index, column)
    assert ignored > 0 and len({tuple(expected[1].flatten().tolist()), tuple(expected[2].flatten().tolist())}) == 2

    attention = np.asarray(Image.open(tmp_path / names[1]).convert("RGB"))
    # narrower, so a line more of classes; and the bar of weights
    assert attention.shape == (3 * LINE + grid + 9 * LINE, 2 * MARGIN + 3 * 480 + 2 * GAP, 3)
    maps = [attention_map(networks[0], half[index][0]) for index in range(3)]
    colours = weight_colours([weights for _, weights in maps])
    for index, (classes, weights) in enumerate(maps):
        image = fitted(half[index][0], SIZE)
        expected = [image.permute(1, 2, 0), enlarged(table[classes]), heat_map(image, enlarged(weights), colours)]
        for column, picture in enumerate(expected):
            top, left = 3 * LINE + index * (240 + GAP), MARGIN + column * (480 + GAP)
            assert np.array_equal(attention[top : top + 240, left : left + 480], picture), (index, column)
    assert np.asarray(Image.open(tmp_path / names[2])).shape[:2] == (960, 1344)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main(["figures", *arguments, "--device", "cpu"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_bad_requests_are_one_line(runs: Path, tiny: FitConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ours, labels_only, out = str(runs / "ours" / "last.pt"), str(runs / "all" / "last.pt"), str(tmp_path / "out")
    assert "has no contrast branch" in refused([labels_only, "--attention", "--out", out], capsys)
    assert "has no contrast branch" in refused([labels_only, "--reference", ours, "--memory", "--out", out], capsys)
    assert "has no teacher" in refused([labels_only, "--network", "teacher", "--out", out], capsys)
    assert "--count is 0" in refused([ours, "--count", "0", "--out", out], capsys)
    assert "no image 'munich' in this split of cityscapes" in refused(
        [ours, "--images", "munich", "--out", out], capsys
    )
    assert "nowhere.pt does not exist" in refused([ours, "--reference", "nowhere.pt", "--out", out], capsys)
    other = replace(tiny, method=replace(tiny.method, memory_start=99), run=replace(tiny.run, evaluate_every=99))
    fit(replace(other, optim=replace(other.optim, steps=2)))
    last = str(tiny.run.out / "last.pt")
    message = refused([ours, "--reference", last, "--out", out], capsys)
    assert last in message and "['sky', 'grass', 'brick']" in message and "'sidewalk'" in message
    assert not Path(out).exists()
    assert "the memory is empty" in refused([last, "--memory", "--out", out], capsys)


def test_images_are_chosen_by_name_or_evenly_spaced(scenes: Path):
    data = open_dataset("cityscapes", "train", scenes)
    assert choose_images(data, (data.ids[5], data.ids[2]), 20) == [5, 2]
    assert choose_images(data, (), 4) == [1, 3, 5, 7] and choose_images(data, (), 20) == list(range(8))
    assert choose_images(data, (), 1) == [4] and choose_images(data, (), 3) == [1, 4, 6]


# ---- pages


def test_ignored_pixels_are_white_where_black_is_a_class(tiny: FitConfig, tmp_path: Path):
    data = open_dataset("voc", "val", make_scenes("voc", tmp_path / "voc", train=1, val=1, size=(120, 160)))
    learner = build_learner(tiny, 21, 255, 6).eval()
    row = prediction_row([(learner, data)] * 2, 0)
    image, prediction, _, picture = row.pictures
    miou = percent(evaluate({"student": learner}, data)["student"].miou)  # of the only image
    assert row.note == f"IoU {miou} | {miou} %"
    labels = fitted(data[0][1], (120, 160))
    assert image.shape == prediction.shape == picture.shape == (320, 427, 3) and labels.shape == (320, 427)
    assert (labels == 255).any() and (labels == 0).any() and (picture[labels == 255] == 255).all()
    assert (picture[labels == 0] == 0).all() and not (prediction == 255).all(-1).any()
    for name, palette in (("camvid", CAMVID_PALETTE), ("a folder with white", ((255, 255, 255), (1, 1, 1)))):
        data.palette = palette
        assert data.ignore_colour == (0, 0, 0), name


def test_pictures_keep_their_aspect_and_classes():
    assert fitted(torch.zeros(3, 1024, 2048, dtype=torch.uint8), (1024, 2048)).shape == (3, 240, 480)
    assert fitted(torch.zeros(3, 512, 1024, dtype=torch.uint8), (1024, 2048)).shape == (3, 240, 480)
    assert fitted(torch.zeros(500, 375), (500, 375)).shape == (320, 240)  # upright, as some of VOC
    shrunk = fitted(torch.tensor([[3, 9], [4, 200]]).repeat_interleave(320, 0).repeat_interleave(480, 1), (640, 960))
    assert shrunk.shape == (320, 480) and [
        shrunk[row, column].item() for row in (159, 160) for column in (239, 240)
    ] == [
        3,
        9,
        4,
        200,
    ]
    stripes = torch.tensor([0, 255, 255, 0], dtype=torch.uint8).repeat(3, 320, 480)
    assert ((fitted(stripes, (320, 1920))[:, :, 5:-5].int() - 127).abs() <= 1).all()  # shrunk by 4 they become grey


def test_pages_hold_all_rows_in_order():
    def rows(height: int, count: int) -> list[Row]:
        return [Row(str(number), [np.zeros((height, 2, 3), np.uint8)]) for number in range(count)]

    for height, count, expected in ((240, 20, [10, 10]), (320, 20, [6, 7, 7]), (240, 11, [5, 6]), (320, 1, [1])):
        split = pages(rows(height, count))
        assert [len(page) for page in split] == expected
        assert [row.name for page in split for row in page] == [str(number) for number in range(count)]


def test_rows_of_different_sizes_are_centred_on_white():
    wide, upright = np.full((40, 300, 3), 7, np.uint8), np.full((60, 100, 3), 8, np.uint8)
    grid, columns, rows = compose([Row("wide", [wide, wide]), Row("upright", [upright, upright])])
    assert grid.shape == (40 + GAP + 60, 2 * 300 + GAP, 3) and columns == [150, 450 + GAP] and rows == [20, 70 + GAP]
    assert (grid == 7).all(-1).sum() == wide[..., 0].size * 2 and (grid[:40, :300] == 7).all()
    assert (grid[40 + GAP :, 100:200] == 8).all() and (grid[40 + GAP :, 400 + GAP : 500 + GAP] == 8).all()
    rest = (grid == 255).all(-1).sum() + 2 * (wide[..., 0].size + upright[..., 0].size)
    assert rest == grid[..., 0].size


def test_heat_map_tints_what_differs_from_the_average():
    image = torch.full((3, 1, 5), 255, dtype=torch.uint8)
    weights = torch.tensor([[0.2, 1.0, torch.nan, 3.0, 1000.0]])
    heat = heat_map(image, weights, weight_colours([weights[:, :4], torch.ones(1000)])).astype(int)[0]
    assert heat.shape == (5, 3) and (heat[1:3].max(1) - heat[1:3].min(1) <= 1).all()
    assert heat[0, 2] > heat[0, 0] + 50 and heat[3, 0] > heat[3, 2] + 50 and (heat[4] == heat[3]).all()
    dark = heat_map(image * 0, weights, weight_colours([weights[:, :4]])).astype(int)[0]
    assert (dark[1] < heat[1]).all() and dark[3, 0] > dark[3, 2]
    assert weight_colours([torch.full((2, 2), torch.nan)]).get_clim() == (0.99, 1.01)


def test_memory_is_drawn_in_the_colours_of_the_classes(scenes: Path, tmp_path: Path):
    data = open_dataset("cityscapes", "val", scenes)
    rows = torch.eye(3, dtype=torch.float64)

    def areas(weights: list[float]) -> list[int]:
        memory = MemoryRows(rows, torch.tensor([0, 1, 8]), torch.tensor(weights, dtype=torch.float64))
        draw_memory_plane(tmp_path / "memory.png", memory, data)
        page = np.asarray(Image.open(tmp_path / "memory.png").convert("RGB"))[:, :1000]  # without the legend
        return [int((page == np.array(data.palette[label])).all(-1).sum()) for label in (0, 1, 8, 13)]

    alike, heavier = areas([1, 1, 1]), areas([1, 1, 40])
    assert min(alike[:3]) > 20 and alike[3] == heavier[3] == 0
    assert heavier[2] > 10 * alike[2] and heavier[:2] == alike[:2]


def test_colours():
    palette = ((1, 2, 3), (4, 5, 6))
    picture = colour(torch.tensor([[0, 1], [255, 0]]), palette, (7, 8, 9))
    assert picture.tolist() == [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [1, 2, 3]]]
