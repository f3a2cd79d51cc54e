"""The kernels of gather_pixels against indexing, exact in every element."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cusim.build import BUILDS
from cusim.kernels import WAYS, Kernels, Way

TYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = WAYS[0]
FORMS = ["rows", "maps"]


@pytest.fixture(scope="module")
def room(kernels) -> Kernels:
    return kernels("gather_pixels")


class Case:
    """Pixels ``[P, D]``, ``index [R]`` with rows that have no pixel, pixels that several rows have and many that none
    has, ``grad [R, D]``. What takes no part is NaN."""

    def __init__(self, rows: int, dim: int, dtype: torch.dtype, form: str, ascending: bool = False) -> None:
        pixels = 2 * (rows // 2 + 7)
        self.form = form
        self.index = torch.arange(rows) if ascending else torch.randperm(pixels)[:rows]
        if rows > 8 and not ascending:
            self.index[5::7], self.index[6::11] = self.index[2], self.index[4]
        self.index[3::13], self.index[8::17], self.index[9::23] = -1, pixels, -(1 << 40)
        self.pixels, self.grad = torch.randn(pixels, dim).to(dtype), torch.randn(rows, dim).to(dtype)
        self.poison()

    def poison(self) -> None:
        self.used = (self.index >= 0) & (self.index < len(self.pixels))
        lonely = torch.ones(len(self.pixels), dtype=torch.bool)
        lonely[self.index[self.used]] = False
        self.pixels[lonely], self.grad[~self.used] = torch.nan, torch.nan

    def features_of(self, pixels: Tensor) -> Tensor:
        """As they lie in memory: ``[P, D]``, or ``[2, D, P / 2]``."""
        if self.form == "rows":
            return pixels.clone()
        return pixels.view(2, len(pixels) // 2, -1).transpose(1, 2).contiguous()

    def truth(self) -> tuple[Tensor, Tensor]:
        """The rows, and the gradient of the pixels: added in float32 in the order of the rows."""
        rows = torch.zeros_like(self.grad)
        grad = torch.zeros(self.pixels.shape)
        for r in torch.nonzero(self.used)[:, 0].tolist():
            rows[r] = self.pixels[self.index[r]]
            grad[self.index[r]] += self.grad[r].float()
        return rows, self.features_of(grad.to(self.pixels.dtype))


def check(room: Kernels, way: Way, case: Case) -> None:
    (pixels, dim), count = case.pixels.shape, len(case.index)
    sizes = (TYPES.index(case.pixels.dtype), pixels, dim, 0 if case.form == "rows" else pixels // 2, count)
    features, order = case.features_of(case.pixels), torch.argsort(case.index, stable=True)
    rows, grad = torch.full_like(case.grad, 7), torch.full_like(features, 7)
    room.run(way, "run_gather_pixels", 0, *sizes, case.index, None, features, rows)
    room.run(way, "run_gather_pixels", 1, *sizes, case.index, order, case.grad, grad)
    expected_rows, expected_grad = case.truth()
    assert torch.equal(rows, expected_rows)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_build_and_order(room: Kernels, way: Way, dtype: torch.dtype, form: str) -> None:
    check(room, way, Case(70, 40, dtype, form))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dim", [1, 31, 32, 33, 129, 720])
def test_widths(room: Kernels, dim: int, form: str, build: str) -> None:
    check(room, Way(build, 0), Case(20, dim, torch.float32, form))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [0, 1, 2, 31, 32, 33, 300])
def test_numbers_of_rows(room: Kernels, rows: int, form: str, build: str) -> None:
    case = Case(rows, 9, torch.bfloat16, form)
    check(room, Way(build, 0), case)
    case.index[:] = -1
    case.poison()
    check(room, Way(build, 0), case)


@pytest.mark.parametrize("form", FORMS)
def test_an_index_that_ascends(room: Kernels, form: str) -> None:
    check(room, PLAIN, Case(150, 64, torch.float32, form, ascending=True))


@pytest.mark.parametrize("form", FORMS)
def test_one_pixel_of_many_rows(room: Kernels, way: Way, form: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(100, 40, dtype, form)
        case.index[case.used] = int(case.index[case.used][0])
        case.poison()
        check(room, way, case)


@pytest.mark.parametrize("map_pixels", [0, 128 * 256, 3])
def test_offsets_need_64_bits(room: Kernels, map_pixels: int) -> None:
    dim, pixels = 2048, 3 * 2**20
    pixel = torch.tensor([0, 1, 2, 3, 2**20 - 1, 2**20, 2**21 + 77, pixels - 1])
    found = torch.zeros_like(pixel)
    room.run(PLAIN, "run_offsets", pixels, dim, map_pixels, len(pixel), pixel, found)
    expected = [
        p * dim if map_pixels == 0 else p // map_pixels * map_pixels * dim + p % map_pixels for p in pixel.tolist()
    ]
    assert max(expected) > 2**32 and found.tolist() == expected
