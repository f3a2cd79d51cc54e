"""Rows scaled to norm one."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from . import fake, uses_extension


@torch.no_grad()
def unit_rows(rows: Tensor, backend: str = "auto") -> Tensor:
    """``rows [P, D]`` scaled to norm one, without gradient; rows of norm below 1e-12 become zero.

    Args:
        rows: float32, bfloat16, float16 or float64.
        backend: ``"auto"``, ``"extension"`` or ``"reference"``.
    """
    if uses_extension(backend, rows.device, rows.dtype):
        return torch.ops.pixcontrast.unit_rows(rows)
    return reference.unit_rows(rows)


@fake("unit_rows")
def _(rows: Tensor) -> Tensor:
    return rows.new_empty(rows.shape)
