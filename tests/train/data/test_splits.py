"""Which images are labelled: by a seed, by sequences, by a file."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from train_helpers import error_of

from train.config import DataConfig, FitConfig
from train.data.datasets import open_dataset
from train.data.splits import choose_labelled, read_split, split_by_order, split_labelled, split_labelled_by_sequence


def test_split_is_a_seeded_nested_partition():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = split_labelled(100, 20, seed=3)
    random.random(), np.random.rand(), torch.rand(5)
    assert split_labelled(100, 20, seed=3) == first == split_labelled(100, 0.2, seed=3)
    assert split_labelled(100, 20, seed=4) != first
    labelled, unlabelled = first
    assert len(labelled) == 20 and sorted(labelled + unlabelled) == list(range(100))
    assert labelled == sorted(labelled) and labelled != list(range(20)) and unlabelled == sorted(unlabelled)
    assert set(labelled) < set(split_labelled(100, 50, seed=3)[0])


def test_draws_never_change():
    """Drawn once and written down: with another draw, earlier runs and their reports could not be repeated."""
    assert split_labelled(100, 8, seed=3)[0] == [8, 26, 27, 30, 35, 55, 86, 88]
    ids = [f"{sequence}_{frame:02d}" for sequence in "ab" for frame in range(20)]
    assert split_labelled_by_sequence(ids, 6, seed=3)[0] == [7, 11, 15, 30, 37, 38]


def test_split_counts_and_fractions():
    assert len(split_labelled(7, 1, 0)[0]) == 1 and split_labelled(7, 1.0, 0) == (list(range(7)), [])
    assert len(split_labelled(211, 1 / 20, 0)[0]) == 11 and len(split_labelled(9, 0.001, 0)[0]) == 1
    for wrong in (0, -1, 8, 0.0, 1.5, -0.5, float("nan")):
        assert str(wrong) in error_of(lambda wrong=wrong: split_labelled(7, wrong, 0))


def test_split_as_a_list_of_ids(tmp_path: Path):
    ids, path = [f"town_{i:03d}" for i in range(40)], tmp_path / "labelled.txt"
    labelled, unlabelled = split_labelled(40, 10, seed=3)
    path.write_text("\n".join(ids[index] for index in reversed(labelled)))
    order = read_split(path, ids)
    assert order == labelled[::-1]
    assert split_by_order(order, 40, len(order)) == (labelled, unlabelled)
    for count in (0, 11):
        assert "expected 1 to 10" in error_of(lambda count=count: split_by_order(order, 40, count))
    assert "'town_" in error_of(lambda: read_split(path, ids[:20]))
    path.write_text(f"{ids[1]}\n{ids[1]}\n")
    assert "twice" in error_of(lambda: read_split(path, ids))
    assert "missing" in error_of(lambda: read_split(tmp_path / "missing.txt", ids))


def test_sequences_are_labelled_evenly():
    ids = [f"a_{i:03d}" for i in range(60)] + [f"b_{i:03d}" for i in range(30)] + [f"c_{i:03d}" for i in range(10)]
    for count, expected in ((10, {"a": 6, "b": 3, "c": 1}), (50, {"a": 30, "b": 15, "c": 5})):
        labelled, unlabelled = split_labelled_by_sequence(ids, count, seed=1)
        assert Counter(ids[index][0] for index in labelled) == expected
        assert sorted(labelled + unlabelled) == list(range(100)) and labelled == sorted(labelled)
        assert labelled == split_labelled_by_sequence(ids, count / 100, seed=1)[0]
        assert labelled != split_labelled_by_sequence(ids, count, seed=2)[0]
    assert set(split_labelled_by_sequence(ids, 10, 1)[0]) < set(labelled)
    assert "101 labelled" in error_of(lambda: split_labelled_by_sequence(ids, 101, 1))


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
    """Stands for a data set of which only the name and the ids matter."""

    name = "camvid"

    @property
    def ids(self) -> list[str]:
        return list(self)
