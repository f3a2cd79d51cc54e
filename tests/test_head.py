"""The operators of the heads behind their first product, against PyTorch's functions on the rows that take part."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import batch_norm, linear, relu

from pixcontrast.functions import Head

EPS = 1e-5
NAMES = ("hidden", "norm_weight", "norm_bias", "weight", "bias")
Results = dict[str, Tensor]


def inputs(dtype: torch.dtype, rows: int, width: int, outputs: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Leaves, which rows take part ``[P]``, and the incoming gradient ``[P, O]``. The rows are far from zero."""
    g = torch.Generator().manual_seed(rows)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = {"norm_weight": (width,), "norm_bias": (width,), "weight": (outputs, width), "bias": (outputs,)}
    leaves = {name: torch.randn(shape, generator=g).to(sums) for name, shape in shapes.items()}
    hidden = (torch.randn(rows, width, generator=g).double() + 20).to(dtype)
    valid = torch.rand(rows, generator=g) < 0.8
    return {"hidden": hidden} | leaves, valid, torch.randn(rows, outputs, generator=g).to(dtype)


def away_from_the_kink(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers that no rounding takes to the other side of zero, where another gradient would be right."""
    weight, bias = values["norm_weight"], values["norm_bias"]
    return values | {"norm_weight": weight.clamp(-1, 1), "norm_bias": torch.full_like(bias, 10).copysign(bias)}


def differentiated(out: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> Results:
    return {
        "out": out.detach(),
        **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True)),
    }


def by_operators(values: dict[str, Tensor], valid: Tensor | None, grad: Tensor, own: bool) -> Results:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    hidden = leaves["hidden"]
    mean, variance, count = torch.ops.pixcontrast.head_moments(hidden.detach(), valid)
    assert count == (len(hidden) if valid is None else valid.sum())
    share = 1 / count.to(mean.dtype)
    if not own:
        mean, variance, share = torch.full_like(mean, 19.5), torch.full_like(variance, 2.0), torch.zeros_like(share)
    parameters = [leaves[name] for name in NAMES[1:]]
    out = Head.apply(hidden, valid, mean, torch.rsqrt(variance + EPS), *parameters, share)
    return differentiated(out, leaves, grad)


def by_modules(values: dict[str, Tensor], valid: Tensor | None, grad: Tensor, own: bool) -> Results:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    hidden = leaves["hidden"] if valid is None else leaves["hidden"][valid]
    norm_weight, norm_bias, weight, bias = (leaves[name] for name in NAMES[1:])
    sums = hidden.to(norm_weight.dtype)
    mean, variance = torch.full_like(norm_weight, 19.5), torch.full_like(norm_weight, 2.0)
    normed = batch_norm(sums, mean.detach(), variance.detach(), norm_weight, norm_bias, own, 0.0, EPS)
    some = linear(relu(normed).to(hidden.dtype), weight.to(hidden.dtype), bias.to(hidden.dtype))
    out = some if valid is None else torch.zeros_like(grad).masked_scatter(valid[:, None], some)
    return differentiated(out, leaves, grad)


# several blocks, beyond whole vectors of every instruction set; several sums of the gradient; few; one
SIZES = [(700, 70, 33), (5000, 32, 16), (3, 17, 64), (2, 1, 1)]


def errors_of(run: object, dtype: torch.dtype, size: tuple[int, int, int], own: bool, masked: bool) -> dict[str, float]:
    values, valid, grad = inputs(dtype, *size)
    if dtype != torch.float64:
        values = away_from_the_kink(values)
    mask = valid if masked else None
    truth = by_modules({name: value.double() for name, value in values.items()}, mask, grad.double(), own)
    results = run(values, mask, grad, own)  # type: ignore[operator]
    return {n: float((results[n].double() - t).abs().max() / t.abs().max().clamp_min(1e-300)) for n, t in truth.items()}


def worst() -> float:
    return max(
        max(errors_of(by_operators, torch.float64, size, own, masked).values())
        for size in SIZES[:3]
        for own in (True, False)
        for masked in (True, False)
    )


def test_agrees_with_modules_in_float64() -> None:
    assert worst() < 1e-12


def test_two_rows_of_one_channel() -> None:
    # the normalised rows are 1 and -1 whatever they were, so that their gradient is zero but for rounding
    values, _, grad = inputs(torch.float64, *SIZES[3])
    result, truth = (run(values, None, grad, True) for run in (by_operators, by_modules))
    for name in ("out", *NAMES):
        torch.testing.assert_close(result[name], truth[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_errors_are_no_larger_than_those_of_the_modules(dtype: torch.dtype) -> None:
    for size in SIZES[:3]:
        allowed = errors_of(by_modules, dtype, size, True, True)
        for name, error in errors_of(by_operators, dtype, size, True, True).items():
            assert error <= 3 * allowed[name] + torch.finfo(dtype).eps, (size, name)


def test_rows_that_take_no_part_may_be_anything() -> None:
    values, valid, grad = inputs(torch.float32, *SIZES[0])
    expected = by_operators(values, valid, grad, True)
    values["hidden"][~valid], grad[~valid] = float("nan"), float("nan")
    result = by_operators(values, valid, grad, True)
    assert all(torch.equal(result[name], expected[name]) for name in result)
    assert (result["out"][~valid] == 0).all() and (result["hidden"][~valid] == 0).all()


@pytest.mark.parametrize("rows", [0, 5])
def test_no_row_at_all(rows: int) -> None:
    values, _, grad = inputs(torch.float32, 5, 16, 8)
    values["hidden"], grad = values["hidden"][:rows], grad[:rows]
    result = by_operators(values, torch.zeros(rows, dtype=torch.bool), grad, False)
    assert all((value == 0).all() for value in result.values())


def test_same_bits_with_any_number_of_threads() -> None:
    values, valid, grad = inputs(torch.float32, *SIZES[1])
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(by_operators(values, valid, grad, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)


@pytest.mark.parametrize("capability", ["baseline", "avx2"])
def test_every_instruction_set_agrees(capability: str) -> None:
    environment = os.environ | {"PIXCONTRAST_CPU_CAPABILITY": capability, "PYTHONPATH": str(Path(__file__).parent)}
    code = "import test_head; print(test_head.worst())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    values, valid, grad = inputs(dtype, 30, 16, 24)
    library, hidden = torch.ops.pixcontrast, values["hidden"]
    for mask in (valid, None):
        torch.library.opcheck(library.head_moments.default, (hidden, mask))
        mean, variance, count = library.head_moments(hidden, mask)
        arguments = (hidden, mask, mean, variance, values["norm_weight"], values["norm_bias"], values["weight"])
        torch.library.opcheck(library.head.default, (*arguments, values["bias"]))
        torch.library.opcheck(library.head_backward.default, (grad, *arguments, 1 / count.to(mean.dtype)))


@pytest.mark.parametrize(
    ("name", "wrong", "error"),
    [
        ("hidden", torch.zeros(4), (ValueError, r"hidden must be \[P, E\]")),
        ("valid", torch.zeros(29, dtype=torch.bool), (ValueError, r"valid must be \[P\]")),
        ("valid", torch.zeros(30, dtype=torch.int64), (TypeError, "valid must be bool")),
        ("mean", torch.zeros(15), (ValueError, "mean must be")),
        ("weight", torch.zeros(24, 15), (ValueError, r"weight must be \[O, E\]")),
        ("weight", torch.zeros(24, 16, dtype=torch.float64), (TypeError, "weight must be")),
        ("bias", torch.zeros(23), (ValueError, "bias must be")),
    ],
)
def test_wrong_arguments_are_named(name: str, wrong: Tensor, error: tuple[type[Exception], str]) -> None:
    values, valid, _ = inputs(torch.float32, 30, 16, 24)
    norm = {"mean": torch.zeros(16), "rstd": torch.ones(16)}
    arguments = {"hidden": values["hidden"], "valid": valid, **norm, **{n: values[n] for n in NAMES[1:]}} | {
        name: wrong
    }
    with pytest.raises(error[0], match=error[1]):
        torch.ops.pixcontrast.head(*arguments.values())
