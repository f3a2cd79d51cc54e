"""Batches: what they hold, that they resume anywhere, and that processes and loader processes share them."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import error_of

from train.data.batches import Batches
from train.data.dataset import SegmentationDataset
from train.data.datasets import open_dataset
from train.data.folder import open_folder
from train.errors import UserError


def take(batches: Batches, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(itertools.islice(batches, count))


def assert_same(first, second) -> None:
    assert len(first) == len(second) > 0
    for (images, masks), (other_images, other_masks) in zip(first, second, strict=True):
        assert torch.equal(images, other_images) and torch.equal(masks, other_masks)


@pytest.fixture(scope="module")
def landcover() -> SegmentationDataset:
    return open_dataset("landcover", "train")


def test_batches_shapes_and_content(landcover):
    for images, masks in take(Batches(landcover, range(30), 4, (48, 64), 0, "labelled"), 3):
        assert images.shape == (4, 3, 48, 64) and images.dtype == torch.uint8
        assert masks.shape == (4, 48, 64) and masks.dtype == torch.int64
        assert not (masks == 255).all()


def test_batches_resume_anywhere(landcover):
    """Also across epochs: 10 images in batches of 4 are 2 batches an epoch."""
    straight = take(Batches(landcover, range(10), 4, 32, 5, "labelled"), 9)
    for start in (0, 1, 2, 7):
        resumed = Batches(landcover, range(10), 4, 32, 5, "labelled", start=start)
        assert_same(take(resumed, 9 - start), straight[start:])


def test_batches_depend_on_seed_and_stream(landcover):
    base = take(Batches(landcover, range(40), 4, 32, 5, "labelled"), 2)
    for seed, stream in ((6, "labelled"), (5, "unlabelled"), (-1, "labelled")):
        other = take(Batches(landcover, range(40), 4, 32, seed, stream), 2)
        assert not all(torch.equal(a[0], b[0]) for a, b in zip(base, other, strict=True))


def test_batches_are_the_same_with_workers_and_leave_the_global_state_alone(landcover):
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    alone = take(Batches(landcover, range(20), 3, 40, 1, "u", start=4), 5)
    shared = take(Batches(landcover, range(20), 3, 40, 1, "u", start=4, workers=2), 5)
    assert_same(alone, shared)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1]) and random.getstate() == states[2]
    torch.manual_seed(99)
    assert_same(alone, take(Batches(landcover, range(20), 3, 40, 1, "u", start=4), 5))


def test_every_epoch_is_a_permutation(landcover):
    indices = [3, 14, 15, 92, 65, 35]
    batches = Batches(landcover, indices, 2, 32, 0, "x")
    epochs = [[index for i in range(3) for _, index in batches.samples(epoch * 3 + i)] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(indices) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    numbers = [number for i in range(6) for number, _ in batches.samples(i)]
    assert numbers == list(range(12))


def test_incomplete_batch_is_dropped_and_small_sets_repeat(landcover):
    batches = Batches(landcover, range(5), 2, 32, 0, "x")
    for epoch in range(3):
        order = [index for i in range(2) for _, index in batches.samples(2 * epoch + i)]
        assert len(set(order)) == 4
    small = Batches(landcover, [7, 8, 9], 7, 32, 0, "x")
    for number in range(4):
        drawn = [index for _, index in small.samples(number)]
        assert len(drawn) == 7 and sorted(drawn[:3]) == sorted(drawn[3:6]) == [7, 8, 9] and drawn[6] in (7, 8, 9)
    assert len(take(Batches(landcover, [7], 3, 32, 0, "x"), 2)[0][0]) == 3
    doubled = Batches(landcover, range(30), 60, 32, 0, "x")
    orders = [[index for _, index in doubled.samples(number)] for number in range(3)]
    assert len({tuple(half) for order in orders for half in (order[:30], order[30:])}) == 6


def test_crops_move_and_cut_image_and_mask_alike(small_folder: Path):
    """The mask is written into the image, so any misalignment shows; the image is unique in every pixel."""
    codes = np.arange(240, dtype=np.uint8).reshape(12, 20)
    mask = (codes % 3).astype(np.uint8)
    Image.fromarray(np.stack([codes, mask, codes], -1)).save(small_folder / "images" / "a.png")
    Image.fromarray(mask).save(small_folder / "masks" / "a.png")
    dataset = open_dataset("folder", "train", small_folder)
    corners = set()
    for images, masks in take(Batches(dataset, [0], 2, (5, 6), 0, "x"), 60):
        assert torch.equal(images[:, 1].long(), masks)
        for image in images[:, 0].long():
            assert (image[:, 1:] - image[:, :-1] == 1).all() and (image[1:] - image[:-1] == 20).all()
            corners.add(int(image[0, 0]))
    rows, columns = {corner // 20 for corner in corners}, {corner % 20 for corner in corners}
    assert rows == set(range(8)) and columns == set(range(15))


def test_small_images_are_padded(small_folder: Path):
    dataset = open_dataset("folder", "train", small_folder)
    image, mask = dataset[0]
    images, masks = take(Batches(dataset, [0], 1, (16, 20), 0, "x"), 1)[0]
    assert torch.equal(images[0, :, :12], image) and torch.equal(masks[0, :12], mask)
    assert (images[0, :, 12:] == 0).all() and (masks[0, 12:] == 255).all()
    images, masks = take(Batches(dataset, [0], 1, 24, 0, "x"), 1)[0]
    assert images.shape == (1, 3, 24, 24) and (masks[0, :, 20:] == 255).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_file_arrives_as_one_line(small_folder: Path, workers: int):
    (small_folder / "masks" / "a.png").write_bytes(b"")
    dataset = open_dataset("folder", "train", small_folder)
    message = error_of(lambda: take(Batches(dataset, [0, 1], 2, 8, 0, "x", workers=workers), 1))
    assert message.startswith("cannot read mask")


def test_batches_refuse_nothing_to_read(landcover):
    assert "unlabelled" in error_of(lambda: Batches(landcover, [], 2, 32, 0, "unlabelled"))
    assert "batch size 0" in error_of(lambda: Batches(landcover, [1], 0, 32, 0, "x"))
    assert "crop size 0" in error_of(lambda: Batches(landcover, [1], 1, 0, 0, "x"))


def test_parts_of_a_batch_make_the_whole(folder: Path):
    def batches(number: int = 0, world: int = 1) -> Batches:
        data = open_folder(folder, "train")
        return Batches(data, range(12), 4, 16, 0, "x", start=2, rank=number, world_size=world)

    whole, *parts = (next(iter(stream)) for stream in (batches(), batches(0, 2), batches(1, 2)))
    assert all(torch.equal(torch.cat(pair), of_whole) for *pair, of_whole in zip(*parts, whole, strict=True))
    with pytest.raises(UserError, match="3 processes cannot share x batches of 4 images equally: give a multiple of 3"):
        batches(0, 3)


def test_loader_processes_go_on_after_an_interrupt(folder: Path):
    """Ctrl-C reaches all processes, and torchrun passes it on to all."""
    others = set(multiprocessing.active_children())  # loaders of earlier tests that are not collected yet
    stream = iter(Batches(open_folder(folder, "train"), range(12), 4, 16, 0, "x", workers=1))
    next(stream)
    (loader,) = set(multiprocessing.active_children()) - others
    assert loader.pid is not None
    os.kill(loader.pid, signal.SIGINT)
    for _ in range(10):
        next(stream)
    assert loader.is_alive()
