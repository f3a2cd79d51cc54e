"""The kernels of norm_linear, emulated, against PyTorch's functions in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from norm_cases import EPS, MOMENTUM, Case, formula, make_case
from torch import Tensor

from cusim.kernels import WAYS, Kernels, Way

FLOAT, BF16, HALF = TYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = WAYS[0]
PIECE = 128  # rows of a partial sum
Results = dict[str, Tensor]


@pytest.fixture(scope="module")
def norm(kernels: Callable[..., Kernels]) -> Kernels:
    return kernels("norm_linear")


def run(norm: Kernels, way: Way, case: Case) -> Results:
    """As the operators run the kernels, with the dense layer in PyTorch."""
    (rows, width), classes, dtype = case.hidden.shape, len(case.count), case.hidden.dtype
    where = (TYPES.index(dtype), rows, classes, width, case.start, case.count, case.hidden, case.order)
    workspace = torch.full((12 * width * (classes + rows // PIECE),), 0xFF, dtype=torch.uint8)
    space = (workspace, len(workspace))
    running, batches = torch.stack([case.running_mean, case.running_var]), torch.zeros((), dtype=torch.int64)
    mean_rstd, share = torch.full((2, classes, width), 7.0), torch.full((classes,), 7.0)
    norm.run(
        way, "run_norm_stats", *where, case.training, MOMENTUM, EPS, case.hidden_bias, running[0], running[1], batches,
        *space, mean_rstd[0], mean_rstd[1], share,
    )  # fmt: skip
    assert batches == int(case.training and case.count[0] >= 2)
    parameters = torch.cat([mean_rstd, case.norm_weight[None], case.norm_bias[None]])
    grads, grad_hidden = torch.full((4, classes, width), 7.0), torch.full((rows, width), 7.0, dtype=dtype)
    weight, bias = (None, None) if case.dense else (case.weight, case.bias)
    grad_bias = torch.full((classes,), 7.0)
    made = torch.full((rows, width), 7.0, dtype=dtype) if case.dense else torch.full((rows,), 7.0)
    norm.run(way, "run_norm_forward", *where, case.slope, parameters, weight, bias, made)
    grad = torch.nan_to_num(case.grad) @ case.weight if case.dense else case.grad
    norm.run(
        way, "run_norm_backward", *where, case.slope, parameters, weight, share, grad, *space, grad_hidden, grads,
        grad_bias,
    )  # fmt: skip
    results = {"hidden": grad_hidden, "norm_weight": grads[0], "norm_bias": grads[1], "hidden_bias": grads[2]}
    results |= {"running_mean": running[0], "running_var": running[1]}
    if not case.dense:
        return results | {"out": made, "weight": grads[3], "bias": grad_bias}
    assert (grads[3] == 7).all() and (grad_bias == 7).all()
    assert (made[~case.valid] == 0).all()
    return results | {"out": made.double() @ case.weight.double().t() + case.bias.double()}


def check(case: Case, results: Results) -> None:
    """Errors of at most a small factor of those of PyTorch in float32, and of the roundings of half precision."""
    truth, plain = formula(case, torch.float64), formula(case, FLOAT)
    unit = torch.finfo(case.hidden.dtype).eps / 2 if case.hidden.dtype != FLOAT else 0.0
    for name, result in results.items():
        exact, scale = truth[name], truth[name].abs().max() if truth[name].numel() else 0
        if exact.numel() == 0:
            continue
        noise = (plain[name].double() - exact).abs().max() + torch.finfo(FLOAT).eps * scale
        # half precision: the result, the operand of the dense product, and the gradient that leaves it are rounded
        error = (result.double() - exact).abs().max()
        assert error <= 8 * noise + 8 * unit * scale, f"{name}: {error:.2e} > {8 * noise + 8 * unit * scale:.2e}"
    assert (results["hidden"][case.places[~case.valid]] == 0).all()


COUNTS, GAPS = [5, 0, 200, 1, 30], [0, 2, 0, 3, 4]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("outputs", [None, 6])
def test_every_build_and_order(norm: Kernels, way: Way, dtype: torch.dtype, outputs: int | None) -> None:
    counts, gaps = ([150], [9]) if outputs else (COUNTS, GAPS)
    case = make_case(counts, gaps, 40, dtype, outputs=outputs, ordered=True)
    check(case, run(norm, way, case))


@pytest.mark.parametrize("width", [1, 3, 64, 129, 260])
@pytest.mark.parametrize("outputs", [None, 4])
@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_widths(norm: Kernels, dtype: torch.dtype, width: int, outputs: int | None) -> None:
    case = make_case([21] if outputs else [21, 4], [2] if outputs else [2, 0], width, dtype, outputs=outputs)
    check(case, run(norm, PLAIN, case))


@pytest.mark.parametrize("build", ["plain", "race"])
@pytest.mark.parametrize("outputs", [None, 4])
def test_more_pieces_than_warps_and_no_order(norm: Kernels, build: str, outputs: int | None) -> None:
    counts = [9 * PIECE + 3] if outputs else [PIECE, 9 * PIECE + 3, 2 * PIECE]
    case = make_case(counts, [0] * len(counts), 8, outputs=outputs)
    check(case, run(norm, Way(build, 0), case))


@pytest.mark.parametrize("outputs", [None, 4])
def test_running_statistics_outside_of_training(norm: Kernels, outputs: int | None) -> None:
    counts, gaps = ([50], [3]) if outputs else (COUNTS, GAPS)
    case = make_case(counts, gaps, 24, outputs=outputs, training=False)
    results = run(norm, PLAIN, case)
    check(case, results)
    assert torch.equal(results["running_var"], case.running_var)


def test_segments_of_a_memory_have_no_start(norm: Kernels) -> None:
    case = make_case([3, 8, 0], [5, 0, 8], 16)
    case.start = None
    check(case, run(norm, PLAIN, case))


@pytest.mark.parametrize("counts", [[0], [1], [2], [0, 0], [1, 2, 0]])
def test_few_rows(norm: Kernels, counts: list[int]) -> None:
    for outputs in (None, 3) if len(counts) == 1 else (None,):
        for gap in (0, 3):
            case = make_case(counts, [gap] * len(counts), 8, outputs=outputs)
            check(case, run(norm, PLAIN, case))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("outputs", [None, 4])
def test_nan_passes_the_rectifier(norm: Kernels, dtype: torch.dtype, outputs: int | None) -> None:
    case = make_case([30], [0], 24, dtype, outputs=outputs, training=False)
    case.hidden[7, 3] = torch.nan
    out = run(norm, PLAIN, case)["out"]
    assert out[7].isnan().all()
    assert out[torch.arange(30) != 7].isfinite().all()


def test_a_far_mean_does_not_cancel(norm: Kernels) -> None:
    case = make_case([500], [0], 8, outputs=2)
    case.hidden += 1000
    case.running_mean += 1000
    results, truth = run(norm, PLAIN, case), formula(case, torch.float64)
    torch.testing.assert_close(results["running_var"].double(), truth["running_var"], rtol=1e-5, atol=0)


def test_same_bits_in_every_order(norm: Kernels) -> None:
    case = make_case(COUNTS, GAPS, 24, ordered=True)
    expected = run(norm, WAYS[0], case)
    for way in WAYS[1:4]:
        results = run(norm, way, case)
        assert all(torch.equal(results[name], expected[name]) for name in expected)
