"""Cached features of a frozen encoder: what is written, and that a head trains on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_helpers import error_of

from train.config import FitConfig
from train.data.datasets import open_dataset
from train.data.features import FeaturesConfig, make_features, read_meta
from train.loop import fit
from train.networks import timm_deeplab


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(timm_deeplab, "load_imagenet_weights", lambda classifier, name: None)
    torch.manual_seed(0)
    config = FeaturesConfig("folder", tmp_path / "cached", folder, encoder="test_efficientnet", maps=(1, 2))
    assert make_features(config).endswith("for 12 train, 3 val images")
    return config.out


def test_features_are_standardised_and_keep_ids_and_labels(cached: Path, folder: Path):
    images = open_dataset("folder", "train", folder)
    data = open_dataset("features", "train", cached)
    channels = read_meta(cached)["channels"]
    assert data.ids == images.ids and data.classes == images.classes and len(data) == 12
    maps = torch.stack([data[index][0] for index in range(12)]).float()
    assert maps.shape[1] == channels
    torch.testing.assert_close(maps.mean((0, 2, 3)), torch.zeros(channels), atol=2e-3, rtol=0)
    height, width = maps.shape[2:]
    for index in (0, 7):
        label, whole = data[index][1], images[index][1]
        assert label.shape == (height, width)
        rows = [row * whole.shape[0] // height + whole.shape[0] // height // 2 for row in range(height)]
        columns = [column * whole.shape[1] // width + whole.shape[1] // width // 2 for column in range(width)]
        assert torch.equal(label, whole[rows][:, columns])
    assert torch.equal(open_dataset("features", "val", cached)[2][1], open_dataset("folder", "val", folder)[2][1])


def test_a_head_trains_on_them_with_all_parts(cached: Path, tiny: FitConfig):
    channels = read_meta(cached)["channels"]
    config = replace(
        tiny,
        data=replace(tiny.data, dataset="features", root=cached, crop=8),
        model=replace(tiny.model, network="head", in_channels=channels),
    )
    scores = fit(config)
    assert 0 < scores["student"].miou < 1 and "teacher" in scores


def test_missing_features_are_one_error(tmp_path: Path, cached: Path):
    assert "run python -m train features" in error_of(lambda: open_dataset("features", "train", tmp_path))
    (cached / "train.pt").write_bytes(b"no tensors")
    assert "train.pt cannot be read" in error_of(lambda: open_dataset("features", "train", cached))
