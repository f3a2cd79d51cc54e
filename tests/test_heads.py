"""Heads and selectors against the modules of PyTorch, one class at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pixcontrast.heads import ClassSelectors, MLPHead
from pixcontrast.ops.class_order import Segments, class_order
from pixcontrast.ops.pixel_linear import pixel_linear

BACKENDS = ("extension", "reference")


def plain_selector(selectors: ClassSelectors, c: int) -> nn.Sequential:
    """Class c of the selectors, from PyTorch's own modules."""
    dim = selectors.weight1.shape[1]
    linear1, norm, linear2 = nn.Linear(dim, dim), nn.BatchNorm1d(dim).to(selectors.weight1.dtype), nn.Linear(dim, 1)
    linear1.weight.data, linear1.bias.data = selectors.weight1.data[c].clone(), selectors.bias1.data[c].clone()
    norm.weight.data, norm.bias.data = selectors.norm_weight.data[c].clone(), selectors.norm_bias.data[c].clone()
    norm.running_mean.copy_(selectors.running_mean[c])
    norm.running_var.copy_(selectors.running_var[c])
    linear2.weight.data = selectors.weight2.data[c : c + 1].clone()
    linear2.bias.data = selectors.bias2.data[c : c + 1].clone()
    return nn.Sequential(linear1, norm, nn.LeakyReLU(0.2), linear2).to(selectors.weight1.dtype)


def logits_of(selectors: ClassSelectors, rows: Tensor, labels: Tensor) -> Tensor:
    """Logits in the order of the rows."""
    segments = class_order(labels, len(selectors.bias2))
    logits = selectors(rows[segments.order], segments.start, segments.count)
    return torch.zeros_like(logits).scatter(0, segments.order, logits)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selectors_are_one_small_network_a_class(backend: str, dtype: torch.dtype) -> None:
    selectors = ClassSelectors(5, 16, backend=backend).to(dtype)
    with torch.no_grad():
        selectors.norm_weight.uniform_(0.5, 2)
        selectors.norm_bias.normal_()
    close = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    for _ in range(3):
        rows, labels = torch.randn(60, 16, dtype=dtype), torch.randint(-1, 4, (60,))  # class 4 is absent
        labels[labels == 3] = 255
        labels[7] = 3  # class 3 has one row
        networks = [plain_selector(selectors, c) for c in range(5)]
        mine = rows.clone().requires_grad_()
        logits = logits_of(selectors, mine, labels)
        assert (logits[(labels < 0) | (labels > 4)] == 0).all()
        logits.square().sum().backward()
        for c, network in enumerate(networks):
            member = labels == c
            if c in (3, 4):
                network.eval()  # too few rows: running statistics, untouched
            theirs = rows[member].clone().requires_grad_()
            expected = network(theirs)[:, 0]
            torch.testing.assert_close(logits[member], expected, **close)
            expected.square().sum().backward()
            torch.testing.assert_close(mine.grad[member], theirs.grad, **close)
            torch.testing.assert_close(selectors.running_mean[c], network[1].running_mean, **close)
            torch.testing.assert_close(selectors.running_var[c], network[1].running_var, **close)
            torch.testing.assert_close(selectors.weight1.grad[c], network[0].weight.grad, **close)
            torch.testing.assert_close(selectors.bias1.grad[c], network[0].bias.grad, **close)
            torch.testing.assert_close(selectors.weight2.grad[c], network[3].weight.grad[0], **close)
            torch.testing.assert_close(selectors.norm_weight.grad[c], network[1].weight.grad, **close)
            torch.testing.assert_close(selectors.norm_bias.grad[c], network[1].bias.grad, **close)
            torch.testing.assert_close(selectors.bias2.grad[c], network[3].bias.grad[0], **close)
        selectors.zero_grad()
    selectors.eval()
    labels = torch.arange(60) % 5
    for c in range(5):
        expected = plain_selector(selectors, c).eval()(rows[labels == c])[:, 0]
        torch.testing.assert_close(logits_of(selectors, rows, labels)[labels == c], expected, **close)


def test_rows_of_no_class_may_be_anything() -> None:
    selectors = ClassSelectors(3, 16)
    rows, labels = torch.randn(9, 16), torch.arange(9) % 4 - 1
    rows[labels == -1] = float("nan")
    rows.requires_grad_()
    logits_of(selectors, rows, labels).sum().backward()
    assert all(p.grad.isfinite().all() for p in selectors.parameters()) and (rows.grad[labels == -1] == 0).all()
    assert logits_of(selectors, torch.randn(0, 16), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_without_rows_every_gradient_is_zero(backend: str, autocast: bool) -> None:
    selectors = ClassSelectors(3, 16, backend=backend)
    rows = torch.randn(5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits_of(selectors, rows, torch.full((5,), -1)).sum().backward()
    assert all((leaf.grad == 0).all() for leaf in (rows, *selectors.parameters()))


def test_selectors_in_autocast_multiply_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = torch.ops.pixcontrast.grouped_linear
    monkeypatch.setattr(torch.ops.pixcontrast, "grouped_linear", lambda *a: seen.append(a[0].dtype) or real(*a))
    selectors, rows, labels = ClassSelectors(3, 16), torch.randn(60, 16), torch.arange(60) % 3
    expected = logits_of(selectors, rows, labels)
    with torch.autocast("cpu", torch.bfloat16):
        logits = logits_of(selectors, rows, labels)
    assert seen == [torch.float32, torch.bfloat16] and logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05)


def plain_head(head: MLPHead) -> nn.Sequential:
    """The same from PyTorch's own modules."""
    width, channels = head.first.weight.shape
    layers = nn.Sequential(nn.Linear(channels, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
    layers.to(head.first.weight.dtype)
    layers.load_state_dict(dict(zip(layers.state_dict(), head.state_dict().values(), strict=True)))
    return layers


def one_segment(valid: Tensor) -> Segments:
    """The valid rows as one segment, in their order."""
    return class_order(torch.where(valid, 0, -1), 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_head_is_linear_norm_relu_linear_of_the_valid_rows(backend: str, training: bool) -> None:
    head = MLPHead(7, 16, backend).double()
    with torch.no_grad():
        head.norm.weight.uniform_(0.5, 2)
        head.norm.bias.normal_()
        head.norm.running_var.uniform_(0.5, 2)
    head.train(training)
    for count in (40, 40, 1, 0):
        layers = plain_head(head).train(training and count > 1)  # too few rows: running statistics, untouched
        rows, valid = torch.randn(50, 7).double(), torch.randperm(50) < count
        mine, theirs = rows.clone().requires_grad_(), rows[valid].clone().requires_grad_()
        result, expected = head(mine, one_segment(valid))[:count], layers(theirs)
        torch.testing.assert_close(result, expected)
        head.zero_grad()
        result.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(mine.grad[valid], theirs.grad)
        assert (mine.grad[~valid] == 0).all()
        for (name, parameter), other in zip(head.named_parameters(), layers.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)
        for buffer, other in zip(head.norm.buffers(), layers[1].buffers(), strict=True):
            torch.testing.assert_close(buffer, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_of_all_rows(backend: str) -> None:
    head, rows = MLPHead(7, 16, backend), torch.randn(12, 7)
    torch.testing.assert_close(plain_head(head)(rows), head(rows))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_head_of_a_map_is_that_of_its_pixels(memory_format: torch.memory_format) -> None:
    head = MLPHead(7, 16).double()
    features = torch.randn(3, 7, 4, 5).double().to(memory_format=memory_format).requires_grad_()
    rows = features.detach().permute(0, 2, 3, 1).reshape(-1, 7).requires_grad_()
    segments = class_order(torch.randint(-1, 3, (3, 4, 5)), 3)
    result = head(features, segments)
    expected = plain_head(head)(rows[segments.order][: int(segments.total)])
    torch.testing.assert_close(result[: len(expected)], expected)
    result[: len(expected)].square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(features.grad.permute(0, 2, 3, 1).reshape(-1, 7), rows.grad)
    assert features.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pixel_linear(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    features, weight = torch.randn(2, 6, 3, 4, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    features, weight, grad = features.to(dtype), weight.to(dtype), torch.randn(24, 5, dtype=torch.float64).to(dtype)
    mine = [features.to(memory_format=memory_format).requires_grad_(), weight.requires_grad_()]
    theirs = [t.detach().double().requires_grad_() for t in (features, weight)]
    result, expected = pixel_linear(*mine), theirs[0].permute(0, 2, 3, 1).reshape(24, 6) @ theirs[1].t()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(result.double(), expected, rtol=2 * eps, atol=8 * eps)
    pairs = zip(
        torch.autograd.grad(result, mine, grad), torch.autograd.grad(expected, theirs, grad.double()), strict=True
    )
    for got, exact in pairs:
        torch.testing.assert_close(got.double(), exact, rtol=2 * eps, atol=16 * eps)


def test_a_head_in_autocast() -> None:
    head, rows = MLPHead(7, 16), torch.randn(200, 7)
    expected = plain_head(head)(rows)
    with torch.autocast("cpu", torch.bfloat16):
        result = head(rows)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.05)
    result.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in head.parameters())


def test_a_head_in_half_precision_moves_its_own_statistics() -> None:
    head = MLPHead(7, 16).to(torch.bfloat16)
    head(torch.randn(50, 7, dtype=torch.bfloat16) + 3)
    assert head.norm.running_mean.dtype == torch.bfloat16 and head.norm.running_mean.abs().max() > 0
