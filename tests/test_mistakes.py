"""What a new user gets wrong, and what is not supported, ends in one error that says what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pixcontrast import ClassMemory, ContrastBranch, PixelContrastLoss
from pixcontrast.functional import contrast_with_mean, gather_pixels, infonce_contrast, memory_mean, positive_contrast
from pixcontrast.ops.grouped_linear import grouped_linear
from pixcontrast.ops.norm_linear import Norm, norm_linear
from pixcontrast.ops.pixel_linear import pixel_linear
from pixcontrast.select import Anchors

CLASSES = 3
BACKENDS = ["extension", "reference"]


def make_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8, 4, 5), torch.randint(0, CLASSES, (2, 16, 20))


def make_memory() -> ClassMemory:
    memory = ClassMemory(CLASSES, 4, 8)
    memory.push(torch.randn(12, 8), torch.arange(12) % CLASSES)
    return memory


def calls() -> dict[str, Callable[[object, object], object]]:
    """Everything that takes a map and its labels."""
    memory = make_memory()
    branch = ContrastBranch(8, CLASSES, dim=8, capacity=4)
    anchors_only = ContrastBranch(8, CLASSES, dim=8, objective="infonce")
    positive, infonce = PixelContrastLoss(objective="positive"), PixelContrastLoss()
    return {
        "positive": lambda features, labels: positive(features, labels, queue=memory),
        "infonce": lambda features, labels: infonce(features, labels, queue=memory),
        "branch": branch,
        "branch of infonce": anchors_only,
        "remember": lambda features, labels: branch.remember(features, None, labels),
        "push": memory.push,
    }


@pytest.mark.parametrize("call", calls())
def test_features_and_labels_that_are_no_tensors(call: str) -> None:
    features, labels = make_batch()
    function = calls()[call]
    with pytest.raises(TypeError, match=r"must be a tensor, got numpy.ndarray; use torch.from_numpy\("):
        function(features.numpy(), labels)
    with pytest.raises(TypeError, match=r"labels must be a tensor, got numpy.ndarray; use torch.from_numpy\(labels"):
        function(features, labels.numpy())
    with pytest.raises(TypeError, match=r"labels must be a tensor, got builtins.list; use torch.as_tensor\(labels"):
        function(features, labels.tolist())
    with pytest.raises(TypeError, match=r"labels must be a tensor, got builtins.NoneType$"):
        function(features, None)


@pytest.mark.parametrize("call", calls())
def test_labels_with_a_channel(call: str) -> None:
    features, labels = make_batch()
    with pytest.raises(ValueError, match=r"labels must be \[B, H, W\], got \(2, 1, 16, 20\); use labels.squeeze\(1\)"):
        calls()[call](features, labels[:, None])
    with pytest.raises(ValueError, match=r"labels must be \[B, H, W\], got \(2, 3, 16, 20\)$"):
        calls()[call](features, labels[:, None].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16, torch.float32, torch.bool])
@pytest.mark.parametrize("call", calls())
def test_labels_of_other_dtypes(call: str, dtype: torch.dtype) -> None:
    features, labels = make_batch()
    with pytest.raises(TypeError, match=rf"labels must be int64, got {dtype}; use labels.long\(\)"):
        calls()[call](features, labels.to(dtype))


def test_there_is_one_default_of_ignore_index() -> None:
    for function in (PixelContrastLoss, ContrastBranch, positive_contrast, contrast_with_mean):
        assert inspect.signature(function).parameters["ignore_index"].default == 255


@pytest.mark.parametrize("objective", ["positive", "infonce"])
@pytest.mark.parametrize("queue", ["memory", "tensor", "list"])
def test_a_queue_in_the_place_of_predict(objective: str, queue: str) -> None:
    features, labels = make_batch()
    memory = make_memory()
    given = {"memory": memory, "tensor": memory.rows, "list": [memory, memory.rows]}[queue]
    with pytest.raises(TypeError, match=r"predict, the third argument, .* give a queue as queue=\.\.\."):
        PixelContrastLoss(objective=objective)(features, labels, given)


def test_logits_in_the_place_of_predict() -> None:
    features, labels = make_batch()
    with pytest.raises(TypeError, match=r"got a tensor of torch.float32.*logits.*argmax\(1\)"):
        PixelContrastLoss()(features, labels, torch.randn(2, CLASSES, 4, 5))
    with pytest.raises(TypeError, match=r"argmax\(1\)"):
        ContrastBranch(8, CLASSES, objective="infonce")(features, labels, torch.randn(2, CLASSES, 4, 5))


@pytest.mark.parametrize("objective", ["positive", "infonce"])
def test_a_queue_that_is_no_tensor(objective: str) -> None:
    features, labels = make_batch()
    with pytest.raises((TypeError, ValueError), match=r"queue.*got (numpy\.)?ndarray"):
        PixelContrastLoss(objective=objective)(features, labels, queue=make_memory().rows.numpy())


def test_several_queues_of_which_one_is_no_tensor() -> None:
    features, labels = make_batch()
    rows = make_memory().rows
    for given, hint in (
        ([rows, rows.numpy()], r"got numpy.ndarray; use torch.from_numpy\(queue\)"),
        (rows.tolist(), r"got builtins.list; use torch.as_tensor\(queue\)"),
    ):
        with pytest.raises(TypeError, match=f"queue must be a tensor, {hint}"):
            PixelContrastLoss()(features, labels, queue=given)


@pytest.mark.parametrize("objective", ["positive", "infonce"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_factors_that_are_not_finite(objective: str, number: float) -> None:
    for make in (PixelContrastLoss, lambda **options: ContrastBranch(8, CLASSES, **options)):
        with pytest.raises(ValueError, match=f"loss_weight must be finite, got {number}"):
            make(objective=objective, loss_weight=number)
    for name in ("temperature", "base_temperature"):
        with pytest.raises(ValueError, match=f"{name} must be above 0 and finite, got {number}"):
            PixelContrastLoss(**{name: number})


@pytest.mark.parametrize("shape", [(6, 0), (1, 0, 2, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_features_without_channels(backend: str, shape: tuple[int, ...]) -> None:
    features, labels = torch.zeros(shape), torch.arange(6).view(shape[0], *shape[2:]) % 2
    queue, anchors = torch.zeros(2, 3, 0), Anchors(torch.arange(6), labels.flatten())
    for call in (
        lambda: positive_contrast(features, labels, queue, backend=backend),
        lambda: infonce_contrast(features, anchors, [queue], backend=backend),
        lambda: infonce_contrast(features, anchors, backend=backend),
        lambda: gather_pixels(features, torch.tensor([0]), backend),
    ):
        with pytest.raises(ValueError, match="features must have at least one channel"):
            call()


LABELS, COUNT, INDEX = torch.arange(6) % 2, torch.tensor([3, 3]), torch.tensor([4, 0, 0])
QUEUE = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MATRICES = QUEUE[:, :2].contiguous()


def normed(x: Tensor, backend: str = "auto") -> Tensor:
    ones = torch.ones(8, dtype=x.dtype)
    norm = Norm(ones, ones, ones.clone(), ones.clone(), None, True)
    return norm_linear(x, ones, norm, MATRICES[0], ones[:2], count=torch.tensor([6]), backend=backend)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "positive": lambda x, **options: positive_contrast(x, LABELS, QUEUE, **options).loss,
    "infonce": lambda x, **options: infonce_contrast(x, Anchors(torch.arange(6), LABELS), [QUEUE], **options).loss,
    "self-contrast": lambda x, **options: infonce_contrast(x, Anchors(torch.arange(6), LABELS), **options).loss,
    "memory_mean": lambda x, **options: memory_mean(QUEUE, COUNT, x[:2, :3], **options),
    "gather_pixels": lambda x, **options: gather_pixels(x, INDEX, **options),
    "grouped_linear": lambda x, **options: grouped_linear(x, MATRICES, None, COUNT, **options),
    "norm_linear": normed,
    "pixel_linear": lambda x, **options: pixel_linear(x.T.reshape(1, 8, 2, 3), MATRICES[0], **options),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("operator", OPERATORS)
def test_batched_gradients(operator: str, x: Tensor) -> None:
    out = OPERATORS[operator](x, backend="extension")
    incoming = torch.randn(3, *out.shape, dtype=out.dtype)
    (batched,) = torch.autograd.grad(out, x, incoming, is_grads_batched=True, retain_graph=True)
    for grad, one in zip(batched, incoming, strict=True):
        torch.testing.assert_close(grad, torch.autograd.grad(out, x, one, retain_graph=True)[0])


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_second_differentiation_is_right_or_one_clear_error(operator: str, x: Tensor) -> None:
    def twice(backend: str) -> Tensor:
        (grad,) = torch.autograd.grad(OPERATORS[operator](x, backend=backend).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    with pytest.raises(RuntimeError, match='cannot be differentiated again .* backend="reference"'):
        twice("extension")
    assert twice("reference").isfinite().all()


@pytest.mark.parametrize("operator", ["positive", "infonce", "self-contrast"])
def test_a_hessian_is_one_clear_error_and_not_zero(operator: str, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.functional.hessian(lambda x: OPERATORS[operator](x * 2, backend="extension"), x.detach())
    hessian = torch.autograd.functional.hessian(lambda x: OPERATORS[operator](x, backend="reference"), x.detach())
    assert hessian.any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_torch_func_takes_the_reference(operator: str, x: Tensor) -> None:
    """Or, where the kernels are insisted on, says that there are none."""
    function = OPERATORS[operator]
    detached = x.detach()
    expected = torch.autograd.functional.jacobian(lambda x: function(x, backend="reference"), detached)
    if operator != "norm_linear":  # moves its running statistics, which vmap cannot
        torch.testing.assert_close(torch.func.jacrev(function)(detached), expected)
        rows = torch.stack([detached, detached * 2])
        torch.testing.assert_close(torch.vmap(function)(rows), torch.stack([function(row) for row in rows]))
    with pytest.raises(RuntimeError, match=r"no kernel inside of torch.func \(vmap, grad, jvp, ...\)"):
        torch.func.jacrev(lambda x: function(x, backend="extension"))(detached)
