"""The pixel and region queues against plain loops over images, classes and pixels."""

from __future__ import annotations

from operator import itemgetter

import pytest
import torch
from torch import Tensor

from pixcontrast import ClassMemory, PixelContrastLoss
from pixcontrast.queues import PixelQueues, region_rows
from pixcontrast.reference import unit_rows

CLASSES, DIM = 4, 3


def make_batch(images: int = 2) -> tuple[Tensor, Tensor]:
    """A map and labels at twice its resolution; pixels of no class are NaN."""
    embedding = torch.randn(images, DIM, 4, 5, dtype=torch.float64)
    labels = torch.randint(-1, CLASSES + 1, (images, 4, 5))
    if torch.rand(()) < 0.5:
        labels[labels == 2] = 255  # not every class in every batch
    nowhere = (labels < 0) | (labels >= CLASSES)
    embedding = torch.where(nowhere[:, None], float("nan"), embedding)
    return embedding, labels.repeat_interleave(2, 1).repeat_interleave(2, 2)


def newest_first(queue: ClassMemory, c: int) -> Tensor:
    count, cursor = int(queue.counts[c]), int(queue.cursors[c])
    return queue.rows[c, [(cursor - 1 - k) % queue.capacity for k in range(count)]]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("size", "quota"), [(7, 3), (2, 5), (40, 1), (1, 1)])
def test_paper_variant(seed: int, size: int, quota: int) -> None:
    torch.manual_seed(seed)
    queues = PixelQueues(CLASSES, size, DIM, quota, dtype=torch.float64)
    regions: list[list[Tensor]] = [[] for _ in range(CLASSES)]  # newest first
    pixels: list[list[Tensor]] = [[] for _ in range(CLASSES)]
    for step in range(5):
        embedding, labels = make_batch(images=3)
        queues.update(embedding, labels, torch.Generator().manual_seed(step))
        small = labels[:, ::2, ::2]
        chance = torch.rand(small.shape, generator=torch.Generator().manual_seed(step))
        for c in range(CLASSES):
            chosen = []
            for b in range(3):
                members = [(i, j) for i in range(4) for j in range(5) if small[b, i, j] == c]
                if members:
                    mean = torch.stack([embedding[b, :, i, j] for i, j in members]).mean(0)
                    regions[c] = [mean / mean.norm(), *regions[c]][:size]
                drawn = sorted(((float(chance[b, i, j]), embedding[b, :, i, j]) for i, j in members), key=itemgetter(0))
                chosen += drawn[-quota:]
            chosen.sort(key=itemgetter(0), reverse=True)
            pixels[c] = ([row / row.norm() for _, row in chosen] + pixels[c])[:size]
    for queue, lists in ((queues.regions, regions), (queues.pixels, pixels)):
        assert queue.counts.tolist() == [len(rows) for rows in lists]
        for c, rows in enumerate(lists):
            if rows:
                torch.testing.assert_close(newest_first(queue, c), torch.stack(rows), rtol=1e-12, atol=1e-14)


class ReleasedLists:
    """The queue update of the released code, pixel by pixel."""

    def __init__(self, queues: PixelQueues) -> None:
        self.size, self.freq, self.stride = queues.pixels.capacity, queues.pixels_per_class, queues.stride
        self.region, self.pixel = queues.regions.rows.clone(), queues.pixels.rows.clone()
        self.region_ptr, self.pixel_ptr = [0] * CLASSES, [0] * CLASSES

    def update(self, embedding: Tensor, labels: Tensor, generator: torch.Generator) -> None:
        for features, label in zip(embedding, labels, strict=True):
            flat = features.reshape(DIM, -1)
            rows, columns = (range(0, size, self.stride) for size in label.shape)
            ids = [int(label[i, j]) for i in rows for j in columns]
            for c in range(1, CLASSES):  # class 0 is left out
                places = [place for place, value in enumerate(ids) if value == c]
                if not places:
                    continue
                self.region[c, self.region_ptr[c]] = unit_rows(sum(flat[:, p] for p in places) / len(places))
                self.region_ptr[c] = (self.region_ptr[c] + 1) % self.size
                # numbers below the count of the pixels, used as places on the map
                wrong = torch.randperm(len(places), generator=generator)[: self.freq].tolist()
                start, count = self.pixel_ptr[c], len(wrong)
                if start + count >= self.size:
                    start, self.pixel_ptr[c] = self.size - count, 0
                else:
                    self.pixel_ptr[c] = start + 1  # by one, not by count
                for k, place in enumerate(wrong):
                    self.pixel[c, start + k] = unit_rows(flat[:, place])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("size", "quota", "stride"), [(7, 3, 2), (7, 3, 3), (40, 4, 2), (3, 3, 2), (2, 1, 2)])
def test_released_variant(seed: int, size: int, quota: int, stride: int) -> None:
    torch.manual_seed(seed)
    queues = PixelQueues(CLASSES, size, DIM, quota, "released", stride, dtype=torch.float64)
    lists = ReleasedLists(queues)
    for queue in queues.parts():
        assert queue.counts.tolist() == [size] * CLASSES
        torch.testing.assert_close(queue.rows.norm(dim=2), torch.ones(CLASSES, size, dtype=torch.float64))
    for step in range(6):
        embedding, labels = make_batch()
        embedding = embedding.nan_to_num()
        queues.update(embedding, labels, torch.Generator().manual_seed(step))
        lists.update(embedding, labels, torch.Generator().manual_seed(step))
    torch.testing.assert_close(queues.regions.rows, lists.region, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(queues.pixels.rows, lists.pixel, rtol=1e-12, atol=1e-14)
    assert queues.regions.cursors.tolist() == lists.region_ptr and queues.pixels.cursors.tolist() == lists.pixel_ptr


def test_released_variant_takes_no_more_pixels_than_the_queue_holds() -> None:
    queues = PixelQueues(2, 4, DIM, 10, "released", 1)
    queues.update(torch.randn(1, DIM, 4, 5), torch.ones(1, 4, 5, dtype=torch.int64))  # theirs stops here
    assert queues.pixels.cursors.tolist() == [0, 0] and queues.pixels.rows.isfinite().all()


def test_regions_are_those_of_each_image() -> None:
    embedding, labels = make_batch()
    rows, classes = region_rows(embedding, labels[:, ::2, ::2], CLASSES)
    assert rows.shape == (2 * CLASSES, DIM)
    for b in range(2):
        for c in range(CLASSES):
            member = labels[b, ::2, ::2] == c
            assert classes[b * CLASSES + c] == (c if member.any() else -1)
            torch.testing.assert_close(rows[b * CLASSES + c], embedding[b][:, member].sum(1))


def test_half_precision_maps_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    embedding, labels = torch.rand(1, DIM, 64, 64).bfloat16(), torch.zeros(1, 64, 64, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        rows, _ = region_rows(embedding, labels, 1)
    torch.testing.assert_close(rows[0], embedding[0].float().sum((1, 2)))
    queues = PixelQueues(1, 4, DIM, dtype=torch.bfloat16)
    queues.update(embedding, labels)
    assert queues.pixels.rows.dtype == queues.regions.rows.dtype == torch.bfloat16


def test_the_loss_takes_both_parts_and_the_queues_pass_no_gradient() -> None:
    queues = PixelQueues(CLASSES, 6, DIM)
    embedding = torch.randn(2, DIM, 4, 5, requires_grad=True)
    labels = torch.randint(0, CLASSES, (2, 8, 10))
    criterion = PixelContrastLoss(max_samples=16, max_views=2)
    assert criterion(embedding, labels, queue=queues.parts()) == 0  # empty queues
    queues.update(embedding, labels)
    assert criterion(embedding, labels, queue=queues.parts()) > 0
    assert not any(queue.rows.requires_grad for queue in queues.parts())
    assert set(queues.state_dict()) == {
        f"{p}.{b}" for p in ("regions", "pixels") for b in ("rows", "counts", "cursors")
    }


def test_update_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    eager, other = (PixelQueues(CLASSES, 6, DIM, 2, dtype=torch.float64) for _ in range(2))
    compiled = torch.compile(other.update, fullgraph=True, backend="aot_eager")
    for step in range(3):
        embedding, labels = make_batch()
        for update in (eager.update, compiled):
            torch.manual_seed(step)
            update(embedding, labels)
    for mine, theirs in zip(other.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_wrong_arguments_are_named() -> None:
    queues, labels = PixelQueues(CLASSES, 6, DIM), torch.zeros(2, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"embedding must be \[B, 3, h, w\], got \(2, 4, 8, 8\)"):
        queues.update(torch.randn(2, 4, 8, 8), labels)
    with pytest.raises(ValueError, match=r"labels must be \[B=1, H, W\], got \(2, 8, 8\)"):
        queues.update(torch.randn(1, DIM, 8, 8), labels)
    with pytest.raises(TypeError, match=r"labels must be int64, got torch.float32; use labels.long\(\)"):
        queues.update(torch.randn(2, DIM, 8, 8), labels.float())
    with pytest.raises(ValueError, match="labels at stride 1 make 64 cells, more than the 16 of the embedding"):
        PixelQueues(CLASSES, 6, DIM, variant="released", stride=1).update(torch.randn(2, DIM, 4, 4), labels)
    with pytest.raises(ValueError, match="variant must be one of .*got 'theirs'"):
        PixelQueues(CLASSES, 6, DIM, variant="theirs")
    with pytest.raises(ValueError, match="pixels_per_class must be at least 1, got 0"):
        PixelQueues(CLASSES, 6, DIM, 0)
    with pytest.raises(ValueError, match='variant="released" needs sync="local", got \'gather\''):
        PixelQueues(CLASSES, 6, DIM, variant="released", sync="gather")
    assert [queue.sync for queue in PixelQueues(CLASSES, 6, DIM, sync="gather").parts()] == ["gather", "gather"]
