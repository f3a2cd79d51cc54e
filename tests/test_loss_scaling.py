"""float16 features under loss scaling: gradients that float16 holds only after the scale."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pixcontrast.functional import infonce_contrast, positive_contrast
from pixcontrast.select import Anchors

PIXELS, DIM, CLASSES = 20000, 64, 19


GENERATOR = torch.Generator().manual_seed(1)
LABELS = torch.randint(0, CLASSES, (PIXELS,), generator=GENERATOR)
QUEUE = normalize(torch.randn(CLASSES, 20, DIM, generator=GENERATOR), dim=2).half()
ANCHORS = Anchors(torch.arange(0, PIXELS, 20), LABELS[::20])


def contrast(objective: str, features: Tensor, backend: str) -> Tensor:
    """The loss of pixels, or of a few anchors, with a queue or with each other."""
    if objective == "positive":
        labels = LABELS.view(features.shape[0], *features.shape[2:])
        return positive_contrast(features, labels, QUEUE, backend=backend).loss
    queues = [QUEUE] if objective == "infonce" else []
    return infonce_contrast(features, ANCHORS, queues, loss_weight=1e-4, backend=backend).loss


def make_features(layout: str) -> Tensor:
    g = torch.Generator().manual_seed(0)
    features = normalize(torch.randn(PIXELS, DIM, generator=g), dim=1).half()
    if layout == "rows":
        return features
    maps = features.view(2, 100, 100, DIM).permute(0, 3, 1, 2)
    return maps.contiguous() if layout == "maps" else maps


def close(grad: Tensor, expected: Tensor) -> None:
    """Within the rounding of float16: half a unit of each side, subnormal numbers included."""
    assert grad.dtype == expected.dtype == torch.float16 and expected.isfinite().all()
    torch.testing.assert_close(grad.float(), expected.float(), rtol=2**-10, atol=2**-24)


@pytest.mark.parametrize("scale", [1024.0, 32768.0, 65536.0])
@pytest.mark.parametrize("layout", ["rows", "maps", "channels_last"])
@pytest.mark.parametrize("objective", ["positive", "infonce", "self-contrast"])
def test_gradients_are_rounded_after_the_scale(objective: str, layout: str, scale: float) -> None:
    features, grads = make_features(layout), []
    for backend in ("reference", "extension"):
        leaf = features.clone(memory_format=torch.preserve_format).requires_grad_()
        (contrast(objective, leaf, backend) * scale).backward()
        assert leaf.grad is not None and leaf.grad.stride() == features.stride()
        grads.append(leaf.grad)
    assert float((grads[0] != 0).float().mean()) > (0.5 if objective == "positive" else 0.02)
    close(grads[1], grads[0])


@pytest.mark.parametrize("objective", ["positive", "infonce"])
def test_the_first_step_of_a_grad_scaler_is_that_of_the_reference(objective: str) -> None:
    grads = []
    for backend in ("reference", "extension"):
        weight = make_features("rows").float().requires_grad_()
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler("cpu")
        assert scaler.get_scale() == 65536.0
        scaler.scale(contrast(objective, weight.half(), backend)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 65536.0  # the step was not skipped
        assert weight.grad is not None
        grads.append(weight.grad)
    assert grads[0].any()
    torch.testing.assert_close(grads[1], grads[0], rtol=2**-10, atol=2**-24 / 65536)


@pytest.mark.parametrize("objective", ["positive", "infonce"])
def test_a_kept_graph_and_a_compiled_one_give_the_same(objective: str) -> None:
    features = make_features("rows")
    leaf = features.clone().requires_grad_()
    loss = contrast(objective, leaf, "extension") * 65536
    kept = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(*kept)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: contrast(objective, x, "extension"), fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(leaf) * 65536, leaf)
    torch.testing.assert_close(grad, kept[0], rtol=2**-10, atol=2**-24)
