"""The contrastive branch: what it remembers, what it learns, and both variants."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.utils.checkpoint
from oracle import positive_pairs
from test_heads import plain_selector
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from pixcontrast import ContrastBranch
from pixcontrast.branch import rows_per_image
from pixcontrast.select import confident, labels_at, logits_at

CLASSES, CHANNELS, DIM = 4, 12, 16


def make_branch(**options) -> ContrastBranch:
    return ContrastBranch(CHANNELS, CLASSES, dim=DIM, capacity=options.pop("capacity", 8), **options)


def make_batch(confidence: float = 12.0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, logits that are right for about two thirds of the pixels, labels with some ignored."""
    features = torch.randn(3, CHANNELS, 5, 6)
    labels = torch.randint(0, CLASSES, (3, 20, 24))
    labels[:, :3] = 255
    small = labels_at(labels, (5, 6))
    guess = torch.where(torch.rand(small.shape) < 0.66, small.clamp_max(CLASSES - 1), 0)
    logits = torch.nn.functional.one_hot(guess, CLASSES).permute(0, 3, 1, 2).float() * confidence
    return features, interpolate(logits, size=(20, 24), mode="nearest"), labels


def test_labels_go_to_feature_resolution_by_the_nearest_rule() -> None:
    for full, size in (((512, 512), (64, 64)), ((321, 321), (41, 41)), ((512, 512), (65, 65)), ((7, 9), (7, 9))):
        labels = torch.randint(0, 255, (2, *full))
        expected = [
            [labels[0, i * full[0] // size[0], j * full[1] // size[1]] for j in range(size[1])] for i in range(size[0])
        ]
        assert labels_at(labels, size)[0].tolist() == [[int(v) for v in row] for row in expected]


def test_logits_at_is_upsampling_and_picking() -> None:
    logits = torch.randn(2, 3, 9, 13).double()
    full, size = (33, 50), (9, 13)
    dense = interpolate(logits, size=full, mode="bilinear", align_corners=True)
    rows, columns = ([i * f // s for i in range(s)] for f, s in zip(full, size, strict=True))
    torch.testing.assert_close(logits_at(logits, size, full), dense[:, :, rows][:, :, :, columns])


def test_confident_means_right_and_above_the_threshold() -> None:
    logits = torch.tensor([[[0.95, 0.951, 0.96]], [[0.05, 0.049, 0.04]]]).log()[None]
    labels = torch.tensor([[[0, 0, 1]]])
    assert confident(logits, labels, 0.95).tolist() == [[[False, True, False]]]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_remember_keeps_the_rows_that_the_rules_say(variant: str) -> None:
    """Projection, ranking, quota and order, written out with plain modules and lists."""
    branch, teacher = make_branch(variant=variant, quota=2, capacity=64), make_branch(variant=variant)
    features, logits, labels = make_batch()
    expected_heads = copy.deepcopy(teacher)
    branch.remember(features, logits, labels, teacher=teacher)

    small = labels_at(labels, (5, 6))
    probability, predicted = logits_at(logits, (5, 6), (20, 24)).softmax(1).max(1)
    keep = ((predicted == small) & (probability > 0.95)).reshape(-1)
    rows = features.permute(0, 2, 3, 1).reshape(-1, CHANNELS)[keep]
    label, image = small.reshape(-1)[keep], torch.arange(3).repeat_interleave(30)[keep]
    with torch.no_grad():
        projected = expected_heads.project(rows)
        ranked = projected if variant == "released" else normalize(expected_heads.predict(projected), dim=1)
    for c in range(CLASSES):
        member = (label == c).nonzero()[:, 0].tolist()
        scores = plain_selector(expected_heads.select_features, c)(ranked[member])[:, 0].detach()
        order = sorted(range(len(member)), key=lambda k: float(scores[k]), reverse=variant == "paper")
        if variant == "released":  # D2: the lowest scores, and a quota for the whole batch
            chosen = order[: 2 * 3]
        else:
            chosen = [
                k for k in order if sum(image[member[o]] == image[member[k]] for o in order[: order.index(k)]) < 2
            ]
        expected = normalize(projected[[member[k] for k in chosen]], dim=1)
        count = int(branch.memory.counts[c])
        assert count == len(chosen) and len(member) > count  # the quota did something
        torch.testing.assert_close(branch.memory.rows[c, :count].flip(0), expected, rtol=1e-4, atol=1e-5)


def test_released_scores_only_classes_with_too_many_rows() -> None:
    """The others are stored in pixel order, and the statistics of their selectors stay."""
    branch = make_branch(variant="released", quota=3, capacity=64)
    features, labels = torch.randn(1, CHANNELS, 5, 6), torch.zeros(1, 5, 6, dtype=torch.int64)
    labels[0, 0, :3], labels[0, 1, :4] = 1, 2
    rows = features.permute(0, 2, 3, 1)[labels == 1]
    expected = normalize(copy.deepcopy(branch).project(features)[(labels == 1).reshape(-1)], dim=1)
    branch.remember(features, None, labels)
    assert branch.memory.counts.tolist() == [3, 3, 3, 0] and len(rows) == 3
    torch.testing.assert_close(branch.memory.rows[1, :3].flip(0), expected, rtol=1e-4, atol=1e-5)
    assert branch.select_features.running_mean.any(1).tolist() == [True, False, True, False]


@pytest.mark.parametrize(("variant", "weighed"), [("released", [True, False]), ("paper", [True, True])])
def test_released_weighs_only_classes_that_have_memory(variant: str, weighed: list[bool]) -> None:
    branch = make_branch(variant=variant, quota=99)
    features, labels = torch.randn(1, CHANNELS, 5, 6), torch.zeros(1, 5, 6, dtype=torch.int64)
    branch.memory.push(torch.randn(2, DIM), torch.zeros(2, dtype=torch.int64))
    branch.memory.push(torch.randn(1, DIM), torch.ones(1, dtype=torch.int64))
    labels[0, 2:] = 1
    branch(features, labels)
    assert branch.select_features.running_mean.any(1).tolist() == [*weighed, False, False]


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_loss_is_the_pair_formula_on_what_the_heads_give(variant: str) -> None:
    branch = make_branch(variant=variant).double()
    features, logits, labels = make_batch()
    branch.remember(features.double(), logits.double(), labels)
    plain = copy.deepcopy(branch)
    mine = features.double().clone().requires_grad_()
    loss = branch(mine, labels)
    loss.backward()

    theirs = features.double().clone().requires_grad_()
    label = labels_at(labels, (5, 6)).reshape(-1)
    valid = label != 255
    rows = theirs.permute(0, 2, 3, 1).reshape(-1, CHANNELS)[valid]
    predicted = plain.predict(plain.project(rows))
    label, queue, counts = label[valid], plain.memory.rows, plain.memory.counts
    selector_rows = predicted.detach() if variant == "released" else normalize(predicted.detach(), dim=1)  # D4
    weight_logits = torch.zeros(len(label)).double()
    queue_weight_logits = torch.zeros(queue.shape[:2]).double()
    for c in range(CLASSES):
        member = label == c
        weight_logits = weight_logits.masked_scatter(
            member, plain_selector(plain.select_features, c)(selector_rows[member])[:, 0]
        )
        stored = queue[c, : counts[c]]
        if variant == "paper" and len(stored) > 1:
            scores = plain_selector(plain.select_memory, c)(stored)[:, 0]
            queue_weight_logits = queue_weight_logits.clone()
            queue_weight_logits[c, : counts[c]] = scores
    # D1: in the released code all rows of the memory weigh the same, whatever their selector says
    expected = positive_pairs(
        predicted, label, queue, counts, weight_logits, None if variant == "released" else queue_weight_logits
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(branch.project.first.weight.grad, plain.project.first.weight.grad, rtol=1e-8, atol=1e-12)
    memory_gradient = branch.select_memory.weight1.grad
    if variant == "released":
        assert memory_gradient is None
    else:
        assert memory_gradient.abs().max() > 0
    assert branch.select_features.weight1.grad.abs().max() > 0


def test_selectors_do_not_push_the_features() -> None:
    """With a memory that all pixels agree with equally, only the selectors could give a gradient; they must not."""
    branch = make_branch()
    features, logits, labels = make_batch()
    branch.remember(features, logits, labels)
    seen = []
    handle = branch.select_features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    branch(features.requires_grad_(), labels)
    handle.remove()
    assert not seen[0].requires_grad


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_first_step_with_an_empty_memory_gives_a_connected_zero(variant: str) -> None:
    branch = make_branch(variant=variant)
    features, logits, labels = make_batch()
    features.requires_grad_()
    loss, stats = branch(features, labels, return_stats=True)
    assert loss.item() == 0 and stats.memory_fill.sum() == 0 and stats.similarity.isnan().all()
    loss.backward()
    assert (features.grad == 0).all()
    branch.remember(features, logits * 0, labels)  # nothing is sure
    assert branch.memory.counts.sum() == 0


def test_ignored_pixels_may_be_nan_but_for_the_gradient_of_the_first_weight() -> None:
    branch = make_branch()
    features, logits, labels = make_batch()
    ignored = labels_at(labels, (5, 6)) == 255
    features = features.masked_fill(ignored[:, None], float("nan")).requires_grad_()
    branch.remember(features, logits, labels)
    branch(features, labels).backward()
    assert features.grad.isfinite().all()
    first = branch.project.first.weight  # 0 * NaN, see pixel_linear
    assert all(p is first or p.grad is None or p.grad.isfinite().all() for p in branch.parameters())
    assert branch.memory.rows.isfinite().all() and branch.memory.counts.sum() > 0


def test_training_on_the_branch_brings_the_similarity_up() -> None:
    branch = make_branch(capacity=32)
    features, logits, labels = make_batch()
    branch.remember(features, logits, labels)
    optimiser = torch.optim.SGD(branch.parameters(), lr=0.3)
    losses = []
    for _ in range(30):
        loss, stats = branch(features, labels, return_stats=True)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert stats.counts.sum() == (labels_at(labels, (5, 6)) != 255).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    branch = make_branch()
    features, logits, labels = make_batch()
    branch.remember(features, logits, labels)
    expected = copy.deepcopy(branch)(features, labels)
    with torch.autocast("cpu", dtype):
        branch.remember(features, logits, labels)
        branch.memory.load_state_dict(copy.deepcopy(branch.memory.state_dict()))
        loss = branch(features.requires_grad_(), labels)
    loss.backward()
    assert loss.dtype == torch.float32 and features.grad.isfinite().all()
    assert abs(loss - expected) < 0.1


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_whole_branch_compiles_into_one_graph(variant: str) -> None:
    """No shape depends on the data and nothing is read back: what a CUDA graph needs too."""
    torch._dynamo.reset()
    branch = make_branch(variant=variant, quota=2)
    plain = copy.deepcopy(branch)
    features, logits, labels = make_batch()

    def step(module: ContrastBranch, features: Tensor) -> Tensor:
        module.remember(features.detach(), logits, labels)
        return module(features, labels)

    results = []
    for module, function in ((plain, step), (branch, torch.compile(step, fullgraph=True, backend="aot_eager"))):
        leaf = features.clone().requires_grad_()
        loss = function(module, leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad, module.memory.rows, module.select_features.weight1.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_rows_per_image() -> None:
    assert [rows_per_image(n) for n in (100, 372, 744, 2975)] == [3, 1, 1, 1]
    assert [rows_per_image(n, voc_classes=21) for n in (212, 530, 1323)] == [7, 1, 1]  # D8
    assert rows_per_image(212) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "new"}, "variant must be one of"),
        ({"threshold": 1.5}, r"threshold must be in \[0, 1\), got 1.5"),
        ({"quota": 0}, "quota must be at least 1 or None, got 0"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_branch(**options)


def test_wrong_inputs_are_named() -> None:
    branch = make_branch()
    features, logits, labels = make_batch()
    with pytest.raises(ValueError, match=r"features must be \[B, 12, h, w\], got \(3, 5, 5, 6\)"):
        branch(features[:, :5], labels)
    with pytest.raises(ValueError, match=r"labels must be \[B=3, H, W\], got \(2, 20, 24\)"):
        branch(features, labels[:2])
    with pytest.raises(TypeError, match="labels must be int64, got torch.float32"):
        branch(features, labels.float())
    with pytest.raises(ValueError, match=r"logits must be \[B=3, C=4"):
        branch.remember(features, logits[:, :3], labels)
    labels[:, 10:] = 9
    for call in (lambda: branch(features, labels), lambda: branch.remember(features, logits, labels)):
        with pytest.raises(ValueError, match=r"outside 0\.\.3 and are not ignore_index=255: 9"):
            call()
    assert branch.memory.counts.sum() == 0  # nothing was remembered


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    branch = ContrastBranch(6, 3, dim=8, capacity=4, threshold=0.0).eval()
    features, labels = torch.randn(2, 6, 5, 6, requires_grad=True), torch.randint(0, 3, (2, 5, 6))
    branch.remember(features, None, labels)
    leaves = [features, *branch.parameters()]
    plain = torch.autograd.grad(branch(features, labels), leaves)
    loss = torch.utils.checkpoint.checkpoint(branch, features, labels, use_reentrant=False)
    for grad, expected in zip(torch.autograd.grad(loss, leaves), plain, strict=True):
        assert torch.equal(grad, expected)
