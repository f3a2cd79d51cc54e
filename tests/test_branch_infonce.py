"""The branch with the InfoNCE objective: draws anchors first and projects only them."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import infonce_pairs
from torch import Tensor, nn
from torch.nn.functional import normalize

from pixcontrast import ContrastBranch, PixelContrastLoss
from pixcontrast.functional import infonce_contrast
from pixcontrast.select import Anchors, labels_at

CLASSES, CHANNELS, DIM = 4, 12, 16


def make_branch(**options) -> ContrastBranch:
    options = {"max_samples": 40, "max_views": 6} | options
    return ContrastBranch(CHANNELS, CLASSES, objective="infonce", dim=DIM, **options)


def make_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Features [2, CHANNELS, 9, 8], labels and predictions at three times the resolution; some pixels ignored."""
    labels = torch.randint(0, CLASSES, (2, 27, 24))
    labels[:, :4] = 255
    predict = torch.where(torch.rand(labels.shape) < 0.6, labels.clamp_max(CLASSES - 1), 0)
    return torch.randn(2, CHANNELS, 9, 8, dtype=torch.float64), labels, predict


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plain_head(branch: ContrastBranch) -> nn.Module:
    """The projection head of library modules, with the same weights."""
    head = branch.project
    norm = nn.BatchNorm1d(DIM).to(head.last.weight)
    norm.load_state_dict(head.norm.state_dict())
    return nn.Sequential(copy.deepcopy(head.first), norm, nn.ReLU(), copy.deepcopy(head.last))


def anchors_of(branch: ContrastBranch, labels: Tensor, predict: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels and classes of the anchors that the branch draws with ``generator()``."""
    label = labels_at(labels, (9, 8))
    drawn = branch.criterion.loss.anchors(torch.where(label == 255, -1, label), predict, generator())
    used = drawn.indices >= 0
    assert 20 < int(used.sum()) <= 40
    return drawn.indices[used], drawn.labels[used]


@pytest.mark.parametrize("dense", [False, True])
def test_loss_and_gradients_are_those_of_the_anchors_alone(dense: bool) -> None:
    branch = make_branch(dense=dense).double()
    features, labels, predict = make_batch()
    pixels, classes = anchors_of(branch, labels, predict)
    head = plain_head(branch)
    mine, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    loss = branch(mine, labels, predict, generator=generator())
    loss.backward()

    rows = theirs.permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    if dense:
        valid = labels_at(labels, (9, 8)).reshape(-1) != 255
        place = valid.long().cumsum(0) - 1
        projected = head(rows[valid])[place[pixels]]
    else:
        projected = head(rows[pixels])
    unit = normalize(projected, dim=1)
    expected = infonce_pairs(unit, classes, unit, classes, list(range(len(unit))), 0.1, 0.07)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    for ours, plain in zip(branch.project.parameters(), head.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-11)
    with_gradient = set(mine.grad.abs().sum(1).reshape(-1).nonzero()[:, 0].tolist())
    assert (with_gradient == set(pixels.tolist())) != dense


def test_the_memory_takes_a_quota_of_random_pixels_of_each_image_and_class() -> None:
    branch = make_branch(capacity=16, quota=3).double().eval()
    features, labels, _ = make_batch()
    labels[labels == 2] = 1
    branch.remember(features, None, labels, generator=generator())
    counts = branch.memory.counts.tolist()
    assert counts == [6, 6, 0, 6]
    small = labels_at(labels, (9, 8)).reshape(2, -1)
    projected = normalize(branch.project(features.permute(0, 2, 3, 1).reshape(-1, CHANNELS)), dim=1)
    seen = []
    for c in (0, 1, 3):
        for row in branch.memory.rows[c, :6]:
            pixel = int((projected - row).abs().sum(1).argmin())
            torch.testing.assert_close(projected[pixel], row)
            assert small[pixel // 72, pixel % 72] == c
            seen.append((c, pixel // 72, pixel))
    assert len(set(seen)) == 18
    assert all(sum(s[:2] == (c, b) for s in seen) == 3 for c in (0, 1, 3) for b in (0, 1))
    before = branch.memory.rows.clone()
    branch.remember(features, None, labels, generator=generator(4))
    assert not torch.equal(before[0, :6].sort(0).values, branch.memory.rows[0, 6:12].sort(0).values)


def test_only_right_and_sure_pixels_are_remembered_if_there_are_logits() -> None:
    branch = make_branch(capacity=64)
    features, labels, predict = make_batch()
    logits = nn.functional.one_hot(predict, CLASSES).permute(0, 3, 1, 2).float() * 12
    branch.remember(features.float(), logits, labels)
    right = labels_at(labels, (9, 8)) == labels_at(predict, (9, 8))
    expected = [int((right & (labels_at(labels, (9, 8)) == c)).sum()) for c in range(CLASSES)]
    assert branch.memory.counts.tolist() == expected


def test_with_a_memory_anchors_are_contrasted_with_it() -> None:
    branch = make_branch(capacity=16, quota=3).double()
    features, labels, predict = make_batch()
    branch.remember(features, None, labels)
    plain = plain_head(branch)
    pixels, classes = anchors_of(branch, labels, predict)
    loss, stats = branch(features, labels, predict, generator=generator(), return_stats=True)
    rows = normalize(plain(features.permute(0, 2, 3, 1).reshape(-1, CHANNELS)[pixels]), dim=1)
    keys = torch.cat([branch.memory.rows[c, : branch.memory.counts[c]] for c in range(CLASSES)])
    key_labels = torch.arange(CLASSES).repeat_interleave(branch.memory.counts)
    expected = infonce_pairs(rows, classes, keys, key_labels, [-1] * len(rows), 0.1, 0.07)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    assert int(stats.anchors) == len(pixels)


def test_dense_is_the_loss_on_the_projected_map() -> None:
    branch = make_branch(dense=True).double().eval()
    features, labels, predict = make_batch()
    embedding = normalize(branch.project(features.permute(0, 2, 3, 1).reshape(-1, CHANNELS)), dim=1)
    embedding = embedding.view(2, 9, 8, DIM).permute(0, 3, 1, 2)
    criterion = PixelContrastLoss(max_samples=40, max_views=6, ignore_index=255)
    expected = criterion(embedding, labels, predict, generator=generator())
    torch.testing.assert_close(branch(features, labels, predict, generator=generator()), expected)


@pytest.mark.filterwarnings("ignore:PixelContrastLoss. the loss is 0")  # nothing is labelled
def test_nothing_labelled_gives_a_connected_zero_and_keeps_the_statistics() -> None:
    branch = make_branch()
    features = torch.randn(2, CHANNELS, 9, 8, requires_grad=True)
    loss = branch(features, torch.full((2, 27, 24), 255))
    loss.backward()
    assert loss.item() == 0 and not features.grad.any()
    assert not branch.project.norm.running_mean.any()


def test_one_graph_without_shapes_that_depend_on_the_data() -> None:
    branch = make_branch(capacity=16, quota=3)
    features, labels, predict = make_batch()

    def step(features: Tensor, labels: Tensor, predict: Tensor) -> Tensor:
        branch.remember(features, None, labels)
        return branch(features, labels, predict)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert compiled(features.float(), labels, predict).isfinite()


def test_a_branch_without_memory_says_so() -> None:
    features, labels, _ = make_batch()
    with pytest.raises(ValueError, match="no memory; give it a capacity"):
        make_branch().remember(features, None, labels)
    with pytest.raises(ValueError, match="objective must be one of"):
        ContrastBranch(CHANNELS, CLASSES, objective="nce")


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_reaches_the_kernel_under_autocast(half: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(2, 12, 16, 16), torch.randint(0, 3, (2, 16, 16))
    seen = []

    def spy(features: Tensor, anchors, queues=(), **options):
        seen.append([features.dtype, *(queue.dtype for queue in queues)])
        return infonce_contrast(features, anchors, queues, **options)

    monkeypatch.setattr("pixcontrast.loss_infonce.infonce_contrast", spy)
    for capacity, dtypes in ((0, [half]), (8, [half, half])):
        options = {"objective": "infonce", "dim": 8, "capacity": capacity, "max_samples": 64, "max_views": 10}
        branch = ContrastBranch(12, 3, memory_dtype=half, **options).eval()
        exact = ContrastBranch(12, 3, **options).eval()
        exact.load_state_dict(branch.state_dict())
        results = []
        for each, enabled in ((exact, False), (branch, True)):
            with torch.autocast("cpu", half, enabled=enabled):
                if capacity:
                    each.remember(features, None, labels, generator=torch.Generator().manual_seed(1))
                results.append(each(features, labels, generator=torch.Generator().manual_seed(2)))
        assert seen.pop() == dtypes and seen.pop()[0] == torch.float32
        assert results[1].dtype == torch.float32
        assert abs(results[0] - results[1]) < 0.05 * abs(results[0])


def test_the_first_pixel_may_be_an_anchor_of_the_dense_branch() -> None:
    labels, drawn = (
        torch.arange(12).view(2, 2, 3) % 4,
        Anchors(torch.tensor([0, 5, -1, 11]), torch.tensor([0, 1, -1, 3])),
    )
    _, rows = make_branch(dense=True)._anchor_rows(torch.randn(2, CHANNELS, 2, 3), labels, drawn)
    assert rows.indices.tolist() == [0, 4, -1, 11]  # in class order, pixels 0 4 8, 1 5 9, 2 6 10, 3 7 11
