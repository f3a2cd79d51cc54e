"""norm_linear of both backends against PyTorch's functions, one segment at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from norm_cases import EPS, LEAVES, MOMENTUM, Case, formula, make_case
from torch import Tensor

from pixcontrast.ops.norm_linear import Norm, norm_linear

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# counts and gaps of the segments, width: several blocks of rows, absent and one-row segments, no vector's multiple
DENSE = [([700], [9], 70), ([3], [0], 17), ([1], [4], 8), ([0], [3], 8), ([2], [0], 1)]
SELECTORS = [([300, 0, 1, 140], [0, 2, 0, 5], 33), ([4, 5], [0, 0], 64), ([0, 1], [0, 0], 3)]


def run(case: Case, backend: str) -> dict[str, Tensor]:
    precise = torch.float64 if case.hidden.dtype == torch.float64 else torch.float32
    layer = case.hidden.dtype if case.dense else precise
    kinds = {"hidden": case.hidden.dtype, "weight": layer, "bias": layer}
    leaves = {name: getattr(case, name).to(kinds.get(name, precise)).requires_grad_() for name in LEAVES}
    running = {name: getattr(case, name).to(precise).clone() for name in ("running_mean", "running_var")}
    norm = Norm(leaves["norm_weight"], leaves["norm_bias"], *running.values(), None, case.training, MOMENTUM, EPS)
    weight = leaves["weight"] if case.dense else leaves["weight"][:, None]
    where = {"order": case.order, "start": case.start, "count": case.count, "slope": case.slope, "backend": backend}
    out = norm_linear(leaves["hidden"], leaves["hidden_bias"], norm, weight, leaves["bias"], **where)
    grads = torch.autograd.grad(out, list(leaves.values()), torch.nan_to_num(case.grad).to(out.dtype))
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True)) | running


def check(case: Case, backend: str) -> None:
    results, truth, plain = run(case, backend), formula(case, torch.float64), formula(case, torch.float32)
    dtype = case.hidden.dtype
    for name, exact in truth.items():
        if exact.numel() == 0:
            continue
        error, scale = (results[name].double() - exact).abs().max(), exact.abs().max()
        if dtype == torch.float64:
            assert error <= 1e-12 * (1 + scale), name
            continue
        noise = (plain[name].double() - exact).abs().max() + torch.finfo(torch.float32).eps * scale
        unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        # gradients that cancel are below what float16 represents as normal numbers: half a step of the subnormal ones
        limit = 8 * noise + 8 * unit * scale + unit * torch.finfo(dtype).smallest_normal
        assert error <= limit, f"{name}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("backend", ["extension", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("counts", "gaps", "width"), DENSE)
def test_a_dense_layer(backend, training, dtype, counts, gaps, width) -> None:
    for ordered in (False, True):
        check(make_case(counts, gaps, width, dtype, outputs=6, ordered=ordered, training=training), backend)


@pytest.mark.parametrize("backend", ["extension", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("counts", "gaps", "width"), SELECTORS)
def test_one_output_a_segment(backend, training, dtype, counts, gaps, width) -> None:
    for ordered in (False, True):
        check(make_case(counts, gaps, width, dtype, ordered=ordered, training=training), backend)


@pytest.mark.parametrize("backend", ["extension", "reference"])
def test_segments_without_start_lie_evenly(backend: str) -> None:
    case = make_case([3, 8, 0], [5, 0, 8], 16, torch.float64)
    case.start = None
    check(case, backend)


@pytest.mark.parametrize("outputs", [None, 4])
def test_gradcheck(outputs: int | None) -> None:
    counts, gaps = ([6], [2]) if outputs else ([4, 1, 3], [0, 1, 2])
    case = make_case(counts, gaps, 5, torch.float64, outputs=outputs, ordered=True)
    case.hidden = torch.nan_to_num(case.hidden)
    leaves = [getattr(case, name).double().requires_grad_() for name in LEAVES]

    def function(hidden: Tensor, hidden_bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, *layer: Tensor) -> Tensor:
        weight, bias = layer
        running = case.running_mean.double().clone(), case.running_var.double().clone()
        norm = Norm(norm_weight, norm_bias, *running, None, True, MOMENTUM, EPS)
        weight = weight if case.dense else weight[:, None]
        where = {"order": case.order, "start": case.start, "count": case.count, "slope": case.slope}
        return norm_linear(hidden, hidden_bias, norm, weight, bias, backend="extension", **where)

    assert torch.autograd.gradcheck(function, leaves)


def test_a_far_mean_does_not_cancel() -> None:
    case = make_case([500], [0], 8, outputs=2)
    case.hidden += 1000
    case.running_mean += 1000
    results, truth = run(case, "extension"), formula(case, torch.float64)
    torch.testing.assert_close(results["running_var"].double(), truth["running_var"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["extension", "reference"])
def test_nan_in_a_valid_row_reaches_the_output(backend: str) -> None:
    case = make_case([30], [0], 24, outputs=4, training=False)
    case.hidden[7, 3] = torch.nan
    out = run(case, backend)["out"]
    assert out[7].isnan().all() and out[torch.arange(30) != 7].isfinite().all()


SAME_BITS = """
import sys, torch
sys.path.insert(0, "tests")
import test_norm_linear as t
torch.set_num_threads(int(sys.argv[1]))
for case in (t.make_case([900], [5], 40, outputs=3, ordered=True), t.make_case([300, 7, 600], [0, 3, 0], 40)):
    results = t.run(case, "extension")
    names = ["running_mean", "running_var"]  # the library's products of a dense layer may differ
    names += [] if case.dense else ["hidden", "norm_weight", "norm_bias", "out", "weight"]
    print([float(results[name].double().sum()).hex() for name in names])
"""


def test_same_bits_with_any_number_of_threads() -> None:
    root = Path(__file__).parent.parent
    lines = [
        subprocess.check_output([sys.executable, "-c", SAME_BITS, threads], cwd=root, env=os.environ, text=True)
        for threads in ("1", "2", "3")
    ]
    assert lines[0] == lines[1] == lines[2]


def test_what_does_not_fit_is_named() -> None:
    case = make_case([5], [0], 4, outputs=3)
    good = [case.hidden, None, None, case.count, case.norm_bias, case.norm_bias, case.norm_weight, case.norm_bias, 0.0]
    call = torch.ops.pixcontrast.norm_linear
    call(*good, case.weight, case.bias)
    wrong = {
        r"weight must be \[3, 4\], got \[3, 5\]": (good, torch.randn(3, 5), case.bias),
        "order must be within 0..4, got 5": ([case.hidden, torch.arange(1, 6), *good[2:]], case.weight, case.bias),
        "segments must ascend within 0..5": ([*good[:3], torch.tensor([6]), *good[4:]], case.weight, case.bias),
        r"mean must be \[C, E\], got \[1, 3\]": ([*good[:4], torch.randn(1, 3), *good[5:]], case.weight, case.bias),
    }
    for message, (arguments, weight, bias) in wrong.items():
        with pytest.raises(ValueError, match=message):
            call(*arguments, weight, bias)
    with pytest.raises(TypeError, match="weight must be Float, got Double"):
        call(*good, case.weight.double(), case.bias)
