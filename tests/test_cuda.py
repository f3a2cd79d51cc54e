"""The operators and the whole branch on a GPU, through PyTorch. The same tests run on the CPU, where they show that
they themselves are right; the kernels alone are tested in ``cusim``."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from norm_cases import EPS, LEAVES, MOMENTUM, make_case
from on_device import DEVICES, agree, leaf, without_waiting
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from pixcontrast import ClassMemory, ContrastBranch, PixelContrastLoss, ops, reference
from pixcontrast import functional as F
from pixcontrast.ops.grouped_linear import grouped_linear
from pixcontrast.ops.norm_linear import Norm, norm_linear
from pixcontrast.reference import accumulation_dtype

CLASSES, IGNORED = 19, 255


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that ``dtype`` can hold, so that all dtypes get the same input."""
    return t.to(torch.bfloat16 if dtype == torch.float64 else dtype)


def a_batch(channels: int) -> tuple[Tensor, Tensor]:
    """Features that every dtype can hold, NaN where the labels are ignored."""
    labels = torch.randint(0, CLASSES, (2, 23, 17))
    labels[labels == 3] = IGNORED
    features = torch.randn(2, channels, 23, 17).bfloat16().double() * 0.5
    return torch.where((labels == IGNORED)[:, None], float("nan"), features), labels


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["map", "channels_last", "rows"]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [64, 250])
def test_positive(device: str, dtype: torch.dtype, layout: str, channels: int) -> None:
    features, labels = a_batch(channels)
    queue = torch.randn(CLASSES, 12, channels).bfloat16().double()
    counts = torch.randint(0, 13, (CLASSES,))
    logits, queue_logits = torch.randn(labels.shape).bfloat16().double(), torch.randn(CLASSES, 12).bfloat16().double()

    def run(device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
        sums = accumulation_dtype(dtype)
        x = leaf(features, dtype, device, layout)
        flat = layout == "rows"
        a = leaf(logits.flatten() if flat else logits, sums, device)
        b = leaf(queue_logits, sums, device)
        y, rows, count = (labels.flatten() if flat else labels).to(device), queue.to(device, dtype), counts.to(device)
        options = {"queue_counts": count, "weight_logits": a, "queue_weight_logits": b}
        with without_waiting(device):
            loss = F.positive_contrast(x, y, rows, **options, ignore_index=IGNORED, backend=backend).loss
            (loss * 3).backward()
        return [loss.detach(), x.grad, a.grad, b.grad]

    agree(run, device, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("queues", [0, 2])
@pytest.mark.parametrize("channels", [64, 250])
def test_infonce(device: str, dtype: torch.dtype, queues: int, channels: int) -> None:
    features = normalize(torch.randn(2, channels, 23, 17), dim=1).bfloat16().double()
    rows = normalize(torch.randn(2, CLASSES, 40, channels), dim=3).bfloat16().double()[:queues]
    counts = torch.randint(0, 41, (2, CLASSES))[:queues]
    index = torch.randperm(2 * 23 * 17)[:150]
    index[::7] = -1
    labels = torch.where(index < 0, -1, torch.randint(0, CLASSES, (150,)))

    def run(device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
        x = leaf(features, dtype, device)
        anchors = F.Anchors(index.to(device), labels.to(device))
        keys, valid = [queue.to(device, dtype) for queue in rows], [count.to(device) for count in counts]
        with without_waiting(device):
            loss = F.infonce_contrast(x, anchors, keys, queue_counts=valid, backend=backend).loss
            (loss * 3).backward()
        return [loss.detach(), x.grad]

    agree(run, device, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [64, 250])
def test_gather_pixels(device: str, dtype: torch.dtype, layout: str, channels: int) -> None:
    features = torch.randn(2, channels, 23, 17).bfloat16().double()
    index, towards = torch.randint(-1, 2 * 23 * 17, (300,)), torch.randn(300, channels).bfloat16().double()

    def run(device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
        x, pixels, grad = leaf(features, dtype, device, layout), index.to(device), towards.to(device, dtype)
        with without_waiting(device):
            result = F.gather_pixels(x, pixels, backend)
            result.backward(grad)
        return [result.detach(), x.grad]

    agree(run, device, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [64, 250])
@pytest.mark.parametrize("outputs", [48, None])
def test_norm_linear(device: str, dtype: torch.dtype, width: int, outputs: int | None) -> None:
    counts, gaps = ([250], [50]) if outputs else ([100, 0, 1, 120], [0, 30, 9, 40])
    case = make_case(counts, gaps, width, torch.float64, outputs=outputs, ordered=True)

    def run(device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
        precise = accumulation_dtype(dtype)
        layer = dtype if case.dense else precise
        kinds = {"hidden": dtype, "weight": layer, "bias": layer}
        leaves = {name: leaf(getattr(case, name), kinds.get(name, precise), device) for name in LEAVES}
        running = (case.running_mean.to(device, precise), case.running_var.to(device, precise))
        norm = Norm(leaves["norm_weight"], leaves["norm_bias"], *running, None, True, MOMENTUM, EPS)
        where = {name: getattr(case, name).to(device) for name in ("order", "start", "count")}
        weight = leaves["weight"] if case.dense else leaves["weight"][:, None]
        rows = (leaves["hidden"], leaves["hidden_bias"], norm, weight, leaves["bias"])
        grad = torch.nan_to_num(case.grad).to(device, layer)
        with without_waiting(device) if backend != "reference" else contextlib.nullcontext():
            out = norm_linear(*rows, **where, slope=case.slope, backend=backend)
            out.backward(grad)
        return [out.detach(), *(value.grad for value in leaves.values()), *running]

    agree(run, device, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("width", [64, 250])
def test_grouped_linear(device: str, dtype: torch.dtype, width: int) -> None:
    start, count = torch.tensor([0, 130, 130, 140]), torch.tensor([130, 0, 5, 160])
    rows, weight = torch.randn(300, width).bfloat16().double(), torch.randn(4, 48, width).bfloat16().double() / 8
    valid = reference.members(300, start, count).any(1)[:, None]
    towards = torch.where(valid, torch.randn(300, 48).bfloat16().double(), 0)

    def run(device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
        x, w = leaf(rows, dtype, device), leaf(weight, dtype, device)
        segments, grad = (start.to(device), count.to(device)), towards.to(device, dtype)
        with without_waiting(device) if backend != "reference" else contextlib.nullcontext():
            result = grouped_linear(x, w, *segments, backend)
            result.backward(grad)
        return [torch.where(valid.to(device), result.detach(), 0), x.grad, w.grad]

    agree(run, device, dtype)


def test_gradients_are_scaled_by_any_incoming_one(device: str) -> None:
    features, labels = a_batch(64)
    queue = torch.randn(CLASSES, 12, 64)
    x = leaf(features, torch.float32, device)
    loss = F.positive_contrast(x, labels.to(device), queue.to(device), ignore_index=IGNORED).loss
    one, other = (torch.autograd.grad(loss * factor, x, retain_graph=True)[0] for factor in (1, -2.5))
    (last,) = torch.autograd.grad(loss * 4, x)
    torch.testing.assert_close(other.cpu(), one.cpu() * -2.5)
    torch.testing.assert_close(last.cpu(), one.cpu() * 4)


def test_results_are_the_same_bit_by_bit(device: str) -> None:
    branch, batch = a_branch("positive", device), a_branch_batch(device)

    def run() -> list[Tensor]:
        copied = copy.deepcopy(branch)
        loss = step(copied, *batch)
        return [loss, *(p.grad for p in copied.parameters() if p.grad is not None), copied.memory.rows]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one.cpu(), other.cpu())


def a_branch(objective: str, device: str, **options: Any) -> ContrastBranch:
    if objective == "infonce":
        options |= {"max_samples": 64, "max_views": 5}
    with torch.device(device):
        return ContrastBranch(48, CLASSES, objective=objective, dim=64, capacity=16, quota=2, threshold=0.0, **options)


def a_branch_batch(device: str) -> tuple[Tensor, Tensor, Tensor]:
    with torch.device(device):
        labels = torch.randint(0, 6, (2, 40, 40)).repeat_interleave(2, 1).repeat_interleave(2, 2)
        labels[:, :5] = IGNORED
        logits = (labels[:, None] == torch.arange(CLASSES)[:, None, None]).float()
        return torch.randn(2, 48, 20, 20), logits, labels


def step(branch: ContrastBranch, features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Remember, contrast two streams, backward: what a training step does with the branch."""
    branch.remember(features, logits, labels)
    loss = branch(features, labels) + branch(features.flip(0), labels.flip(0))
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("objective", ["positive", "infonce"])
def test_the_whole_branch_never_waits(device: str, objective: str) -> None:
    branch, batch = a_branch(objective, device), a_branch_batch(device)
    with without_waiting(device):
        losses = [step(branch, *batch) for _ in range(5)]
    assert all(loss.isfinite() for loss in losses) and losses[-1] > 0


def test_a_failure_leaves_the_check_for_waiting_off(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with pytest.raises(ArithmeticError), without_waiting("cuda"):
        raise ArithmeticError
    assert modes == ["error", "default"]


def test_the_drop_in_loss_never_waits(device: str) -> None:
    labels = torch.randint(0, 4, (2, 80, 80)).to(device)
    feats = normalize(torch.randn(2, 32, 20, 20), dim=1).to(device).requires_grad_()
    predict = torch.randint(0, 4, (2, 20, 20)).to(device)
    memory = ClassMemory(4, 32, 32).to(device)
    with without_waiting(device):
        memory.push(feats, labels, quota=10)
    criterion = PixelContrastLoss(max_samples=64, max_views=8)
    for queue in (None, memory, [memory, memory.rows]):
        with without_waiting(device):
            loss = criterion(feats, labels, predict, queue)
            loss.backward()
        assert loss > 0


@pytest.mark.skipif(ops.missing_kernel(torch.device("cuda"), torch.float32) is not None, reason="no CUDA build")
@pytest.mark.parametrize("objective", ["positive", "infonce"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_way_forward_on_cuda_asks_for_no_number(objective: str, variant: str) -> None:
    """On tensors that say they are on a GPU and have no numbers: whatever asks for one fails, with or without a GPU."""
    # without a GPU such tensors can be made, but not moved or differentiated, and there is no fake of cuDNN's sampler
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False), torch.device("cuda"):
        branch = a_branch(objective, "cuda", variant=variant)
        features, logits, labels = a_branch_batch("cuda")
        if objective == "positive":
            branch.remember(features, logits, labels)
        loss = branch(features, labels, return_stats=True)[0]
        assert loss.device.type == "cuda" and loss.dtype == torch.float32 and loss.requires_grad
        memory, feats = ClassMemory(4, 32, 32), torch.randn(2, 32, 20, 20)
        memory.push(feats, labels.clamp_max(3), quota=10)
        criterion = PixelContrastLoss(max_samples=64, max_views=8, variant=variant)
        for queue in (None, memory, [memory, memory.rows]):
            assert criterion(feats, labels, labels, queue).device.type == "cuda"
