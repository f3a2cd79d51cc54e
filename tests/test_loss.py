"""`PixelContrastLoss` as its users call it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pixcontrast import ClassMemory, PixelContrastLoss
from pixcontrast import functional as F


def make_inputs():
    features, labels = torch.randn(2, 8, 4, 6), torch.randint(0, 3, (2, 16, 24))
    memory = ClassMemory(3, 5, 8)
    memory.push(torch.randn(9, 8), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1]))
    return features.requires_grad_(), labels, memory


def test_memory_and_tensor_queues() -> None:
    features, labels, memory = make_inputs()
    criterion = PixelContrastLoss(objective="positive", ignore_index=255)
    loss = criterion(features, labels, queue=memory)
    small = labels[:, ::4, ::4]
    expected = F.positive_contrast(features, small, memory.rows, queue_counts=memory.counts).loss
    assert torch.equal(loss, expected)
    rows = features.permute(0, 2, 3, 1).reshape(-1, 8)
    torch.testing.assert_close(criterion(rows, small.reshape(-1), queue=memory), expected)
    full = torch.randn(3, 5, 8)
    assert torch.equal(criterion(features, labels, queue=full), F.positive_contrast(features, small, full).loss)


@pytest.mark.parametrize("backend", ["reference", "extension"])
def test_statistics(backend: str) -> None:
    features, labels, memory = make_inputs()
    labels[labels == 2] = 255
    loss, stats = PixelContrastLoss(objective="positive", ignore_index=255, backend=backend)(
        features, labels, queue=memory, return_stats=True
    )
    small = labels[:, ::4, ::4]
    assert stats.counts.tolist() == [int((small == c).sum()) for c in range(3)]
    torch.testing.assert_close(stats.memory_fill, torch.tensor([0.6, 1.0, 0.0]))
    assert stats.similarity[2].isnan()
    rows = torch.nn.functional.normalize(features.permute(0, 2, 3, 1)[small == 1], dim=1)
    expected = (rows @ memory.rows[1].t()).mean()
    torch.testing.assert_close(stats.similarity[1], expected.detach())
    torch.testing.assert_close(loss, (2 - stats.similarity[:2].sum()) / 3)


def test_loss_weight_is_a_factor_of_loss_and_gradient() -> None:
    features, labels, memory = make_inputs()
    (PixelContrastLoss(objective="positive", ignore_index=255)(features, labels, queue=memory) * 0.25).backward()
    expected, features.grad = features.grad, None
    PixelContrastLoss(objective="positive", ignore_index=255, loss_weight=0.25)(
        features, labels, queue=memory
    ).backward()
    torch.testing.assert_close(features.grad, expected)


def test_nothing_to_contrast() -> None:
    features, labels, memory = make_inputs()
    labels.fill_(255)
    with pytest.warns(UserWarning, match="the loss is 0: no pixel has a label"):
        assert PixelContrastLoss(objective="positive", ignore_index=255)(features, labels, queue=memory).item() == 0
    with pytest.raises(ValueError, match="no class takes part: it needs two pixels"):
        PixelContrastLoss(objective="positive", ignore_index=255, on_empty="raise")(features, labels, queue=memory)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    criterion = PixelContrastLoss(objective="positive", ignore_index=255)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    features, labels, memory = make_inputs()
    weight_logits = torch.randn(2, 4, 6, requires_grad=True)
    results = []
    for function in (criterion, compiled):
        features.grad = weight_logits.grad = None
        loss = function(features, labels, queue=memory, weight_logits=weight_logits)
        (loss * 3).backward()
        results.append((loss.detach(), features.grad, weight_logits.grad))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", ["reference", "extension"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.randn(8)}, ValueError, r"features must be \[P, D\] or \[B, D, H, W\], got \(8,\)"),
        ({"features": torch.ones(6, 8).int()}, TypeError, "features must be float32.*got torch.int32"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels must have shape \(6,\), got \(5,\)"),
        ({"labels": torch.zeros(6)}, TypeError, r"labels must be int64, got torch.float32; use labels.long\(\)"),
        ({"queue": torch.randn(3, 5, 7)}, ValueError, r"queue must be \[C, N, D=8\], got \(3, 5, 7\)"),
        ({"weight_logits": torch.randn(5)}, ValueError, r"weight_logits must have shape \(6,\), got \(5,\)"),
        (
            {"queue_weight_logits": torch.randn(3, 4)},
            ValueError,
            r"queue_weight_logits must have shape \(3, 5\), got \(3, 4\)",
        ),
        ({"queue": torch.randn(3, 5, 8, device="meta")}, ValueError, "queue is on meta, features on cpu; move"),
        (
            {"labels": torch.tensor([0, 1, 2, 3, -1, 255])},
            ValueError,
            r"1 of 6 labels are outside 0..2 and are not ignore_index=255: 3. Set num_classes or ignore_index",
        ),
    ],
)
def test_wrong_arguments_are_named(backend: str, change: dict, error: type, message: str) -> None:
    arguments = {"features": torch.randn(6, 8), "labels": torch.arange(6) % 3, "queue": torch.randn(3, 5, 8)} | change
    features, labels = arguments.pop("features"), arguments.pop("labels")
    with pytest.raises(error, match=message):
        PixelContrastLoss(objective="positive", ignore_index=255, backend=backend)(features, labels, **arguments)


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="objective must be one of .*got 'nothing'"):
        PixelContrastLoss(objective="nothing")
    with pytest.raises(ValueError, match="backend must be one of .*got 'cuda'"):
        PixelContrastLoss(objective="positive", ignore_index=255, backend="cuda")
    with pytest.raises(ValueError, match="on_empty must be one of .*got 'nan'"):
        PixelContrastLoss(objective="positive", ignore_index=255, on_empty="nan")


def test_without_the_extension_the_reference_takes_over(monkeypatch) -> None:
    features, labels, memory = make_inputs()
    expected = PixelContrastLoss(objective="positive", ignore_index=255)(features, labels, queue=memory)
    monkeypatch.setattr("pixcontrast.ops._C", None)
    monkeypatch.setattr("pixcontrast.ops.load_error", "not built")
    torch.testing.assert_close(
        PixelContrastLoss(objective="positive", ignore_index=255)(features, labels, queue=memory), expected
    )
    with pytest.raises(RuntimeError, match=r"the extension did not load \(not built\); rebuild with"):
        PixelContrastLoss(objective="positive", ignore_index=255, backend="extension")(features, labels, queue=memory)


@pytest.mark.parametrize("objective", ["positive", "infonce"])
def test_a_gradient_penalty_is_right_or_one_clear_error(objective: str) -> None:
    """The penalty alone gives the gradient of the reference; by the kernels it says that it cannot."""
    torch.manual_seed(0)
    inputs, weight = torch.randn(24, 4).double(), torch.randn(5, 4).double().requires_grad_()
    labels, queue = torch.randint(0, 3, (24,)), torch.randn(3, 6, 5).double()

    def penalised(backend: str) -> Tensor:
        criterion = PixelContrastLoss(objective=objective, max_samples=None, max_views=None, backend=backend)
        features = inputs @ weight.t()
        loss = criterion(features, labels, queue=queue)
        (grad,) = torch.autograd.grad(loss, features, create_graph=True)
        return loss + grad.square().sum() * 100

    (truth,) = torch.autograd.grad(penalised("reference"), weight)
    assert truth.isfinite().all() and truth.any()
    with pytest.raises(RuntimeError, match='cannot be differentiated again .* backend="reference"'):
        penalised("extension").backward()
