"""The kernels of `project` against its formulas in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cusim.kernels import WAYS, Kernels, Way

FLOAT, BF16, HALF = TYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = WAYS[0]
TF32 = 2.0**-11  # relative error of one rounding


@pytest.fixture(scope="module")
def project(kernels: Callable[..., Kernels]) -> Kernels:
    return kernels("project", "project_backward")


@dataclass
class Case:
    """``features [P, D]`` or ``[B, D, H*W]``, ``index [R]``, ``weight [Dout, D]``, ``grad [R, Dout]``."""

    features: Tensor
    index: Tensor
    weight: Tensor
    bias: Tensor | None
    grad: Tensor
    tensor_cores: bool

    @property
    def pixels(self) -> Tensor:
        """``[P, D]``"""
        return self.features if self.features.dim() == 2 else self.features.transpose(1, 2).flatten(0, 1)

    @property
    def used(self) -> Tensor:
        """``[R]``: whether a row has a pixel."""
        return (self.index >= 0) & (self.index < len(self.pixels))


def make_case(
    dim: int,
    outputs: int,
    dtype: torch.dtype,
    tensor_cores: bool,
    *,
    maps: bool = False,
    rows: int = 70,
    order: str = "random",
    bias: bool = True,
) -> Case:
    """With rows that have no pixel, pixels that several rows have and many that none has; what takes no part is NaN."""
    g = torch.Generator().manual_seed(dim + outputs)
    pixels = 2 * (rows // 2 + 7)
    index = torch.randperm(pixels, generator=g)[:rows] if order == "random" else torch.arange(rows)
    if order == "random" and rows > 8:
        index[5::7], index[6::11] = index[2], index[4]
    index[3::13], index[8::17], index[9::23] = -1, pixels, -(1 << 40)
    features = torch.randn(pixels, dim, generator=g)
    grad = torch.randn(rows, outputs, generator=g)
    weight, added = torch.randn(outputs, dim, generator=g), torch.randn(outputs, generator=g)
    used = (index >= 0) & (index < pixels)
    lonely = torch.ones(pixels, dtype=torch.bool)
    lonely[index[used]] = False
    features[lonely], grad[~used] = torch.nan, torch.nan
    if maps:
        features = features.view(2, pixels // 2, dim).transpose(1, 2).contiguous()
    return Case(
        features.to(dtype), index, weight.to(dtype), added.to(dtype) if bias else None, grad.to(dtype), tensor_cores
    )


Results = dict[str, Tensor]


def formula(case: Case, dtype: torch.dtype) -> Results:
    """In ``dtype``, from the numbers of the case."""
    places = torch.nonzero(case.used)[:, 0]
    pixel = case.index[places]
    rows, grad = case.pixels[pixel].to(dtype), case.grad[places].to(dtype)
    weight = case.weight.to(dtype)
    result = torch.zeros(len(case.index), len(weight), dtype=dtype)
    result[places] = rows @ weight.t() + (0 if case.bias is None else case.bias.to(dtype))
    features = torch.zeros(case.pixels.shape, dtype=dtype).index_add(0, pixel, grad @ weight)
    return {"result": result, "features": features, "weight": grad.t() @ rows, "bias": grad.sum(0)}


def run(project: Kernels, way: Way, case: Case, wanted: tuple[bool, bool, bool] = (True, True, True)) -> Results:
    inside = case.features.shape[2] if case.features.dim() == 3 else 0
    dtype, dim, outputs = case.features.dtype, case.weight.shape[1], case.weight.shape[0]
    sizes = (TYPES.index(dtype), int(case.tensor_cores), len(case.pixels), dim, inside, len(case.index), outputs)
    result = torch.full((len(case.index), outputs), torch.nan, dtype=dtype)
    project.run(way, "run_project", *sizes, case.features, case.index, case.weight, case.bias, result)
    outs = (torch.full_like(case.features, 7), torch.full_like(case.weight, 7), torch.full((outputs,), 7, dtype=dtype))
    order = torch.argsort(case.index, stable=True)
    gradients = [out if want else None for out, want in zip(outs, wanted, strict=True)]
    arguments = (*sizes, case.features, case.index, order, case.weight, case.grad, *gradients)
    size = torch.zeros(1, dtype=torch.int64)
    project.run(way, "run_project_backward", *arguments, None, size)
    workspace = torch.full((int(size),), 0xFF, dtype=torch.uint8)
    project.run(way, "run_project_backward", *arguments, workspace, None)
    features = outs[0] if inside == 0 else outs[0].transpose(1, 2).flatten(0, 1)
    return {"result": result, "features": features, "weight": outs[1], "bias": outs[2]}


def check(case: Case, results: Results, names: tuple[str, ...] = ("result", "features", "weight", "bias")) -> None:
    """Errors of at most a small factor of float32's, the roundings to tf32 and that of the result."""
    truth, plain = formula(case, torch.float64), formula(case, torch.float32)
    sizes = formula(
        Case(case.features.abs(), case.index, case.weight.abs(), None, case.grad.abs(), False), torch.float64
    )  # sums of absolute terms
    eps = torch.finfo(case.features.dtype).eps
    for name in names:
        if truth[name].numel() == 0:
            continue
        error = (results[name].double() - truth[name]).abs()
        allowed = 4 * (plain[name] - truth[name]).abs().max() + eps / 2 * truth[name].abs() + eps * 1e-3
        if case.tensor_cores and case.features.dtype == FLOAT and name != "bias":
            allowed = allowed + 2 * TF32 * sizes[name]
        if name == "features" and case.features.dtype != FLOAT:  # rows of one pixel are added up, then rounded
            allowed = allowed + eps / 2 * sizes[name]
        if case.features.dtype == HALF:
            allowed = allowed + 2.0**-25  # half the smallest number
        assert (error <= allowed).all(), f"{name}: {float((error - allowed).max()):.2e} too much"
    assert (results["result"][~case.used] == 0).all()
    lonely = torch.ones(len(case.pixels), dtype=torch.bool)
    lonely[case.index[case.used]] = False
    if "features" in names:
        assert (results["features"][lonely] == 0).all()


PRODUCTS = [(FLOAT, False), (FLOAT, True), (BF16, True), (HALF, True), (BF16, False), (HALF, False)]


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize(("dtype", "tensor_cores"), PRODUCTS)
def test_every_build_and_order(project: Kernels, way: Way, dtype: torch.dtype, tensor_cores: bool, maps: bool) -> None:
    case = make_case(40, 24, dtype, tensor_cores, maps=maps)
    check(case, run(project, way, case))


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("dim", [1, 3, 64, 129, 256, 257, 720])
@pytest.mark.parametrize(("dtype", "tensor_cores"), PRODUCTS)
def test_widths(project: Kernels, dtype: torch.dtype, tensor_cores: bool, dim: int, maps: bool) -> None:
    case = make_case(dim, 19, dtype, tensor_cores, maps=maps, rows=20)
    check(case, run(project, PLAIN, case))


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("outputs", [1, 2, 150, 256])
@pytest.mark.parametrize(("dtype", "tensor_cores"), PRODUCTS[:3])
def test_outputs(project: Kernels, dtype: torch.dtype, tensor_cores: bool, outputs: int, maps: bool) -> None:
    case = make_case(24, outputs, dtype, tensor_cores, maps=maps, rows=20, bias=outputs != 2)
    check(case, run(project, PLAIN, case))


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize(("dtype", "tensor_cores"), PRODUCTS[:3])
def test_2048_channels(project: Kernels, dtype: torch.dtype, tensor_cores: bool, maps: bool) -> None:
    case = make_case(2048, 9, dtype, tensor_cores, maps=maps, rows=10)
    check(case, run(project, PLAIN, case))


@pytest.mark.parametrize("build", ["plain", "race"])
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize(("dtype", "tensor_cores"), PRODUCTS[:3])
def test_several_tiles_and_parts_of_an_index_in_order(
    project: Kernels, dtype: torch.dtype, tensor_cores: bool, maps: bool, build: str
) -> None:
    case = make_case(136, 130, dtype, tensor_cores, maps=maps, rows=150, order="sorted")
    check(case, run(project, Way(build, 0), case))
    case = make_case(8, 16, dtype, tensor_cores, maps=maps, rows=700, order="sorted")  # two parts
    check(case, run(project, Way(build, 0), case))


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_one_pixel_of_many_rows(project: Kernels, tensor_cores: bool, maps: bool) -> None:
    for dtype in (FLOAT, BF16):
        case = make_case(16, 24, dtype, tensor_cores, maps=maps, rows=300)
        case.index[case.used] = case.index[case.used][0]
        check(case, run(project, PLAIN, case))


@pytest.mark.parametrize("rows", [0, 1, 2, 5])
def test_few_rows(project: Kernels, rows: int) -> None:
    for maps in (False, True):
        case = make_case(8, 8, FLOAT, False, maps=maps, rows=rows)
        check(case, run(project, PLAIN, case))
        case.index[:] = -1
        check(case, run(project, PLAIN, case))


def test_only_the_gradients_asked_for(project: Kernels) -> None:
    names = ("features", "weight", "bias")
    case = make_case(16, 8, FLOAT, False)
    for number in range(1, 8):
        wanted = (bool(number & 1), bool(number & 2), bool(number & 4))
        results = run(project, PLAIN, case, wanted)
        check(case, results, tuple(name for name, want in zip(names, wanted, strict=True) if want))
        assert all((results[name] == 7).all() for name, want in zip(names, wanted, strict=True) if not want)


@pytest.mark.parametrize("maps", [False, True])
def test_same_bits_in_every_order(project: Kernels, maps: bool) -> None:
    case = make_case(40, 24, FLOAT, False, maps=maps)
    expected = run(project, WAYS[0], case)
    for way in WAYS[1:4]:
        results = run(project, way, case)
        assert all(torch.equal(results[name], expected[name]) for name in expected)
