"""Attention of pixels, rows of the memory and their plane, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pixcontrast import ContrastBranch
from pixcontrast.heads import ClassSelectors
from train.config import FitConfig
from train.errors import UserError
from train.models import build_learner
from train.paper.introspection import attention_map, attention_weights, memory_rows, principal_plane

# ---- attention


@pytest.fixture(params=["paper", "released"])
def branch(request: pytest.FixtureRequest) -> ContrastBranch:
    """A branch of 3 classes whose normalisations all do something, in evaluation mode."""
    torch.manual_seed(0)
    branch = ContrastBranch(6, 3, dim=8, capacity=5, variant=request.param).eval()
    for name, value in branch.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_()
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    return branch


def selector_by_hand(selectors: ClassSelectors, row: Tensor, label: int) -> Tensor:
    """Attention of one row, before its division by the mean of the class."""
    hidden = selectors.weight1[label] @ row + selectors.bias1[label]
    hidden = (hidden - selectors.running_mean[label]) / (selectors.running_var[label] + 1e-5).sqrt()
    hidden = F.leaky_relu(hidden * selectors.norm_weight[label] + selectors.norm_bias[label], 0.2)
    return torch.sigmoid(selectors.weight2[label] @ hidden + selectors.bias2[label])


@torch.no_grad()
def test_attention_is_that_of_each_pixels_own_class(branch: ContrastBranch):
    features = torch.randn(2, 6, 4, 5)
    labels = torch.randint(0, 3, (2, 4, 5))
    labels[0, 0, :3] = torch.tensor([255, -1, 3])
    weights = attention_weights(branch, features, labels)
    expected = torch.full((2, 4, 5), torch.nan)
    for label in range(3):
        places = (labels == label).nonzero().tolist()
        for image, row, column in places:
            pixel = branch.predict(branch.project(features[image, :, row, column][None]))[0]
            if branch.variant == "paper":
                pixel = pixel / pixel.norm()
            expected[image, row, column] = selector_by_hand(branch.select_features, pixel, label)
        expected[labels == label] /= expected[labels == label].mean()
        assert weights[labels == label].mean().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(weights.float(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert (weights[labels < 3].nan_to_num(1) > 0).all() and expected.std() != 0


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_attention_map_is_for_predicted_classes(tiny: FitConfig, precision: str):
    torch.manual_seed(0)
    config = replace(tiny, optim=replace(tiny.optim, precision=precision))
    learner = build_learner(config, 3, 255, 6).eval()
    image = torch.randint(0, 256, (3, 32, 48), dtype=torch.uint8)
    classes, weights = attention_map(learner, image)
    logits, features = learner(image[None].float() / 255)
    assert torch.equal(classes, logits[0].argmax(0)) and classes.shape == weights.shape == (8, 12)
    with learner.autocast():
        assert torch.equal(weights, attention_weights(learner.branch, features, classes[None])[0])


# ---- memory


@torch.no_grad()
def test_memory_rows_are_the_filled_ones_with_their_weights(branch: ContrastBranch):
    pushed = torch.randn(7, 8)
    branch.memory.push(pushed, torch.tensor([2, 0, 2, 2, 0, 0, 0]))
    memory = memory_rows(branch)
    assert memory.classes.tolist() == [0, 0, 0, 0, 2, 2, 2] and memory.rows.shape == (7, 8)
    units = F.normalize(pushed, dim=1)
    for label, count in ((0, 4), (2, 3)):
        rows = memory.rows[memory.classes == label].float()
        own = units[[1, 4, 5, 6] if label == 0 else [0, 2, 3]]
        assert (torch.cdist(rows, own).min(1).values < 1e-6).all() and len(rows) == count
        expected = torch.ones(count)
        if branch.variant == "paper":
            expected = torch.stack([selector_by_hand(branch.select_memory, row, label) for row in rows])
        expected = expected / expected.mean()
        torch.testing.assert_close(memory.weights[memory.classes == label].float(), expected, rtol=1e-5, atol=1e-6)
    branch.memory.clear()
    with pytest.raises(UserError, match="memory is empty.*--memory-start"):
        memory_rows(branch)


def test_principal_plane_of_constructed_rows():
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0].t()
    first, second, third = (v * v[v.abs().argmax()].sign() for v in basis[:3])
    a = torch.tensor([-9.0, 9, -9, 9, 0, 0], dtype=torch.float64)
    b = torch.tensor([4.0, 4, -4, -4, 0, 0], dtype=torch.float64)
    c = torch.tensor([0.0, 0, 0, 0, 1, -1], dtype=torch.float64)
    rows = 5 + a[:, None] * first + b[:, None] * second + c[:, None] * third
    coordinates, shares = principal_plane(rows)
    torch.testing.assert_close(coordinates, torch.stack([a, b], 1))
    torch.testing.assert_close(shares, torch.tensor([324, 64], dtype=torch.float64) / (324 + 64 + 2))
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    torch.testing.assert_close(principal_plane(rows[order])[0], coordinates[order])
    assert torch.equal(principal_plane(rows.clone())[0], coordinates)
    for few in (rows[:1], torch.zeros(4, 1, dtype=torch.float64)):
        coordinates, shares = principal_plane(few)
        assert coordinates.shape == (len(few), 2) and not coordinates.any() and not shares.any()
