"""The operator `project` in its three forms: loops over rows, readable PyTorch, compiled kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pixcontrast.functional import project
from pixcontrast.reference import as_rows

BACKENDS = ("reference", "extension")
RESULTS = ("result", "features", "weight", "bias")


@dataclass
class Case:
    features: Tensor
    index: Tensor
    weight: Tensor
    bias: Tensor | None
    incoming: Tensor  # dy

    def to(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Case(self.features.to(dtype), self.index, self.weight.to(dtype), bias, self.incoming.to(dtype))

    def run(self, backend: str, function=project) -> dict[str, Tensor]:
        """Result and gradients by name."""
        features = self.features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        weight = self.weight.clone().requires_grad_()
        bias = None if self.bias is None else self.bias.clone().requires_grad_()
        result = function(features, self.index, weight, bias, backend=backend)
        result.backward(self.incoming)
        leaves = (features, weight) if bias is None else (features, weight, bias)
        return dict(zip(RESULTS, (result.detach(), *(leaf.grad for leaf in leaves)), strict=False))

    def truth(self) -> dict[str, Tensor]:
        """The same row by row in float64."""
        case = self.to(torch.float64)
        pixels = as_rows(case.features)
        result, grad_pixels = torch.zeros_like(case.incoming), torch.zeros_like(pixels)
        grad_weight = torch.zeros_like(case.weight)
        grad_bias = torch.zeros(len(case.weight), dtype=torch.float64)
        for r, p in enumerate(self.index.tolist()):
            if p >= 0:
                result[r] = case.weight @ pixels[p] + (0 if case.bias is None else case.bias)
                grad_pixels[p] += case.weight.t() @ case.incoming[r]
                grad_weight += torch.outer(case.incoming[r], pixels[p])
                grad_bias += case.incoming[r]
        if case.features.dim() == 4:
            batch, dim, height, width = case.features.shape
            grad_pixels = grad_pixels.reshape(batch, height, width, dim).permute(0, 3, 1, 2)
        found = {"result": result, "features": grad_pixels, "weight": grad_weight}
        return found if case.bias is None else found | {"bias": grad_bias}


def random_case(seed: int) -> Case:
    """Rows or maps in both formats; index in order with and without holes, with repeats, short, long, empty, all -1."""
    g = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=g))]

    dim, outputs = pick(1, 2, 3, 17, 64), pick(1, 3, 8, 40)
    shape = pick((23,), (300,), (1, 5, 7), (2, 3, 4), (3, 9, 11), (2, 16, 20))
    features = torch.randn(shape[0], dim, *shape[1:], generator=g, dtype=torch.float64)
    if features.dim() == 4 and pick(True, False):
        features = features.to(memory_format=torch.channels_last)
    pixels = features.numel() // dim
    index = pick(
        torch.arange(pixels),
        torch.arange(pixels),
        torch.randperm(pixels, generator=g)[: pick(5, pixels)],
        torch.randint(0, pixels, (pick(3, 40, 2 * pixels),), generator=g),
        torch.arange(0),
    )
    hole = torch.rand(index.shape, generator=g) < pick(0.0, 0.0, 0.2, 1.0)
    index = torch.where(hole, -1, index)
    weight = torch.randn(outputs, dim, generator=g, dtype=torch.float64)
    bias = torch.randn(outputs, generator=g, dtype=torch.float64)
    return Case(features, index, weight, pick(bias, bias, None), torch.randn(len(index), outputs, generator=g).double())


def relative_errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest deviation of each result, as a share of the largest number of the truth."""
    return {
        name: float((results[name].double() - value).abs().max() / value.abs().max().clamp_min(1e-300))
        for name, value in truth.items()
        if value.numel()
    }


def full_case(shape: tuple[int, ...] = (2, 9, 11), dim: int = 20, outputs: int = 12) -> Case:
    """Every pixel in order but for some holes."""
    features = torch.randn(shape[0], dim, *shape[1:])
    index = torch.arange(features.numel() // dim)
    index[::5] = -1
    return Case(features, index, torch.randn(outputs, dim), torch.randn(outputs), torch.randn(len(index), outputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(100))
def test_agrees_with_loops_in_float64(seed: int, backend: str) -> None:
    case = random_case(seed)
    results, truth = case.run(backend), case.truth()
    assert results.keys() == truth.keys()
    assert max(relative_errors(results, truth).values(), default=0) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(40))
def test_rounding_errors_are_no_larger_than_those_of_the_reference(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed).to(dtype)
    truth, expected, results = case.truth(), case.run("reference"), case.run("extension")
    allowed = relative_errors(expected, truth)
    for name, error in relative_errors(results, truth).items():
        assert results[name].dtype == dtype
        assert error <= 3 * allowed[name] + torch.finfo(dtype).eps, name


def test_the_random_cases_reach_every_special_case() -> None:
    seen: set[str] = set()
    for case in map(random_case, range(100)):
        index = case.index
        pixels = case.features[:, 0].numel()
        in_order = len(index) == pixels and bool(((index == torch.arange(pixels)) | (index < 0)).all())
        holes = bool((index < 0).any())
        seen |= {f"in order={in_order} holes={holes}", f"{case.features.dim()}-d", f"bias={case.bias is not None}"}
        seen |= {"repeats"} if len(index[index >= 0].unique()) < (index >= 0).sum() else set()
        seen |= {"no rows"} if len(index) == 0 else set()
        seen |= {"only holes"} if len(index) and (index < 0).all() else set()
        seen |= {"several tiles"} if len(index) > 256 else set()
        seen |= {"channels_last"} if case.features.dim() == 4 and not case.features.is_contiguous() else set()
    assert {f"in order={a} holes={b}" for a in (True, False) for b in (True, False)} <= seen
    assert {"2-d", "4-d", "bias=True", "bias=False", "channels_last"} <= seen
    assert {"repeats", "no rows", "only holes", "several tiles"} <= seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_order", [True, False])
def test_pixels_of_no_row_and_gradients_of_holes_may_be_anything(
    in_order: bool, dtype: torch.dtype, backend: str
) -> None:
    case = full_case().to(dtype)
    if not in_order:
        case = replace(case, index=case.index.flip(0))
    unused = torch.ones(2 * 9 * 11, dtype=torch.bool)
    unused[case.index[case.index >= 0]] = False
    expected = case.run(backend)
    case.features.movedim(1, -1)[unused.view(2, 9, 11)] = float("nan")
    case.incoming[case.index < 0] = float("nan")
    results = case.run(backend)
    assert (results["result"][case.index < 0] == 0).all()
    assert (results["features"].movedim(1, -1)[unused.view(2, 9, 11)] == 0).all()
    for name, value in expected.items():
        allowed = 4 * torch.finfo(dtype).eps * float(value.abs().max())  # the products may be split in another way
        torch.testing.assert_close(results[name], value, rtol=0, atol=allowed)


@pytest.mark.parametrize("shift", [1, -1])
def test_as_many_rows_as_pixels_need_not_be_in_order(shift: int) -> None:
    case = full_case((2, 8, 9)).to(torch.float64)
    case = replace(case, index=(torch.arange(144) + shift).clamp(0, 143))
    assert max(relative_errors(case.run("extension"), case.truth()).values()) < 1e-12


def test_a_pixel_may_occur_many_times() -> None:
    case = full_case((3, 6, 5))
    index = torch.randint(0, 4, (700,))
    case = replace(case, index=index, incoming=torch.randn(700, 12)).to(torch.float64)
    assert max(relative_errors(case.run("extension"), case.truth()).values()) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (2, 0, 4)])
def test_no_pixels(shape: tuple[int, ...], backend: str) -> None:
    features = torch.randn(shape[0], 5, *shape[1:])
    for rows in (0, 3):
        case = Case(features, torch.full((rows,), -1), torch.randn(4, 5), torch.randn(4), torch.randn(rows, 4))
        results = case.run(backend)
        assert results["features"].shape == features.shape
        assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_order", [True, False])
def test_gradcheck(in_order: bool, backend: str) -> None:
    case = full_case((1, 9, 8), 5, 3).to(torch.float64)
    index = case.index if in_order else torch.tensor([4, -1, 4, 70, 0])
    leaves = [t.requires_grad_() for t in (case.features, case.weight, case.bias) if t is not None]

    def function(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return project(features, index, weight, bias, backend=backend)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    library = torch.ops.pixcontrast
    case = full_case().to(dtype)
    features = case.features.contiguous(memory_format=memory_format)
    for bias in (case.bias, None):
        torch.library.opcheck(library.project.default, (features, case.index, case.weight, bias))
    for needs in ((True, True, True), (False, False, False), (True, False, False), (False, True, True)):
        torch.library.opcheck(
            library.project_backward.default, (case.incoming, features, case.index, case.weight, *needs)
        )
    transposed = as_rows(features).t().contiguous().t()
    torch.library.opcheck(
        library.project_backward.default, (case.incoming, transposed, case.index, case.weight, True, True, True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_keep_dtype_and_memory_format(memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    case = full_case().to(dtype)
    gradient = replace(case, features=case.features.contiguous(memory_format=memory_format)).run("extension")
    assert gradient["features"].dtype == dtype
    assert gradient["features"].is_contiguous(memory_format=memory_format)


def test_non_contiguous_inputs() -> None:
    case = full_case()
    expected = case.run("extension")
    strided = replace(
        case,
        features=case.features.transpose(2, 3).contiguous().transpose(2, 3),
        index=torch.stack([case.index, case.index], 1)[:, 0],
        weight=case.weight.t().contiguous().t(),
        incoming=case.incoming.t().contiguous().t(),
    )
    results = strided.run("extension")
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value)


def test_only_the_gradients_asked_for() -> None:
    case = full_case()
    for wanted in range(1, 8):
        leaves = [
            t.clone().requires_grad_(bool(wanted >> i & 1))
            for i, t in enumerate((case.features, case.weight, case.bias))
            if t is not None
        ]
        project(leaves[0], case.index, leaves[1], leaves[2]).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [bool(wanted >> i & 1) for i in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_dtype_like_any_linear_layer(backend: str) -> None:
    case = full_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = case.run(backend, lambda *args, **options: project(*args, **options).float())
        expected = torch.nn.functional.linear(as_rows(case.features), case.weight, case.bias)
        assert project(case.features, case.index, case.weight, backend=backend).dtype == torch.bfloat16
    used = case.index >= 0
    torch.testing.assert_close(results["result"][used].bfloat16(), expected[used])
    assert all(value.dtype == torch.float32 for value in results.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiles_into_one_graph(memory_format: torch.memory_format, autocast: bool) -> None:
    case = full_case()
    case = replace(case, features=case.features.contiguous(memory_format=memory_format))

    def function(*args, backend: str) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return project(*args, backend=backend).float()

    expected = case.run("extension", function)
    results = case.run("extension", torch.compile(function, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.randn(4)}, ValueError, r"features must be \[P, Din\] or \[B, Din, H, W\], got \(4,\)"),
        ({"features": torch.arange(24).view(6, 4)}, TypeError, "features must be float32"),
        ({"index": torch.zeros(2, 2).long()}, ValueError, r"index must be \[R\], got \(2, 2\)"),
        ({"index": torch.zeros(2)}, TypeError, "index must be int64, got torch.float32"),
        ({"index": torch.tensor([0, 6, -1, -7])}, ValueError, r"index: 2 of 4 are outside -1\.\.5: -7, 6"),
        ({"weight": torch.randn(4)}, ValueError, r"weight must be \[Dout, Din=4\], got \(4,\)"),
        ({"weight": torch.randn(3, 5)}, ValueError, r"weight must have shape \(3, 4\), got \(3, 5\)"),
        ({"bias": torch.randn(4)}, ValueError, r"bias must have shape \(3,\), got \(4,\)"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"features": torch.randn(6, 4), "index": torch.arange(3), "weight": torch.randn(3, 4)}
    with pytest.raises(error, match=message):
        project(**arguments | change)


def test_the_operator_itself_refuses_what_would_leave_the_memory() -> None:
    library = torch.ops.pixcontrast
    features, index, weight = torch.randn(6, 4), torch.arange(3), torch.randn(3, 4)
    for bad in (torch.tensor([0, 6]), torch.tensor([-2])):
        with pytest.raises(ValueError, match=r"index must be within -1\.\.5"):
            library.project(features, bad, weight, None)
    with pytest.raises(ValueError, match="grad must be"):
        library.project_backward(torch.randn(3, 4), features, index, weight, True, True, True)
    with pytest.raises(TypeError, match="weight must be Float, got Double"):
        library.project(features, index, weight.double(), None)
    with pytest.raises(ValueError, match="bias must be"):
        library.project(features, index, weight, torch.randn(4))
