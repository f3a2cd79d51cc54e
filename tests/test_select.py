"""Hard-anchor sampling against the rule written as plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixcontrast.select import all_anchors, hard_anchors


def expected_counts(labels: Tensor, predict: Tensor, max_samples: int, max_views: int, ignore: int) -> list[tuple]:
    """(image, class, wrongly, rightly predicted anchors) of each group, in order."""
    groups = []
    for b in range(labels.shape[0]):
        for c in sorted(set(labels[b].flatten().tolist()) - {ignore}):
            if int((labels[b] == c).sum()) > max_views:
                groups.append((b, c))
    if not groups:
        return []
    views = max(1, min(max_samples // len(groups), max_views))
    counts = []
    for b, c in groups[:max_samples]:
        wrong = int(((labels[b] == c) & (predict[b] != c)).sum())
        right = int(((labels[b] == c) & (predict[b] == c)).sum())
        if wrong >= views / 2 and right >= views / 2:
            keep = views // 2
        elif wrong >= views / 2:
            keep = views - right
        else:
            keep = wrong
        counts.append((b, c, keep, views - keep))
    return counts


@pytest.mark.parametrize("seed", range(60))
def test_counts_agree_with_the_rule(seed: int) -> None:
    torch.manual_seed(seed)
    images, classes = 1 + seed % 3, (1, 3, 12)[seed % 3]
    labels = torch.randint(0, classes, (images, 9, 11))
    ignore = (-1, 255, 0)[seed % 3]
    labels[torch.rand(labels.shape) < 0.2] = ignore
    right = (0.0, 0.5, 0.95, 1.0)[seed % 4]
    predict = torch.where(torch.rand(labels.shape) < right, labels, (labels + 1) % classes)
    max_samples, max_views = (4, 64, 1000)[seed // 3 % 3], (1, 2, 5, 30)[seed // 4 % 4]
    anchors = hard_anchors(labels, predict, max_samples=max_samples, max_views=max_views, ignore_index=ignore)
    expected = expected_counts(labels, predict, max_samples, max_views, ignore)

    assert anchors.indices.shape == anchors.labels.shape == (max_samples,)
    used = anchors.indices >= 0
    index = anchors.indices[used]
    assert len(set(index.tolist())) == len(index)  # no pixel twice
    assert torch.equal(labels.flatten()[index], anchors.labels[used])
    assert (anchors.labels[~used] == -1).all()
    found = {}
    for i in index.tolist():
        wrong = bool(predict.flatten()[i] != labels.flatten()[i])
        key = (i // 99, int(labels.flatten()[i]), wrong)
        found[key] = found.get(key, 0) + 1
    wanted = {}
    for b, c, hard, easy in expected:
        wanted |= {(b, c, True): hard} if hard else {}
        wanted |= {(b, c, False): easy} if easy else {}
    assert found == wanted
    groups = len(expected)  # view-major: place v * A + a
    for place in used.nonzero()[:, 0].tolist():
        b, c = expected[place % groups][:2]
        assert (anchors.indices[place] // 99, anchors.labels[place]) == (b, c)
        view, hard = place // groups, expected[place % groups][2]
        wrong = predict.flatten()[anchors.indices[place]] != c
        assert bool(wrong) == (view < hard)


def test_every_pixel_of_a_group_is_drawn_sometimes_and_a_generator_repeats() -> None:
    labels, predict = torch.zeros(1, 4, 5, dtype=torch.int64), torch.zeros(1, 4, 5, dtype=torch.int64)
    predict[0, 0] = 1

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return hard_anchors(
            labels, predict, max_samples=4, max_views=4, ignore_index=-1, generator=generator
        ).indices.tolist()

    draws = [draw(seed) for seed in range(200)]
    assert draws[3] == draw(3)
    seen = torch.bincount(torch.tensor(draws).flatten(), minlength=20)
    assert (seen[:5] > 40).all() and (seen[5:] > 10).all()  # expected 80 and 26.7


def test_sampling_compiles_without_a_graph_break() -> None:
    labels, predict = torch.randint(0, 3, (2, 6, 7)), torch.randint(0, 3, (2, 6, 7))

    def counts(labels: Tensor, predict: Tensor) -> Tensor:
        return hard_anchors(labels, predict, max_samples=20, max_views=6, ignore_index=-1).labels

    compiled = torch.compile(counts, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(labels, predict).sort().values, counts(labels, predict).sort().values)


def test_all_anchors() -> None:
    anchors = all_anchors(torch.tensor([[3, 255], [0, -1]]), 255)
    assert anchors.indices.tolist() == [0, -1, 2, -1] and anchors.labels.tolist() == [3, -1, 0, -1]
