"""The contrastive loss and the memory of SemiSeg-Contrastive under their own names and calls."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from pixcontrast import ClassMemory, PixelContrastLoss
from pixcontrast.compat.semiseg import FeatureMemory, contrastive_class_to_class_learned_memory

CLASSES, DIM = 4, 6
VARIANTS = ("released", "paper")


class Model(nn.Module):
    """A small network with the two attention networks of each class, laid out and named as theirs."""

    def __init__(self, dim: int = DIM) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, dim, 3, 2, 1))
        for c in range(CLASSES):
            for name in (f"contrastive_class_selector_{c}", f"contrastive_class_selector_memory{c}"):
                self.add_module(
                    name,
                    nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.LeakyReLU(0.2), nn.Linear(dim, 1)),
                )


def selector(model: nn.Module, c: int, memory: str = "") -> nn.Module:
    return getattr(model, f"contrastive_class_selector_{memory}{c}")


def make_batch(count: int = 30) -> tuple[Tensor, Tensor]:
    """Rows of any norm and labels as theirs: floats, 250 for ignored pixels."""
    features = torch.randn(count, DIM, dtype=torch.float64) * 3
    labels = torch.randint(0, CLASSES + 1, (count,)).double()
    return features.requires_grad_(), torch.where(labels == CLASSES, 250, labels)


def make_memory() -> list[np.ndarray | None]:
    """Nothing, one row, several rows."""
    return [torch.randn(count, DIM).double().numpy() if count else None for count in (5, 0, 1, 3)]


def shares(logits: Tensor) -> Tensor:
    """``M s_i / sum_k s_k``, mean one."""
    return len(logits) * torch.sigmoid(logits) / torch.sigmoid(logits).sum()


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return torch.dot(one, other) / (one.norm() * other.norm())


def pairs(model: nn.Module, features: Tensor, labels: Tensor, memory: Any, variant: str) -> Tensor:
    """``1/C sum_c 1/(MN) sum_ij w_i v_j (1 - cos(f_i, z_j))``, pair by pair."""
    total = features.sum() * 0
    for c in range(CLASSES):
        rows = features[labels == c]
        stored = torch.zeros(0, DIM) if memory[c] is None else torch.from_numpy(memory[c])
        if len(rows) < 2 or len(stored) < 2:
            continue
        seen = rows.detach() if variant == "released" else normalize(rows.detach(), dim=1)
        w, v = shares(selector(model, c)(seen)[:, 0]), torch.ones(len(stored))
        if variant == "paper":
            v = shares(selector(model, c, "memory")(normalize(stored, dim=1))[:, 0])
        for i in range(len(rows)):
            for j in range(len(stored)):
                total = total + w[i] * v[j] * (1 - cosine(rows[i], stored[j])) / (len(rows) * len(stored))
    return total / CLASSES


@pytest.mark.parametrize("backend", ["reference", "extension"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_single_pairs(seed: int, variant: str, backend: str) -> None:
    torch.manual_seed(seed)
    model, memory = Model().double(), make_memory()
    features, labels = make_batch()
    wanted = [features, *(p for n, p in model.named_parameters() if "selector" in n)]
    expected = pairs(model, features, labels, memory, variant)
    loss = contrastive_class_to_class_learned_memory(
        model, features, labels, CLASSES, memory, variant=variant, backend=backend
    )
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    results = torch.autograd.grad(loss, wanted, allow_unused=True)
    truths = torch.autograd.grad(expected, wanted, allow_unused=True)
    largest = max(float(truth.abs().max()) for truth in truths if truth is not None)
    for result, truth in zip(results, truths, strict=True):
        assert (result is None) == (truth is None)  # released: nothing reaches the networks of the memory
        if truth is not None:
            torch.testing.assert_close(result, truth, rtol=0, atol=1e-12 * largest)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_of_the_memory_and_of_the_labels(variant: str) -> None:
    model = Model().double()
    features, labels = make_batch()
    bank = ClassMemory(CLASSES, 5, DIM, dtype=torch.float64)
    bank.push(torch.randn(14, DIM).double(), torch.randint(0, 3, (14,)), quota=3)
    listed = [rows[:count].numpy() if count else None for rows, count in zip(bank.rows, bank.counts, strict=True)]
    expected = contrastive_class_to_class_learned_memory(model, features, labels, CLASSES, listed, variant=variant)
    assert expected > 0
    for label in (labels, labels.long(), labels.int(), labels.float()):
        loss = contrastive_class_to_class_learned_memory(model, features, label, CLASSES, bank, variant=variant)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    fewer = contrastive_class_to_class_learned_memory(model, features, labels, 2, bank, variant=variant)
    truth = pairs(model, features, labels, [*listed[:2], None, None], variant) * CLASSES / 2
    torch.testing.assert_close(fewer, truth, rtol=1e-12, atol=0)


def test_nothing_to_contrast_is_a_connected_zero() -> None:
    model, row = Model().double(), np.ones((1, DIM))
    features, labels = make_batch()
    none = make_batch(0)
    for rows, label, memory in (
        (features, labels, [None] * CLASSES),
        (features, labels, [row] * CLASSES),
        (features, torch.full_like(labels, 250), make_memory()),
        (features[:1], labels[:1] * 0, make_memory()),
        (*none, make_memory()),
        (features, labels, FeatureMemory(100, "cityscapes", 8, DIM, CLASSES)),
    ):
        for variant in VARIANTS:
            loss = contrastive_class_to_class_learned_memory(model, rows, label, CLASSES, memory, variant=variant)
            (grad,) = torch.autograd.grad(loss, rows)
            assert loss == 0 and torch.equal(grad, torch.zeros_like(rows))


class NumpyMemory:
    """Their memory as lists: newest rows in front, oldest fall off the end."""

    def __init__(self, capacity: int, quota: int, variant: str) -> None:
        self.memory: list[list[Tensor]] = [[] for _ in range(CLASSES)]
        self.capacity, self.quota, self.variant = capacity, quota, variant

    @torch.no_grad()
    def add(self, model: nn.Module, features: Tensor, labels: Tensor) -> None:
        for c in range(CLASSES):
            rows = features[labels == c]
            if len(rows) > self.quota:
                unit = normalize(rows, dim=1)
                score = selector(model, c)(rows if self.variant == "released" else unit)[:, 0]
                rows = rows[torch.argsort(score, descending=self.variant == "paper")[: self.quota]]
            self.memory[c] = [*normalize(rows, dim=1), *self.memory[c]][: self.capacity]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(5))
def test_memory_agrees_with_lists(seed: int, variant: str) -> None:
    torch.manual_seed(seed)
    model = Model()
    twin = copy.deepcopy(model)
    memory = FeatureMemory(7, "cityscapes", 13, DIM, CLASSES, variant=variant)  # two rows an image
    lists = NumpyMemory(13, 2 * 3, variant)
    for step in range(5):
        features, labels = make_batch(24)
        labels[labels == 2] = 250 if step < 2 else 2
        memory.add_features_from_sample_learned(model, features.float(), labels, batch_size=3)
        lists.add(twin, features.detach().float(), labels)
        assert len(memory.memory) == CLASSES
        for stored, expected in zip(memory.memory, lists.memory, strict=True):
            assert (stored is None) == (not expected)
            if expected:
                torch.testing.assert_close(torch.from_numpy(stored), torch.stack(expected))
    # the attention networks were run as often and on the same rows: their BatchNorm statistics are the same
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_memory_reads_as_a_list() -> None:
    memory = FeatureMemory(100, "cityscapes", memory_per_class=8, feature_size=DIM, n_classes=CLASSES)
    assert list(memory.memory) == [None] * CLASSES
    model = Model()
    memory.add_features_from_sample_learned(model, torch.randn(5, DIM), torch.tensor([0, 0, 3, 1, 1]), batch_size=2)
    assert isinstance(memory.memory[0], np.ndarray) and memory.memory[0].shape == (2, DIM)
    assert memory.memory[-1].shape == (1, DIM) and memory.memory[2:3] == [None]
    with pytest.raises(IndexError):
        memory.memory[CLASSES]
    features, labels = make_batch()
    results = [
        contrastive_class_to_class_learned_memory(model, features.float(), labels, CLASSES, form)
        for form in (memory, memory.memory, list(memory.memory), memory.bank)
    ]
    assert results[0] > 0
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_rows_an_image() -> None:
    def rows(*arguments: Any, **options: Any) -> int:
        return FeatureMemory(*arguments, **options).per_class_samples_per_image

    assert [rows(n, "cityscapes", 256) for n in (100, 372, 744)] == [3, 1, 1]
    assert [rows(n, "pascal_voc", 256, n_classes=21) for n in (212, 530, 1323)] == [7, 1, 1]
    assert rows(212, "pascal_voc", 256, n_classes=21, variant="paper") == 1
    memory = FeatureMemory(100, "cityscapes")
    assert (memory.num_samples, memory.memory_per_class, memory.feature_size, memory.n_classes) == (100, 2048, 256, 19)


def train(step_loss: Any, steps: int = 30) -> list[float]:
    """Losses of every step of a small network on random images; the same network and images for every ``step_loss``."""
    torch.manual_seed(0)
    model, losses = Model(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        labels = torch.randint(0, CLASSES, (2, 8, 8))
        labels[:, :1] = 250
        images = (torch.randn(2, 8, 8, 3) + labels[..., None]).permute(0, 3, 1, 2)
        images = images.repeat_interleave(4, 2).repeat_interleave(4, 3)
        rows = model.body(images).permute(0, 2, 3, 1).reshape(-1, DIM)
        loss = step_loss(model, rows, labels.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_by_their_call_and_by_ours_gives_the_same_losses() -> None:
    memory = FeatureMemory(1, "cityscapes", 16, DIM, CLASSES)  # no class of a batch has more than 4 * 16 rows
    bank = ClassMemory(CLASSES, 16, DIM)
    criterion = PixelContrastLoss(objective="positive", ignore_index=250)

    def their_loss(model: nn.Module, rows: Tensor, labels: Tensor) -> Tensor:
        memory.add_features_from_sample_learned(model, rows, labels.float(), batch_size=4)
        return contrastive_class_to_class_learned_memory(model, rows, labels.float(), CLASSES, memory.memory)

    def our_loss(model: nn.Module, rows: Tensor, labels: Tensor) -> Tensor:
        bank.push(rows, labels)
        weight_logits = torch.zeros(len(rows))
        for c in range(CLASSES):
            weight_logits[labels == c] = selector(model, c)(rows[labels == c].detach())[:, 0]
        return criterion(rows, labels, queue=bank, weight_logits=weight_logits)

    first, second = train(their_loss), train(our_loss)
    assert first == second
    assert sum(first[-5:]) < sum(first[:5])


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match='dataset must be "cityscapes" or "pascal_voc", got \'pascal\''):
        FeatureMemory(100, "pascal")
    with pytest.raises(ValueError, match="FeatureMemory: variant must be one of .*got 'ours'"):
        FeatureMemory(100, "cityscapes", variant="ours")
    features, labels = make_batch()
    with pytest.raises(ValueError, match="learned_memory: variant must be one of .*got 'ours'"):
        contrastive_class_to_class_learned_memory(Model(), features, labels, CLASSES, make_memory(), variant="ours")
