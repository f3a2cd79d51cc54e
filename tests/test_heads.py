"""Heads and selectors against the modules of PyTorch, one class and one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pixcontrast import heads, ops
from pixcontrast.heads import ClassSelectors, MaskedBatchNorm1d, MLPHead, grouped_linear, grouped_outer


def test_masked_batch_norm_is_batch_norm_of_the_valid_rows() -> None:
    masked, plain = MaskedBatchNorm1d(6).double(), nn.BatchNorm1d(6).double()
    for _ in range(3):
        rows, valid = torch.randn(20, 6).double() * 3 + 1, torch.rand(20) < 0.6
        mine, theirs = rows.clone().requires_grad_(), rows[valid].clone().requires_grad_()
        result, expected = masked(mine, valid)[valid], plain(theirs)
        torch.testing.assert_close(result, expected)
        result.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(mine.grad[valid], theirs.grad)
        assert (mine.grad[~valid] == 0).all()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(masked.state_dict()[name], value)
    masked.eval(), plain.eval()
    torch.testing.assert_close(masked(rows), plain(rows))


@pytest.mark.parametrize("count", [0, 1])
def test_masked_batch_norm_of_too_few_rows_uses_the_running_statistics(count: int) -> None:
    norm = MaskedBatchNorm1d(4)
    norm(torch.randn(30, 4) * 2 + 5)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    rows, valid = torch.randn(5, 4), torch.arange(5) < count
    result = norm(rows, valid)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm.eval()
    torch.testing.assert_close(result[:count], norm(rows)[:count])


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


@pytest.fixture(params=["by kernels", "by PyTorch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to compute the layers: by kernels, and that of devices which have none or must not be waited for."""
    if request.param == "by PyTorch":
        monkeypatch.setattr("pixcontrast.heads.can_look", lambda _: False)
        monkeypatch.setattr("pixcontrast.heads.MLPHead._fuses", staticmethod(lambda _: False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selectors_are_one_small_network_a_class(form: None, dtype: torch.dtype) -> None:
    selectors = ClassSelectors(5, 16).to(dtype)
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
        logits = selectors(mine, labels)
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
            if c < 3:
                torch.testing.assert_close(selectors.weight1.grad[c], network[0].weight.grad, **close)
                torch.testing.assert_close(selectors.weight2.grad[c], network[3].weight.grad[0], **close)
                torch.testing.assert_close(selectors.norm_weight.grad[c], network[1].weight.grad, **close)
                torch.testing.assert_close(selectors.bias2.grad[c], network[3].bias.grad[0], **close)
        selectors.zero_grad()
    selectors.eval()
    labels = torch.arange(60) % 5
    for c in range(5):
        expected = plain_selector(selectors, c).eval()(rows[labels == c])[:, 0]
        torch.testing.assert_close(selectors(rows, labels)[labels == c], expected, **close)


def test_rows_of_no_class_may_be_anything(form: None) -> None:
    selectors = ClassSelectors(3, 16)
    rows, labels = torch.randn(9, 16), torch.arange(9) % 4 - 1
    rows[labels == -1] = float("nan")
    rows.requires_grad_()
    selectors(rows, labels).sum().backward()
    assert all(p.grad.isfinite().all() for p in selectors.parameters()) and (rows.grad[labels == -1] == 0).all()
    assert selectors(torch.randn(0, 16), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("autocast", [False, True])
def test_without_rows_every_gradient_is_zero(form: None, autocast: bool) -> None:
    selectors = ClassSelectors(3, 16)
    rows = torch.randn(5, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        selectors(rows, torch.full((5,), -1)).sum().backward()
    assert all((leaf.grad == 0).all() for leaf in (rows, *selectors.parameters()))


@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 16), (torch.float32, 15), (torch.float64, 16)])
def test_grouped_linear(dtype: torch.dtype, dim: int) -> None:
    rows = torch.randn(20, dim, dtype=dtype)
    weight = torch.randn(4, dim, dim, dtype=dtype)
    ends = torch.tensor([5, 5, 12, 20], dtype=torch.int32)  # the second group is empty
    result = grouped_linear(rows, weight, ends)
    begin = 0
    for c, end in enumerate(ends.tolist()):
        torch.testing.assert_close(result[begin:end], rows[begin:end] @ weight[c].t())
        begin = end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(20, 16, dtype=dtype), torch.randn(4, 24, 16, dtype=dtype)
    ends = torch.tensor([5, 5, 12, 20], dtype=torch.int32)
    torch.library.opcheck(grouped_linear, (rows.requires_grad_(), weight.requires_grad_(), ends))
    torch.library.opcheck(grouped_outer, (torch.randn(20, 24, dtype=dtype), rows.detach(), ends))


def plain_head(head: MLPHead) -> nn.Sequential:
    """The same from PyTorch's own modules."""
    width, channels = head.first.weight.shape
    layers = nn.Sequential(nn.Linear(channels, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
    layers.to(head.first.weight.dtype)
    layers.load_state_dict(dict(zip(layers.state_dict(), head.state_dict().values(), strict=True)))
    return layers


@pytest.mark.parametrize("training", [True, False])
def test_a_head_is_linear_norm_relu_linear_of_the_valid_rows(form: None, training: bool) -> None:
    head = MLPHead(7, 16).double()
    with torch.no_grad():
        head.norm.weight.uniform_(0.5, 2)
        head.norm.bias.normal_()
        head.norm.running_var.uniform_(0.5, 2)
    head.train(training)
    for count in (40, 40, 1, 0):
        layers = plain_head(head).train(training and count > 1)  # too few rows: running statistics, untouched
        rows, valid = torch.randn(50, 7).double(), torch.randperm(50) < count
        mine, theirs = rows.clone().requires_grad_(), rows[valid].clone().requires_grad_()
        result, expected = head(mine, valid)[valid], layers(theirs)
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


def test_a_head_of_all_rows(form: None) -> None:
    head, rows = MLPHead(7, 16), torch.randn(12, 7)
    torch.testing.assert_close(plain_head(head)(rows), head(rows))


def test_a_head_in_autocast(form: None) -> None:
    head, rows = MLPHead(7, 16), torch.randn(200, 7)
    expected = plain_head(head)(rows)
    with torch.autocast("cpu", torch.bfloat16):
        result = head(rows)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.05)
    result.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "expected"),
    [
        (torch.bfloat16, 256, (9, 0), True),
        (torch.bfloat16, 250, (9, 0), False),  # rows of no multiple of 16 bytes
        (torch.bfloat16, 256, (8, 0), False),  # would copy the offsets to the host
        (torch.bfloat16, 256, (10, 0), False),  # pytorch#172439
        (torch.float16, 256, (9, 0), False),
        (torch.float32, 256, (9, 0), False),
    ],
)
def test_grouped_mm_computes_on_a_gpu_only_what_it_computes_rightly_and_asynchronously(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dim: int, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ops, "missing_kernel", lambda device, dtype: None)
    with FakeTensorMode():
        rows, weight = (
            torch.empty(8, dim, dtype=dtype, device="cuda"),
            torch.empty(3, 4, dim, dtype=dtype, device="cuda"),
        )
        assert heads._uses_grouped_mm(rows, weight) is expected
        assert heads._has_own_kernel(rows)


def test_grouped_mm_is_taken_where_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "missing_kernel", lambda device, dtype: "built without CUDA kernels")
    with FakeTensorMode():
        assert heads._uses_grouped_mm(torch.empty(8, 256, device="cuda"))
    assert not heads._uses_grouped_mm(torch.empty(8, 256, dtype=torch.float64))
