"""The operators of the class selectors, against PyTorch's functions class by class."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, leaky_relu

from pixcontrast.functions import Selector

MEMBERS = (300, 0, 1, 129, 2100, 2)  # rows of each class: several blocks, none, one, two blocks, two sums, two
NO_CLASS = 5  # rows
EPS = 1e-5
NAMES = ("rows", "first", "mean", "norm_weight", "norm_bias", "weight", "bias")
Results = dict[str, Tensor]


def inputs(dtype: torch.dtype, dim: int, width: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Leaves, labels ``[N]`` and the incoming gradient ``[N]``. Hidden rows are far from zero, beside their spread:
    careless sums of squares would show."""
    g = torch.Generator().manual_seed(dim)
    labels = torch.arange(-1, len(MEMBERS)).repeat_interleave(torch.tensor([NO_CLASS, *MEMBERS]))
    labels = labels[torch.randperm(len(labels), generator=g)]
    shape = (len(MEMBERS), width)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    rows = (0.1 * torch.randn(len(labels), dim, generator=g).double() + 1).to(dtype)
    first = torch.randn(len(MEMBERS), width, dim, generator=g).to(dtype)
    numbers = [torch.randn(shape, generator=g).to(sums) for _ in range(4)]
    leaves = [rows, first, *numbers, torch.randn(len(MEMBERS), generator=g).to(sums)]
    return dict(zip(NAMES, leaves, strict=True)), labels, torch.randn(len(labels), generator=g).to(sums)


def away_from_the_kink(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers that no rounding takes to the other side of zero, where another gradient would be right."""
    weight, bias = values["norm_weight"], values["norm_bias"]
    return values | {"norm_weight": weight.clamp(-1, 1), "norm_bias": torch.full_like(bias, 10).copysign(bias)}


def differentiated(scores: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> Results:
    grads = torch.autograd.grad(scores, list(leaves.values()), grad)
    return {"scores": scores.detach(), **dict(zip(leaves, grads, strict=True))}


def by_operators(
    values: dict[str, Tensor], labels: Tensor, grad: Tensor, product: torch.dtype | None = None
) -> Results:
    """``product``: the dtype of the first product, if it is not that of the rows."""
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    rows, first = leaves["rows"], leaves["first"]
    order, ends = torch.ops.pixcontrast.sort_by_class(labels, len(MEMBERS))
    order = order[: ends[-1]]
    hidden, mean, variance = torch.ops.pixcontrast.selector_hidden(
        rows.detach(), order, ends, first.detach(), product or rows.dtype
    )
    own = torch.tensor(MEMBERS) >= 2
    mean = torch.where(own[:, None], mean, leaves["mean"])
    rstd = torch.rsqrt(torch.where(own[:, None], variance, 1) + EPS)
    parameters = [leaves[name] for name in NAMES[3:]]
    scores = Selector.apply(rows, order, ends, first, hidden, mean, rstd, *parameters, own)
    return differentiated(scores, leaves, grad)


def by_modules(values: dict[str, Tensor], labels: Tensor, grad: Tensor) -> Results:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    scores = torch.zeros_like(grad)
    for c in range(len(MEMBERS)):
        member = labels == c
        mean, norm_weight, norm_bias, weight, bias = (leaves[name][c] for name in NAMES[2:])
        hidden = (leaves["rows"][member] @ leaves["first"][c].t()).to(grad.dtype)
        if MEMBERS[c] >= 2:
            normed = batch_norm(hidden, None, None, norm_weight, norm_bias, True, eps=EPS)
        else:
            normed = (hidden - mean) * (1 + EPS) ** -0.5 * norm_weight + norm_bias
        scores = scores.masked_scatter(member, leaky_relu(normed, 0.2) @ weight + bias)
    return differentiated(scores, leaves, grad)


def errors(results: Results, truth: Results) -> dict[str, float]:
    return {n: float((results[n].double() - t).abs().max() / t.abs().max()) for n, t in truth.items()}


def errors_of(run: object, dtype: torch.dtype, dim: int, width: int, **options: object) -> dict[str, float]:
    values, labels, grad = inputs(dtype, dim, width)
    if dtype != torch.float64:
        values = away_from_the_kink(values)
    truth = by_modules({name: value.double() for name, value in values.items()}, labels, grad.double())
    return errors(run(values, labels, grad, **options), truth)  # type: ignore[operator]


# beyond whole vectors of every instruction set, and nowhere near one
SIZES = [(64, 70), (70, 64), (17, 33), (1, 1)]


def worst(dtype: torch.dtype = torch.float64) -> float:
    return max(max(errors_of(by_operators, dtype, *size).values()) for size in SIZES)


def test_agrees_with_modules_in_float64() -> None:
    assert worst() < 1e-12


@pytest.mark.parametrize("size", SIZES[:3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_errors_are_no_larger_than_those_of_the_modules(dtype: torch.dtype, size: tuple[int, int]) -> None:
    allowed = errors_of(by_modules, dtype, *size)
    for name, error in errors_of(by_operators, dtype, *size).items():
        assert error <= 3 * allowed[name] + torch.finfo(dtype if name in ("rows", "first") else torch.float32).eps, name


@pytest.mark.parametrize("product", [torch.bfloat16, torch.float16])
def test_rows_of_float32_may_be_multiplied_in_less(product: torch.dtype) -> None:
    values, labels, grad = inputs(torch.float32, 70, 64)
    rounded = values | {name: values[name].to(product) for name in ("rows", "first")}
    expected, result = by_operators(rounded, labels, grad), by_operators(values, labels, grad, product)
    for name, value in result.items():
        assert value.dtype == torch.float32
        assert torch.equal(value.to(expected[name].dtype), expected[name]), name


def test_same_bits_with_any_number_of_threads() -> None:
    values, labels, grad = inputs(torch.float32, 70, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(by_operators(values, labels, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set_agrees(capability: str) -> None:
    environment = os.environ | {"PIXCONTRAST_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parent)}
    code = "import test_selector; print(test_selector.worst())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    values, labels, grad = inputs(dtype, 16, 24)
    library = torch.ops.pixcontrast
    torch.library.opcheck(library.sort_by_class.default, (labels, len(MEMBERS)))
    order, ends = library.sort_by_class(labels, len(MEMBERS))
    rows, order = values["rows"], order[: ends[-1]]
    torch.library.opcheck(library.selector_hidden.default, (rows, order, ends, values["first"], dtype))
    hidden, mean, _ = library.selector_hidden(rows, order, ends, values["first"], dtype)
    norm = (hidden, mean, torch.ones_like(mean), *(values[name] for name in NAMES[3:6]))
    torch.library.opcheck(library.selector.default, (rows, order, ends, *norm, values["bias"]))
    own = torch.tensor(MEMBERS) >= 2
    for rows_grad in (True, False):
        torch.library.opcheck(
            library.selector_backward.default, (grad, rows, order, ends, values["first"], *norm, own, rows_grad)
        )


def test_rows_are_sorted_by_class() -> None:
    labels = torch.tensor([2, 255, 0, 2, -1, 0, 3])
    order, ends = torch.ops.pixcontrast.sort_by_class(labels, 4)
    assert order.tolist() == [2, 5, 0, 3, 6, 1, 4] and ends.tolist() == [2, 2, 4, 5]
    order, ends = torch.ops.pixcontrast.sort_by_class(labels[:0], 2)
    assert order.tolist() == [] and ends.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("order", "ends", "named"),
    [
        ([0, 1, 2], [1, 0, 3], "ends must ascend"),
        ([0, 1, 2], [-1, 1, 3], "ends must ascend"),
        ([0, 1, 2], [1, 2, 2], "the last of ends"),
        ([0, 1, 4], [1, 2, 3], "order must name rows once, got 4"),
        ([0, -1, 2], [1, 2, 3], "order must name rows once, got -1"),
        ([0, 2, 2], [1, 2, 3], "order must name rows once, got 2"),
    ],
)
def test_places_out_of_bounds_are_refused(order: list[int], ends: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        torch.ops.pixcontrast.selector_hidden(
            torch.zeros(4, 8), torch.tensor(order), torch.tensor(ends), torch.zeros(3, 5, 8), torch.float32
        )


def test_dtypes_that_no_product_takes_are_refused() -> None:
    order, ends = torch.arange(4), torch.tensor([4])
    with pytest.raises(TypeError, match="rows must be Float, got"):
        torch.ops.pixcontrast.selector_hidden(
            torch.zeros(4, 8, dtype=torch.float16), order, ends, torch.zeros(1, 5, 8), torch.float32
        )
