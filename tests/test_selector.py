"""The operators behind the first product of the class selectors, against PyTorch's functions class by class."""

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

MEMBERS = (300, 0, 1, 129, 2)  # rows of each class: several blocks, none, one, one block and a row, two
EPS = 1e-5
NAMES = ("hidden", "mean", "norm_weight", "norm_bias", "weight", "bias")
Results = dict[str, Tensor]


def inputs(dtype: torch.dtype, dim: int) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves, and the incoming gradient ``[P]``. The rows are far from zero: careless sums of squares would show."""
    g = torch.Generator().manual_seed(dim)
    shape = (len(MEMBERS), dim)
    hidden = (torch.randn(sum(MEMBERS), dim, generator=g).double() + 20).to(dtype)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = [torch.randn(shape, generator=g).to(sums) for _ in range(4)]
    leaves = [hidden, 20 + numbers[0], *numbers[1:], torch.randn(len(MEMBERS), generator=g).to(sums)]
    grad = torch.randn(sum(MEMBERS), generator=g).to(sums)
    return dict(zip(NAMES, leaves, strict=True)), grad


def differentiated(scores: Tensor, leaves: dict[str, Tensor], grad: Tensor) -> Results:
    grads = torch.autograd.grad(scores, list(leaves.values()), grad)
    return {"scores": scores.detach(), **dict(zip(leaves, grads, strict=True))}


def by_operators(values: dict[str, Tensor], grad: Tensor) -> Results:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    ends = torch.tensor(MEMBERS).cumsum(0)
    mean, variance = torch.ops.pixcontrast.selector_statistics(leaves["hidden"].detach(), ends)
    own = torch.tensor(MEMBERS) >= 2
    mean = torch.where(own[:, None], mean, leaves["mean"])
    rstd = torch.rsqrt(torch.where(own[:, None], variance, 1) + EPS)
    parameters = [leaves[name] for name in NAMES[2:]]
    return differentiated(Selector.apply(leaves["hidden"], ends, mean, rstd, *parameters, own), leaves, grad)


def by_modules(values: dict[str, Tensor], grad: Tensor) -> Results:
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    scores = []
    for c, rows in enumerate(leaves["hidden"].to(grad.dtype).split(MEMBERS)):
        mean, norm_weight, norm_bias, weight, bias = (leaves[name][c] for name in NAMES[1:])
        if len(rows) >= 2:
            normed = batch_norm(rows, None, None, norm_weight, norm_bias, True, eps=EPS)
        else:
            normed = (rows - mean) * (1 + EPS) ** -0.5 * norm_weight + norm_bias
        scores.append(leaky_relu(normed, 0.2) @ weight + bias)
    return differentiated(torch.cat(scores), leaves, grad)


def errors(results: Results, truth: Results) -> dict[str, float]:
    return {n: float((results[n].double() - t).abs().max() / t.abs().max()) for n, t in truth.items()}


def errors_of(run: object, dtype: torch.dtype, dim: int) -> dict[str, float]:
    values, grad = inputs(dtype, dim)
    truth = by_modules({name: value.double() for name, value in values.items()}, grad.double())
    return errors(run(values, grad), truth)  # type: ignore[operator]


def worst(dtype: torch.dtype = torch.float64) -> float:
    # 70: beyond whole vectors of every instruction set
    return max(max(errors_of(by_operators, dtype, dim).values()) for dim in (1, 64, 70))


def test_agrees_with_modules_in_float64() -> None:
    assert worst() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_errors_are_no_larger_than_those_of_the_modules(dtype: torch.dtype) -> None:
    allowed = errors_of(by_modules, dtype, 70)
    for name, error in errors_of(by_operators, dtype, 70).items():
        assert error <= 3 * allowed[name] + torch.finfo(dtype if name == "hidden" else torch.float32).eps, name


def test_same_bits_with_any_number_of_threads() -> None:
    values, grad = inputs(torch.float32, 70)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(by_operators(values, grad))
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
    values, grad = inputs(dtype, 16)
    ends, own = torch.tensor(MEMBERS).cumsum(0), torch.tensor(MEMBERS) >= 2
    library = torch.ops.pixcontrast
    torch.library.opcheck(library.selector_statistics.default, (values["hidden"], ends))
    of_classes = [values[name] for name in NAMES[2:]]
    shared = (values["hidden"], ends, values["mean"], torch.ones_like(values["mean"]), *of_classes[:3])
    torch.library.opcheck(library.selector.default, (*shared, of_classes[3]))
    torch.library.opcheck(library.selector_backward.default, (grad, *shared, own))


@pytest.mark.parametrize("ends", [[300, 300, 301, 430, 431], [300, 200, 301, 430, 432], [-1, 300, 301, 430, 432]])
def test_ends_out_of_bounds_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="ends"):
        torch.ops.pixcontrast.selector_statistics(torch.zeros(432, 8), torch.tensor(ends))
