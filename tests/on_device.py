"""What tests share that run on a GPU, and on the CPU to show that they themselves are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]


@contextmanager
def without_waiting(device: str) -> Iterator[None]:
    """On a GPU, a call that waits for it is an error."""
    if device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:  # or every later test would fail
        torch.cuda.set_sync_debug_mode("default")


def agree(run: Callable[[str, torch.dtype, str], list[Tensor]], device: str, dtype: torch.dtype) -> None:
    """The extension in ``dtype`` errs no more than four times as much as the reference in that dtype, and the rounding
    of results kept in it."""
    truth = run("cpu", torch.float64, "reference")
    reference = run("cpu", dtype, "reference")
    for number, (exact, plain, result) in enumerate(
        zip(truth, reference, run(device, dtype, "extension"), strict=True)
    ):
        result = result.cpu()
        assert result.dtype == plain.dtype and result.isfinite().all()
        error = (result.double() - exact).abs().max()
        allowed = 4 * (plain.double() - exact).abs().max() + torch.finfo(result.dtype).eps * exact.abs().max()
        assert error <= allowed, f"result {number}: error {error:.1e}, allowed {allowed:.1e}"


def leaf(t: Tensor, dtype: torch.dtype, device: str, layout: str = "map") -> Tensor:
    """``t`` rounded to ``dtype`` as a leaf with gradient: as it is, as channels_last, or as rows."""
    t = t.to(dtype)
    if layout == "channels_last":
        t = t.contiguous(memory_format=torch.channels_last)
    elif layout == "rows":
        t = t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])
    return t.detach().to(device).requires_grad_()
