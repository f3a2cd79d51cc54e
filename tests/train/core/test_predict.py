"""The command predict: the classes that the network gives, in the colours of the data set; and its errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.command_line import main
from train.config import DataConfig, FitConfig
from train.data.classes import CAMVID_PALETTE
from train.data.files import read_image
from train.evaluate import load_learners, predict
from train.predict import palette_of
from train.scores import Scores

Run = tuple[FitConfig, dict[str, Scores]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images of different sizes and kinds, and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("a.png", (40, 60)), ("b.jpg", (33, 20)), ("c.JPEG", (64, 64))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_maps_have_the_classes_colours_and_sizes(network: str, finished_once: Run, images: Path, tmp_path: Path):
    last, out = finished_once[0].run.out / "last.pt", tmp_path / "maps"
    command = ["predict", str(last), str(images), str(out), "--overlay", "--network", network, "--device", "cpu"]
    assert main(command) == 0
    assert sorted(file.name for file in out.iterdir()) == ["a.png", "b.png", "c.png", "overlay"]
    learner = load_learners(last)[0][network]
    palette = np.array([(90, 160, 220), (60, 160, 60), (180, 70, 50)])  # of classes.txt
    for file in images.iterdir():
        if file.suffix == ".txt":
            continue
        image = read_image(file)
        written, expected = Image.open(out / f"{file.stem}.png"), predict(learner, image).numpy()
        assert written.mode == "P" and np.array_equal(np.asarray(written), expected)
        assert np.array_equal(np.asarray(written.convert("RGB")), palette[expected])
        mixed = (image.permute(1, 2, 0).numpy() + palette[expected]) / 2
        overlay = np.asarray(Image.open(out / "overlay" / f"{file.stem}.png"))
        assert np.abs(overlay - mixed).max() <= 1


def test_one_file_at_another_scale(finished_once: Run, images: Path, tmp_path: Path):
    command = ["predict", str(finished_once[0].run.out / "best.pt"), str(images / "a.png"), str(tmp_path / "maps")]
    assert main([*command, "--scale", "0.5", "--device", "cpu"]) == 0
    (file,) = (tmp_path / "maps").iterdir()
    assert Image.open(file).size == (60, 40)


def test_a_bad_image_is_one_line_and_the_others_are_done(
    finished_once: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    whole = (images / "b.jpg").read_bytes()
    (images / "b.jpg").write_bytes(whole[: len(whole) // 2])
    command = ["predict", str(finished_once[0].run.out / "last.pt"), str(images), str(tmp_path / "maps")]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--device", "cpu"])
    assert stop.value.code == "images that could not be read: 1 of 3"  # Python prints it and exits with 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cannot read" in line]
    assert str(images / "b.jpg") in line
    assert sorted(file.name for file in (tmp_path / "maps").iterdir()) == ["a.png", "c.png"]


def test_bad_requests_are_one_line(
    finished_once: Run, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    last = str(finished_once[0].run.out / "last.pt")

    def refused(*arguments: str) -> str:
        assert main(["predict", *arguments, "--device", "cpu"]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "maps")
    assert "no PNG or JPEG files in" in refused(last, str(tmp_path / "empty"), out)
    assert "would replace the images there" in refused(last, str(images), str(images))
    assert "would replace the images there" in refused(last, str(images / "a.png"), str(images))
    assert "scale 2.0: expected above 0" in refused(last, str(images), out, "--scale", "2")
    assert "does not exist" in refused(str(tmp_path / "no.pt"), str(images), out)
    (images / "a.jpg").write_bytes((images / "b.jpg").read_bytes())
    assert "are called 'a'" in refused(last, str(images), out)
    assert not Path(out).exists()
    (tmp_path / "file").write_text("")
    assert "results cannot be written" in refused(last, str(images / "c.JPEG"), str(tmp_path / "file"))


def test_colours_come_from_the_data_set(tmp_path: Path):
    assert palette_of(DataConfig("camvid"), 11) == CAMVID_PALETTE
    assert len(palette_of(DataConfig("landcover"), 5)) == 5
    assert palette_of(DataConfig("folder", tmp_path / "gone"), 2) == ((128, 0, 0), (0, 128, 0))
