"""The operators at the sizes of the papers' feature maps, on a GPU; on the CPU with fewer pixels."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICES, agree, leaf, without_waiting
from torch import Tensor
from torch.nn.functional import normalize

from pixcontrast import functional as F
from pixcontrast.reference import accumulation_dtype

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FEW = 600  # pixels on the CPU, whose tests only show that the test is right
IGNORED = 255


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("channels", "classes", "pixels"),
    [(128, 19, 20000), (256, 150, 20000), (720, 19, 20000), (2048, 19, 20000), (256, 19, 131072)],
)
def test_positive(device: str, dtype: torch.dtype, channels: int, classes: int, pixels: int) -> None:
    pixels = pixels if device == "cuda" else FEW
    features, queue = torch.randn(pixels, channels).bfloat16(), torch.randn(classes, 40, channels).bfloat16()
    labels = torch.randint(0, classes, (pixels,))
    labels[torch.rand(pixels) < 0.1] = IGNORED
    logits = torch.randn(pixels).bfloat16()

    def run(device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
        x, a = leaf(features, dtype, device), leaf(logits, accumulation_dtype(dtype), device)
        y, rows = labels.to(device), queue.to(device, dtype)
        with without_waiting(device):
            loss = F.positive_contrast(x, y, rows, weight_logits=a, ignore_index=IGNORED, backend=backend).loss
            loss.backward()
        return [loss.detach(), x.grad, a.grad]

    agree(run, device, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize(("channels", "classes"), [(128, 19), (256, 150), (720, 19), (2048, 19)])
def test_infonce(device: str, dtype: torch.dtype, memory: bool, channels: int, classes: int) -> None:
    anchors, rows = (1023, 200) if device == "cuda" else (60, 10)
    features = normalize(torch.randn(2, channels, 40, 30), dim=1).bfloat16()
    queue = normalize(torch.randn(classes, rows, channels), dim=2).bfloat16()
    index, labels = torch.randperm(2400)[:anchors], torch.randint(0, classes, (anchors,))

    def run(device: str, dtype: torch.dtype, backend: str) -> list[Tensor]:
        x = leaf(features, dtype, device)
        queues = [queue.to(device, dtype)] if memory else []
        chosen = F.Anchors(index.to(device), labels.to(device))
        with without_waiting(device):
            loss = F.infonce_contrast(x, chosen, queues, backend=backend).loss
            loss.backward()
        return [loss.detach(), x.grad]

    agree(run, device, dtype)
