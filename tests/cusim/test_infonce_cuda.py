"""The kernels of InfoNCE against its formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cusim.infonce_cases import BF16, FLOAT, HALF, PLAIN, TYPES, Case, Result, call, check, formula, make_case, run
from cusim.kernels import SAME_BITS, Kernels, Way

KernelsOf = Callable[..., Kernels]
TENSOR = [(16, BF16), (64, HALF), (64, FLOAT)]  # the narrowest kernels for tensor cores


@pytest.mark.parametrize("each_other", [False, True])
@pytest.mark.parametrize(("dim", "dtype"), [*TENSOR, (70, FLOAT)])
def test_runs_in_all_ways(kernels: KernelsOf, way: Way, dim: int, dtype: torch.dtype, each_other: bool) -> None:
    capacities = () if each_other else (70,)
    case = make_case(dim, dtype, tf32=True, classes=2, anchors=36, capacities=capacities, maps=dim != 16)
    result = run(kernels("infonce"), way, case)
    check(case, result)
    assert result.loss > 1
    assert torch.equal(result.grad, run(kernels("infonce"), SAME_BITS[0], case).grad)  # whatever the order


@pytest.mark.parametrize("each_other", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dim", [1, 48, 64, 128, 150, 256])
def test_agrees_with_the_formulas(kernels: KernelsOf, dim: int, dtype: torch.dtype, each_other: bool) -> None:
    capacities = () if each_other else (70, 9)
    case = make_case(dim, dtype, tf32=dim != 48, classes=5, capacities=capacities, maps=dim in (1, 64, 256))
    check(case, run(kernels("infonce"), PLAIN, case))


@pytest.mark.parametrize("each_other", [False, True])
@pytest.mark.parametrize(("dim", "dtype"), [(257, HALF), (720, FLOAT), (2048, BF16)])
def test_long_rows(kernels: KernelsOf, dim: int, dtype: torch.dtype, each_other: bool) -> None:
    case = make_case(dim, dtype, classes=2, anchors=20, capacities=() if each_other else (9,))
    check(case, run(kernels("infonce"), PLAIN, case))


@pytest.mark.parametrize("classes", [1, 2, 19, 150, 1000])
def test_any_number_of_classes(kernels: KernelsOf, classes: int) -> None:
    case = make_case(16, BF16, classes=classes, anchors=140, capacities=(2, 3))
    for counts in case.counts:
        counts[30:-5] = 0
    check(case, run(kernels("infonce"), PLAIN, case))


@pytest.mark.parametrize("each_other", [False, True])
@pytest.mark.parametrize("multiprocessors", [1, 5, 132])
@pytest.mark.parametrize(("dim", "dtype"), [*TENSOR, (5, FLOAT)])
def test_any_number_of_parts(
    kernels: KernelsOf, dim: int, dtype: torch.dtype, multiprocessors: int, each_other: bool
) -> None:
    case = make_case(dim, dtype, tf32=True, classes=3, anchors=140, capacities=() if each_other else (130, 65))
    for case.multiprocessors, case.gradient in ((multiprocessors, True), (multiprocessors, False)):
        check(case, run(kernels("infonce"), PLAIN, case))


def test_exact_products_where_tensor_cores_do_not_fit(kernels: KernelsOf) -> None:
    old = make_case(32, BF16, anchors=20, capacities=(20,))
    old.capability = 75
    mixed = make_case(32, FLOAT, queue_dtype=BF16, anchors=20, capacities=(20,), tf32=True)
    opposite = make_case(32, HALF, queue_dtype=FLOAT, anchors=20, capacities=(20,), tf32=True)
    for case in (old, mixed, opposite):
        check(case, run(kernels("infonce"), PLAIN, case))


@pytest.mark.parametrize("dim", [5, 16])
def test_nothing_to_contrast_gives_zero(kernels: KernelsOf, dim: int) -> None:
    case = make_case(dim, BF16, anchors=20, capacities=(6,))
    each_other = make_case(dim, BF16, anchors=20, capacities=())
    nobody = replace(case, index=torch.full_like(case.index, -1))
    no_keys = replace(case, counts=[torch.zeros_like(case.counts[0])])
    no_list = replace(case, index=case.index[:0], labels=case.labels[:0], excluded=None)
    one_class = replace(each_other, labels=torch.zeros_like(each_other.labels))
    lonely = replace(each_other, labels=torch.arange(20))
    for empty in (nobody, no_keys, no_list, one_class, lonely):
        result = run(kernels("infonce"), PLAIN, empty)
        assert result.loss == 0 and not result.anchor_loss.any() and not result.grad.any()
        if empty is not no_list:
            assert torch.equal(result.positives, formula(empty, torch.float64).positives)


@pytest.mark.parametrize("each_other", [False, True])
@pytest.mark.parametrize(("dim", "dtype"), [*TENSOR, (5, FLOAT)])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 0.001), (300.0, 0.07), (0.0, 0.07)])
def test_any_norm_stays_finite(
    kernels: KernelsOf, dim: int, dtype: torch.dtype, each_other: bool, scale: float, temperature: float
) -> None:
    case = make_case(dim, dtype, tf32=True, classes=2, anchors=20, capacities=() if each_other else (70,))
    case.features, case.temperature = case.features * scale, temperature
    result = run(kernels("infonce"), PLAIN, case)
    assert result.loss.isfinite() and result.anchor_loss.isfinite().all() and result.grad.isfinite().all()
    torch.testing.assert_close(result.loss.double(), formula(case, torch.float64).loss, rtol=2e-3, atol=0)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("dim", "dtype"), [*TENSOR, (5, BF16)])
def test_what_is_not_finite_reaches_the_loss(
    kernels: KernelsOf, dim: int, dtype: torch.dtype, value: float, gradient: bool
) -> None:
    anchor = make_case(dim, dtype, tf32=True, classes=2, anchors=20, capacities=(6,))
    each_other = make_case(dim, dtype, tf32=True, classes=2, anchors=20, capacities=())
    key = make_case(dim, dtype, tf32=True, classes=2, anchors=20, capacities=(6,))
    for case in (anchor, each_other):
        case.features[case.index[0], 3] = value
    key.queues[0][1, 0, 3] = value
    for case in (anchor, each_other, key):
        case.gradient = gradient
        result = run(kernels("infonce"), PLAIN, case)
        assert result.loss.isnan()
        if gradient:
            assert result.grad[case.index[0]].isnan().any()


@pytest.mark.parametrize(("dim", "dtype"), [*TENSOR, (5, BF16)])
def test_an_anchor_without_negatives_has_no_loss_whatever_its_keys_are(
    kernels: KernelsOf, dim: int, dtype: torch.dtype
) -> None:
    case = make_case(dim, dtype, tf32=True, classes=2, anchors=20, capacities=(6,))
    case.labels, case.counts = torch.zeros_like(case.labels), [torch.tensor([6, 0])]
    case.queues[0][:] = torch.nan
    each_other = replace(case, queues=[], counts=[], excluded=None)
    each_other.features[case.index[0]] = torch.nan
    for each in (case, each_other):
        result = run(kernels("infonce"), PLAIN, each)
        assert result.loss == 0 and not result.anchor_loss.any() and not result.grad.any() and result.positives.any()


@pytest.mark.parametrize("each_other", [False, True])
@pytest.mark.parametrize("dim", [5, 16])
def test_half_gradients_are_not_rounded_before_the_loss_scale(kernels: KernelsOf, dim: int, each_other: bool) -> None:
    case = make_case(dim, HALF, anchors=60, capacities=() if each_other else (70, 9))
    case.loss_weight = 1e-8  # gradients as small as those of many anchors
    result, truth = run(kernels("infonce"), PLAIN, case), formula(case, torch.float64).grad
    assert not truth.half().any() and result.grad.any()
    check(case, result)
    expected = (truth * 65536).half().float()
    torch.testing.assert_close(
        (result.grad * 65536).half().float(), expected, rtol=2**-9, atol=2e-3 * float(expected.max())
    )


@pytest.mark.parametrize("dtype", TYPES)
def test_workspace_of_a_large_memory(kernels: KernelsOf, dtype: torch.dtype) -> None:
    index = torch.arange(1023)
    case = Case(torch.zeros(1023, 256, dtype=dtype), index, index % 19, 19, multiprocessors=132, tf32=True)
    case.queues, case.counts = [torch.zeros(19, 10000, 0, dtype=dtype)], [torch.zeros(19, dtype=torch.int64)]
    results = Result(torch.zeros(()), torch.zeros(1023), index, torch.zeros_like(case.features))
    needed = call(kernels("infonce"), PLAIN, case, results)
    assert 12 << 20 < needed <= 16 << 20


@pytest.mark.parametrize("each_other", [False, True])
def test_a_pixel_that_one_lane_meets_twice(kernels: KernelsOf, each_other: bool) -> None:
    case = make_case(5, FLOAT, classes=3, anchors=80, capacities=() if each_other else (9,))
    case.index[35], case.labels[35] = case.index[3], case.labels[3]  # lanes look at every 32nd anchor
    check(case, run(kernels("infonce"), PLAIN, case))
