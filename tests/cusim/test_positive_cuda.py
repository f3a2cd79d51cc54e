"""The kernels of the positive objective against their formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cusim.kernels import SAME_BITS, Kernels, Way
from cusim.positive_cases import PLAIN, TYPES, Case, as_maps, check, close_enough, formula, make_case, run


@pytest.fixture(scope="module")
def positive(kernels: Callable[..., Kernels]) -> Kernels:
    return kernels("positive", "class_mean")


SHAPES = [(1, 2), (3, 1), (64, 19), (256, 5), (257, 19), (720, 2), (2048, 3), (3, 1000), (64, 150)]


@pytest.mark.parametrize(("dim", "classes"), SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_rows(positive: Kernels, dim: int, classes: int, dtype: torch.dtype):
    case = make_case(dim, classes, dtype)
    check(run(positive, PLAIN, case), case)


@pytest.mark.parametrize(("dim", "classes"), SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_maps(positive: Kernels, dim: int, classes: int, dtype: torch.dtype):
    case = make_case(dim, classes, dtype, maps=(2, 37))
    check(run(positive, PLAIN, case), case)


@pytest.mark.parametrize("maps", [None, (3, 15), (1, 64)])
def test_every_way(positive: Kernels, way: Way, maps: tuple[int, int] | None):
    case = make_case(40, 6, torch.float32, maps, pixels=90)
    check(run(positive, way, case), case)


@pytest.mark.parametrize("gradients", [("features",), ("weight_logits",)])
def test_every_way_without_the_barriers_of_the_mean(positive: Kernels, way: Way, gradients: tuple[str, ...]):
    case = replace(make_case(40, 6, torch.float32, pixels=90), gradients=gradients)
    check(run(positive, way, case), case)


def test_more_pixels_than_one_grid_of_the_last_kernel(positive: Kernels):
    case = make_case(3, 2, torch.float32, pixels=2500)  # two blocks of 1024 threads on one multiprocessor
    check(run(positive, PLAIN, case), case)


@pytest.mark.parametrize("maps", [None, (2, 37)])
@pytest.mark.parametrize("dim", [16, 257])
def test_half_gradients_are_not_rounded_before_the_loss_scale(positive: Kernels, dim: int, maps):
    case = replace(make_case(dim, 5, torch.float16, maps), loss_weight=1e-7)  # as small as those of many pixels
    result, truth = run(positive, PLAIN, case), formula(case, torch.float64)["features"]
    assert not truth.half().any() and result["features"].any()
    check(result, case)
    expected = (truth * 65536).half().float()
    torch.testing.assert_close((result["features"] * 65536).half().float(), expected, rtol=2**-9, atol=2**-24)


@pytest.mark.parametrize("maps", [None, (2, 20)])
@pytest.mark.parametrize("gradients", [(), ("features",), ("weight_logits",), ("mean",)])
def test_any_gradient_can_be_left_out(positive: Kernels, maps: tuple[int, int] | None, gradients: tuple[str, ...]):
    case = replace(make_case(24, 5, torch.float32, maps), gradients=gradients)
    check(run(positive, PLAIN, case), case)


@pytest.mark.parametrize("maps", [None, (2, 20)])
def test_without_weights_all_pixels_count_alike(positive: Kernels, maps: tuple[int, int] | None):
    case = replace(make_case(24, 5, torch.bfloat16, maps), weight_logits=None)
    check(run(positive, PLAIN, case), case)


def test_blocks_whose_logits_are_far_apart(positive: Kernels):
    case = replace(make_case(3, 2, torch.float32, pixels=700), multiprocessors=2)
    assert case.weight_logits is not None
    case.weight_logits[:300] = case.weight_logits[:300].clamp(max=0) - 300
    case.weight_logits[300:] = case.weight_logits[300:].clamp(max=0) - torch.linspace(295, 305, 400)
    check(run(positive, PLAIN, case), case)


@pytest.mark.parametrize("maps", [None, (0, 9)])
def test_no_pixels(positive: Kernels, maps: tuple[int, int] | None):
    features = torch.zeros(0, 8) if maps is None else torch.zeros(0, 8, 9)
    case = Case(features, torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.ones(3, 8), torch.full((3,), 4))
    results = run(positive, PLAIN, case)
    assert not any(result.any() for result in results.values())


@pytest.mark.parametrize("maps", [None, (2, 37)])
def test_the_order_of_threads_changes_no_bit(positive: Kernels, maps: tuple[int, int] | None):
    case = replace(make_case(20, 7, torch.float32, maps, pixels=300), multiprocessors=2)
    first, *others = (run(positive, way, case) for way in SAME_BITS)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("maps", [None, (1, 75)])
@pytest.mark.parametrize("value", [torch.nan, 1e19])  # whose square times 16 is beyond float32
def test_a_feature_that_is_no_number_shows_in_the_loss_of_its_class_alone(positive: Kernels, maps, value: float):
    case = make_case(16, 2, torch.float32, maps)
    broken = int(torch.nonzero(case.labels == 0)[0])
    rows = case.rows.clone()
    rows[broken] = value
    results = run(positive, PLAIN, replace(case, features=as_maps(rows, maps)))
    assert results["loss"].isnan() and results["class_loss"].isnan().tolist() == [True, False]
    assert results["features"].isnan().any(1).nonzero().tolist() == [[broken]]


def test_a_logit_that_is_no_number_shows_in_the_loss_of_its_class_alone(positive: Kernels):
    case = make_case(16, 2, torch.float32)
    assert case.weight_logits is not None
    case.weight_logits[torch.nonzero(case.labels == 1)[0]] = -torch.nan
    results = run(positive, PLAIN, case)
    assert results["class_loss"].isnan().tolist() == [False, True]
    assert torch.equal(results["features"].isnan().all(1), case.labels == 1)


def test_a_class_without_weights_is_nan_and_a_block_without_weights_adds_nothing(positive: Kernels):
    case = replace(make_case(16, 3, torch.float32, pixels=700), multiprocessors=2)
    assert case.weight_logits is not None
    case.weight_logits[case.labels == 2] = -torch.inf
    case.weight_logits[(case.labels == 0) & (torch.arange(700) < 350)] = -torch.inf
    results = run(positive, PLAIN, case)
    assert results["class_loss"].isnan().tolist() == [False, False, True] and results["loss"].isnan()
    known = case.labels != 2
    truth, plain = formula(case, torch.float64), formula(case, torch.float32)
    close_enough(results["class_loss"][:2], truth["class_loss"][:2], plain["class_loss"][:2])
    for name in ("features", "weight_logits"):
        assert results[name][~known].isnan().all()
        close_enough(results[name][known], truth[name][known], plain[name][known])


def test_more_classes_than_sums_fit_in_shared_memory(positive: Kernels):
    case = replace(make_case(2, 2300, torch.float32), gradients=("features", "weight_logits"))
    check(run(positive, PLAIN, case), case)


def test_maps_of_more_channels_than_fit_in_shared_memory(positive: Kernels):
    case = make_case(11_000, 2, torch.float32, maps=(2, 5))
    check(run(positive, PLAIN, case), case)
