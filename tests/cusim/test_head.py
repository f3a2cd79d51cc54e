"""The kernels of the heads behind their first product against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, linear, relu

from cusim.kernels import WAYS, Kernels, Way

FLOAT, BF16, HALF = TYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = WAYS[0]
TF32 = 2.0**-11  # relative error of one rounding
EPS = 1e-5
PRODUCTS = [(FLOAT, False), (FLOAT, True), (BF16, True), (HALF, True), (BF16, False), (HALF, False)]
Results = dict[str, Tensor]


@pytest.fixture(scope="module")
def head(kernels: Callable[..., Kernels]) -> Kernels:
    return kernels("head", "head_backward")


@dataclass
class Case:
    """``hidden [P, E]``, ``valid [P]`` or None, ``grad [P, O]`` and the parameters; what takes no part is NaN."""

    hidden: Tensor
    valid: Tensor | None
    norm_weight: Tensor
    norm_bias: Tensor
    weight: Tensor
    bias: Tensor
    grad: Tensor
    tensor_cores: bool
    own: bool  # whether mean and variance are those of the rows

    @property
    def used(self) -> Tensor:
        return torch.ones(len(self.hidden), dtype=torch.bool) if self.valid is None else self.valid


def make_case(
    rows: int,
    width: int,
    outputs: int,
    dtype: torch.dtype,
    tensor_cores: bool,
    *,
    masked: bool = True,
    own: bool = True,
) -> Case:
    """Columns with a mean of 4. No y is so near to zero that rounding could take it to the other side."""
    g = torch.Generator().manual_seed(rows + width)
    hidden = torch.randn(rows, width, generator=g) + 4
    norm_bias = torch.full((width,), 3.0).copysign(torch.randn(width, generator=g))
    valid = torch.rand(rows, generator=g) < 0.7 if masked else None
    grad = torch.randn(rows, outputs, generator=g)
    if valid is not None:
        hidden[~valid], grad[~valid] = torch.nan, torch.nan
    norm_weight = torch.rand(width, generator=g) * 0.5
    weight, bias = torch.randn(outputs, width, generator=g), torch.randn(outputs, generator=g)
    return Case(
        hidden.to(dtype), valid, norm_weight, norm_bias, weight.to(dtype), bias, grad.to(dtype), tensor_cores, own
    )


def formula(case: Case, dtype: torch.dtype) -> Results:
    """In ``dtype``, by PyTorch's functions on the rows that take part, from the numbers of the case."""
    names = ("norm_weight", "norm_bias", "weight", "bias")
    hidden = case.hidden[case.used].to(dtype).requires_grad_()
    norm_weight, norm_bias, weight, bias = (getattr(case, name).to(dtype).requires_grad_() for name in names)
    mean, variance = constants(case, dtype)
    own = case.own and len(hidden) > 1
    out = linear(relu(batch_norm(hidden, mean, variance, norm_weight, norm_bias, own, 0.0, EPS)), weight, bias)
    leaves = (hidden, norm_weight, norm_bias, weight, bias)
    gradients = torch.autograd.grad(out, leaves, case.grad[case.used].to(dtype))
    return {"out": out.detach()} | dict(zip(("hidden", *names), gradients, strict=True))


def constants(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance where they are not those of the rows."""
    return torch.full_like(case.norm_bias, 3.9, dtype=dtype), torch.full_like(case.norm_bias, 1.1, dtype=dtype)


def run(head: Kernels, way: Way, case: Case) -> Results:
    dtype, (rows, width), outputs = case.hidden.dtype, case.hidden.shape, len(case.weight)
    kind, sizes = TYPES.index(dtype), (int(case.tensor_cores), rows, width, outputs)
    room = torch.full((12 * 64 * width,), 0xFF, dtype=torch.uint8)
    mean, variance, count = torch.full((width,), 7.0), torch.full((width,), 7.0), torch.zeros(1, dtype=torch.int64)
    head.run(way, "run_moments", kind, rows, width, case.hidden, case.valid, room, len(room), mean, variance, count)
    used = case.hidden[case.used].double()
    assert count == len(used)
    if len(used) > 0:
        torch.testing.assert_close(mean.double(), used.mean(0), rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(variance.double(), used.var(0, correction=0), rtol=1e-5, atol=1e-6, equal_nan=True)
    share = 1 / count.float()
    if not case.own or len(used) < 2:
        (mean, variance), share = constants(case, FLOAT), torch.zeros(1)
    norm = (mean, torch.rsqrt(variance + EPS), case.norm_weight, case.norm_bias)
    out, hidden = torch.full((rows, outputs), 7, dtype=dtype), torch.full((rows, width), 7, dtype=dtype)
    room = torch.full((8 * (width + 127) + 512,), 0xFF, dtype=torch.uint8)
    inputs = (case.hidden, case.valid, *norm, case.weight)
    head.run(way, "run_head", kind, *sizes, *inputs, case.bias, room, len(room), out)
    gradients = [
        torch.full_like(t, 7.0, dtype=FLOAT) for t in (case.norm_weight, case.norm_bias, case.weight, case.bias)
    ]
    room = torch.full(
        (4 * (70 * outputs * width + 64 * (2 * width + outputs)) + 8 * (width + 127) + 1536,), 0xFF, dtype=torch.uint8
    )
    head.run(
        way, "run_head_backward", kind, *sizes, *inputs, case.grad, share, room, len(room), hidden, *gradients,
    )  # fmt: skip
    names = ("norm_weight", "norm_bias", "weight", "bias")
    return {"out": out, "hidden": hidden} | dict(zip(names, gradients, strict=True))


def magnitudes(case: Case) -> Results:
    """Sums of absolute terms, which roundings of the operands are relative to."""
    hidden, grad = (t[case.used].double() for t in (case.hidden, case.grad))
    own = case.own and len(hidden) > 1
    mean, variance = (hidden.mean(0), hidden.var(0, correction=0)) if own else constants(case, torch.float64)
    rstd, weight = torch.rsqrt(variance + EPS), case.weight.double().abs()
    x = (hidden - mean) * rstd
    z = relu(x * case.norm_weight + case.norm_bias)
    s = torch.where(z > 0, grad.abs() @ weight, 0)
    norm_weight, norm_bias = (s * x.abs()).sum(0), s.sum(0)
    through = (norm_bias + x.abs() * norm_weight) / max(len(hidden), 1) if own else 0
    return {
        "out": z @ weight.t() + case.bias.abs(),
        "hidden": case.norm_weight * rstd * (s + through),
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "weight": grad.abs().t() @ z,
        "bias": grad.abs().sum(0),
    }


def check(case: Case, results: Results) -> None:
    """Errors of at most a small factor of float32's, and of two roundings of the operands of a product."""
    truth, plain, sizes = formula(case, torch.float64), formula(case, FLOAT), magnitudes(case)
    unit = torch.finfo(case.hidden.dtype).eps / 2
    if case.hidden.dtype == FLOAT:
        unit = TF32 if case.tensor_cores else 0.0
    for name, exact in truth.items():
        if exact.numel() == 0:
            continue
        result = results[name][case.used] if name in ("out", "hidden") else results[name]
        error = (result.double() - exact).abs()
        allowed = 4 * (plain[name].double() - exact).abs().max() + 2 * unit * sizes[name] + 1e-7 * sizes[name]
        if name in ("out", "hidden"):
            allowed += unit * exact.abs() + (2.0**-25 if case.hidden.dtype == HALF else 0)
        assert (error <= allowed).all(), f"{name}: {float((error - allowed).max()):.2e} too much"
    for name in ("out", "hidden"):
        assert (results[name][~case.used] == 0).all()


@pytest.mark.parametrize(("dtype", "tensor_cores"), PRODUCTS)
def test_every_build_and_order(head: Kernels, way: Way, dtype: torch.dtype, tensor_cores: bool) -> None:
    case = make_case(150, 40, 24, dtype, tensor_cores)
    check(case, run(head, way, case))


@pytest.mark.parametrize("width", [1, 3, 64, 129, 257])
@pytest.mark.parametrize("outputs", [1, 19, 130])
@pytest.mark.parametrize(("dtype", "tensor_cores"), PRODUCTS[:3])
def test_widths(head: Kernels, dtype: torch.dtype, tensor_cores: bool, width: int, outputs: int) -> None:
    case = make_case(21, width, outputs, dtype, tensor_cores)
    check(case, run(head, PLAIN, case))


@pytest.mark.parametrize("build", ["plain", "race"])
@pytest.mark.parametrize(("dtype", "tensor_cores"), PRODUCTS[:3])
def test_several_parts_and_all_rows(head: Kernels, dtype: torch.dtype, tensor_cores: bool, build: str) -> None:
    case = make_case(700, 16, 8, dtype, tensor_cores, masked=False)
    check(case, run(head, Way(build, 0), case))


@pytest.mark.parametrize(("dtype", "tensor_cores"), PRODUCTS[:3])
def test_statistics_that_are_constants(head: Kernels, dtype: torch.dtype, tensor_cores: bool) -> None:
    case = make_case(50, 24, 16, dtype, tensor_cores, own=False)
    check(case, run(head, PLAIN, case))


def test_the_kink_of_relu_is_at_zero(head: Kernels) -> None:
    case = make_case(80, 24, 16, FLOAT, False)
    case.norm_bias *= 0.1  # y on both sides, none as near to zero as rounding is
    check(case, run(head, PLAIN, case))


@pytest.mark.parametrize(("dtype", "tensor_cores"), PRODUCTS[:3])
def test_nan_passes_the_rectifier(head: Kernels, dtype: torch.dtype, tensor_cores: bool) -> None:
    case = make_case(30, 24, 16, dtype, tensor_cores, masked=False, own=False)
    case.hidden[7, 3] = torch.nan
    out = run(head, PLAIN, case)["out"]
    assert out[7].isnan().all()
    assert out[torch.arange(30) != 7].isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_few_rows(head: Kernels, rows: int) -> None:
    for masked in (False, True):
        case = make_case(rows, 8, 8, FLOAT, False, masked=masked, own=rows > 2)
        check(case, run(head, PLAIN, case))
        if case.valid is not None:
            case.valid[:] = False
            check(case, run(head, PLAIN, case))


def test_same_bits_in_every_order(head: Kernels) -> None:
    case = make_case(600, 24, 8, FLOAT, False)
    expected = run(head, WAYS[0], case)
    for way in WAYS[1:4]:
        results = run(head, way, case)
        assert all(torch.equal(results[name], expected[name]) for name in expected)
