"""The operator `gather_pixels` in its forms: loops over rows, readable PyTorch, compiled kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from on_device import DEVICES, without_waiting
from torch import Tensor

from pixcontrast.functional import gather_pixels
from pixcontrast.reference import as_rows

BACKENDS = ("reference", "extension")
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]


@dataclass
class Case:
    features: Tensor
    index: Tensor
    incoming: Tensor  # dy [R, D]

    def to(self, dtype: torch.dtype) -> Case:
        return Case(self.features.to(dtype), self.index, self.incoming.to(dtype))

    def run(self, backend: str, device: str = "cpu", function=gather_pixels) -> tuple[Tensor, Tensor]:
        """Rows, and the gradient of the features."""
        features = self.features.detach().clone(memory_format=torch.preserve_format).to(device).requires_grad_()
        index, incoming = self.index.to(device), self.incoming.to(device)
        with without_waiting(device):
            rows = function(features, index, backend=backend)
            rows.backward(incoming)
        assert features.grad is not None
        return rows.detach(), features.grad

    def truth(self) -> tuple[Tensor, Tensor]:
        """The same row by row in float64."""
        pixels, incoming = as_rows(self.features).double(), self.incoming.double()
        rows, grad = torch.zeros_like(incoming), torch.zeros_like(pixels)
        for r, p in enumerate(self.index.tolist()):
            if p >= 0:
                rows[r] = pixels[p]
                grad[p] += incoming[r]
        if self.features.dim() == 4:
            batch, dim, height, width = self.features.shape
            grad = grad.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
        return rows, grad


def random_case(seed: int) -> Case:
    """Rows or maps in both formats; index in order, permuted, with repeats, longer than a tile, empty; with holes."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=g))]

    dim = pick(1, 2, 17, 33, 70)
    shape = pick((23,), (600,), (1, 5, 7), (3, 9, 11), (2, 16, 20))
    features = torch.randn(shape[0], dim, *shape[1:], generator=g, dtype=torch.float64)
    if features.dim() == 4 and pick(True, False):
        features = features.to(memory_format=torch.channels_last)
    pixels = features.numel() // dim
    index = pick(
        torch.arange(pixels),
        torch.randperm(pixels, generator=g)[: pick(5, pixels)],
        torch.randint(0, pixels, (pick(3, 40, 2 * pixels),), generator=g),
        torch.arange(0),
    )
    index = torch.where(torch.rand(index.shape, generator=g) < pick(0.0, 0.2, 1.0), -1, index)
    return Case(features, index, torch.randn(len(index), dim, generator=g, dtype=torch.float64))


def some_case(shape: tuple[int, ...] = (2, 9, 11), dim: int = 20) -> Case:
    """More rows than a tile, with repeats and holes."""
    features = torch.randn(shape[0], dim, *shape[1:])
    index = torch.randint(0, features.numel() // dim, (400,))
    index[::5] = -1
    return Case(features, index, torch.randn(len(index), dim))


def check(case: Case, backend: str, device: str = "cpu") -> None:
    """Rows are exact. So is the gradient of a pixel of one row; a sum errs by the roundings of its additions, which
    kernels do in float32 (the reference in the dtype), and by that of the result."""
    rows, grad = (result.cpu() for result in case.run(backend, device))
    expected_rows, expected_grad = case.truth()
    assert rows.dtype == grad.dtype == case.features.dtype
    assert torch.equal(rows.double(), expected_rows)
    _, sizes = replace(case, incoming=case.incoming.abs()).truth()
    additions = int(torch.bincount(case.index[case.index >= 0], minlength=1).max()) - 1
    once = torch.finfo(case.features.dtype).eps / 2
    adding = once if backend == "reference" else min(once, torch.finfo(torch.float32).eps / 2)
    allowed = once * expected_grad.abs() + (1 + once) * ((1 + adding) ** additions - 1) * sizes
    assert ((grad.double() - expected_grad).abs() <= (allowed if additions > 0 else 0)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_loops(seed: int, dtype: torch.dtype, backend: str, device: str) -> None:
    if device == "cuda" and backend == "extension" and dtype == torch.float64:
        pytest.skip("no float64 kernel for cuda")
    check(random_case(seed).to(dtype), backend, device)


def test_the_random_cases_reach_every_special_case() -> None:
    seen: set[str] = set()
    for case in map(random_case, range(30)):
        index, used = case.index, case.index[case.index >= 0]
        channels_last = case.features.dim() == 4 and not case.features.is_contiguous()
        seen |= {f"{case.features.dim()}-d channels_last={channels_last}"}
        seen |= {"repeats"} if len(used.unique()) < len(used) else set()
        seen |= {"no rows"} if len(index) == 0 else set()
        seen |= {"holes"} if 0 < len(used) < len(index) else set()
        seen |= {"only holes"} if len(index) and len(used) == 0 else set()
        seen |= {"in order"} if len(used) > 1 and len(used) == len(index) and bool((used.diff() == 1).all()) else set()
        seen |= {f"{case.features.dim()}-d several tiles"} if len(used.unique()) > 256 else set()
    assert {"2-d channels_last=False", "4-d channels_last=False", "4-d channels_last=True", "repeats", "holes"} <= seen
    assert {"no rows", "only holes", "in order", "2-d several tiles", "4-d several tiles"} <= seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_pixels_of_no_row_and_gradients_of_holes_may_be_anything(
    memory_format: torch.memory_format, backend: str
) -> None:
    case = some_case((2, 20, 30))
    case = replace(case, features=case.features.contiguous(memory_format=memory_format))
    expected = case.run(backend)
    unused = torch.ones(2 * 20 * 30, dtype=torch.bool)
    unused[case.index[case.index >= 0]] = False
    assert unused.any()
    case.features.movedim(1, -1)[unused.view(2, 20, 30)] = float("nan")
    case.incoming[case.index < 0] = float("nan")
    assert all(torch.equal(*pair) for pair in zip(case.run(backend), expected, strict=True))
    assert (expected[0][case.index < 0] == 0).all()
    assert (expected[1].movedim(1, -1)[unused.view(2, 20, 30)] == 0).all()


def test_a_pixel_of_many_rows_is_added_up_in_their_order() -> None:
    """In float32 1 + 2^-24 is 1, and the other way round the small ones add up first: the order can be seen."""
    small, one = torch.full((64, 3), 2.0**-24), torch.ones(1, 3)
    for shape in ((2, 4, 5), (40,)):
        for incoming in (torch.cat([one, small]), torch.cat([small, one])):
            case = Case(torch.zeros(shape[0], 3, *shape[1:]), torch.full((65,), 17), incoming)
            _, grad = case.run("extension")
            sum_in_order = incoming[0].clone()
            for row in incoming[1:]:
                sum_in_order += row
            assert torch.equal(as_rows(grad)[17], sum_in_order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pixel_of_many_rows_is_rounded_once(dtype: torch.dtype) -> None:
    case = Case(torch.zeros(2, 3, 4, 5, dtype=dtype), torch.full((1000,), 17), torch.rand(1000, 3).to(dtype))
    _, grad = case.run("extension")
    assert torch.equal(as_rows(grad)[17], case.incoming.double().sum(0).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3, 4), (2, 5, 0, 4)])
def test_no_pixels(shape: tuple[int, ...], backend: str) -> None:
    for rows in (0, 3):
        case = Case(torch.randn(shape), torch.full((rows,), -1), torch.randn(rows, shape[1]))
        found, grad = case.run(backend)
        assert found.shape == (rows, shape[1]) and grad.shape == shape
        assert not found.any() and not grad.any()


@pytest.mark.parametrize("shape", [(4, 0), (2, 0, 3, 4)])
def test_no_channels_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features must have at least one channel, got"):
        gather_pixels(torch.randn(shape), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradcheck(memory_format: torch.memory_format, backend: str) -> None:
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    index = torch.tensor([4, -1, 4, 39, 0])
    assert torch.autograd.gradcheck(lambda features: gather_pixels(features, index, backend), features, fast_mode=True)


def test_gradients_cannot_be_differentiated_again() -> None:
    case = some_case()
    features = case.features.requires_grad_()
    rows = gather_pixels(features, case.index, "extension")
    (grad,) = torch.autograd.grad((rows**2).sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_opcheck(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    library = torch.ops.pixcontrast
    case = some_case().to(dtype)
    features = case.features.contiguous(memory_format=memory_format)
    for given in (features, features[:, :, :, ::2], as_rows(features), as_rows(features).t().contiguous().t()):
        index = case.index.clamp(max=given.numel() // 20 - 1)
        torch.library.opcheck(library.gather_pixels.default, (given, index))
        torch.library.opcheck(library.scatter_pixels.default, (case.incoming, index, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_keep_dtype_and_memory_format(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    case = some_case().to(dtype)
    _, grad = replace(case, features=case.features.contiguous(memory_format=memory_format)).run("extension")
    assert grad.dtype == dtype
    assert grad.is_contiguous(memory_format=memory_format)


def test_non_contiguous_inputs() -> None:
    case = some_case()
    expected = case.run("extension")
    strided = Case(
        case.features.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([case.index, case.index], 1)[:, 0],
        case.incoming.t().contiguous().t(),
    )
    assert all(torch.equal(*pair) for pair in zip(strided.run("extension"), expected, strict=True))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_same_bits_with_any_number_of_threads(memory_format: torch.memory_format) -> None:
    case = some_case((2, 40, 50), 100)
    case = replace(case, features=case.features.contiguous(memory_format=memory_format))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = case.run("extension")
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert all(torch.equal(*pair) for pair in zip(case.run("extension"), expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 3, 2**15, 2**15), (2**21, 1100)])
def test_more_elements_than_fit_in_32_bits(shape: tuple[int, ...]) -> None:
    features = torch.empty(shape, dtype=torch.bfloat16)  # only the pages that are written or read take memory
    index = torch.tensor([2**21 - 1, 0, 2_000_001])
    if len(shape) == 4:
        index = torch.tensor([2**30 - 1, 0, 2**29 + 5])
    expected = torch.randn(3, shape[1]).bfloat16()
    for row, pixel in enumerate(index.tolist()):
        if len(shape) == 4:
            features[0, :, pixel // 2**15, pixel % 2**15] = expected[row]
        else:
            features[pixel] = expected[row]
    assert torch.equal(gather_pixels(features, index, "extension"), expected)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_compiles_into_one_graph(memory_format: torch.memory_format) -> None:
    case = some_case()
    case = replace(case, features=case.features.contiguous(memory_format=memory_format))
    for backend in BACKENDS:
        expected = case.run(backend)
        compiled = torch.compile(gather_pixels, fullgraph=True, backend="aot_eager")
        assert all(torch.equal(*pair) for pair in zip(case.run(backend, function=compiled), expected, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.randn(4)}, ValueError, r"features must be \[P, D\] or \[B, D, H, W\], got \(4,\)"),
        ({"features": torch.arange(24).view(6, 4)}, TypeError, "features must be float32"),
        ({"index": torch.zeros(2, 2).long()}, ValueError, r"index must be \[R\], got \(2, 2\)"),
        ({"index": torch.zeros(2)}, TypeError, "index must be int64, got torch.float32"),
        ({"index": torch.tensor([0, 6, -1, -7])}, ValueError, r"index: 2 of 4 are outside -1\.\.5: -7, 6"),
        ({"index": torch.zeros(2, device="meta").long()}, ValueError, "index is on meta, expected cpu"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"features": torch.randn(6, 4), "index": torch.arange(3)}
    with pytest.raises(error, match=message):
        gather_pixels(**arguments | change)


def test_the_operators_themselves_refuse_what_would_leave_the_memory() -> None:
    library = torch.ops.pixcontrast
    features, index, grad = torch.randn(6, 4), torch.arange(3), torch.randn(3, 4)
    for bad in (torch.tensor([0, 6]), torch.tensor([-2])):
        with pytest.raises(ValueError, match=r"index must be within -1\.\.5"):
            library.gather_pixels(features, bad)
        with pytest.raises(ValueError, match=r"index must be within -1\.\.5"):
            library.scatter_pixels(grad[: len(bad)], bad, features)
    with pytest.raises(TypeError, match="index must be Long, got Int"):
        library.gather_pixels(features, index.int())
    with pytest.raises(ValueError, match=r"features must be \[P, D\] or \[B, D, H, W\]"):
        library.gather_pixels(features[None], index)
    with pytest.raises(ValueError, match=r"grad must be \[3, 4\], got \[2, 4\]"):
        library.scatter_pixels(grad[:2], index, features)
    with pytest.raises(TypeError, match="grad must be Float, got Double"):
        library.scatter_pixels(grad.double(), index, features)
