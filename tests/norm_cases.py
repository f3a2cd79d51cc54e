"""BatchNorm - leaky ReLU - Linear on segments by PyTorch's functions, one segment at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, leaky_relu

EPS, MOMENTUM = 1e-5, 0.1
LEAVES = ("hidden", "hidden_bias", "norm_weight", "norm_bias", "weight", "bias")


@dataclass
class Case:
    """Rows in segments; hidden rows outside of all segments are NaN, and so is the gradient that arrives there."""

    hidden: Tensor  # [P, E]
    start: Tensor | None  # [C]
    count: Tensor  # [C]
    order: Tensor | None  # [P]
    hidden_bias: Tensor  # [C, E], as all that follow
    norm_weight: Tensor
    norm_bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    weight: Tensor  # [O, E] dense, [C, E] one output a segment
    bias: Tensor  # [O] or [C]
    grad: Tensor  # [P, O] or [P]
    slope: float
    training: bool = True
    dense: bool = field(default=True)

    @property
    def segments(self) -> list[slice]:
        step = len(self.hidden) // len(self.count)
        start = [c * step for c in range(len(self.count))] if self.start is None else self.start.tolist()
        return [slice(first, first + size) for first, size in zip(start, self.count.tolist(), strict=True)]

    @property
    def valid(self) -> Tensor:
        """``[P]`` bool: rows of a segment."""
        valid = torch.zeros(len(self.hidden), dtype=torch.bool)
        for segment in self.segments:
            valid[segment] = True
        return valid

    @property
    def places(self) -> Tensor:
        """``[P]``: the hidden row of each row."""
        return torch.arange(len(self.hidden)) if self.order is None else self.order

    def to(self, dtype: torch.dtype) -> Case:
        """All values in ``dtype``."""
        values = {name: value.to(dtype) for name, value in vars(self).items() if is_float(value)}
        return replace(self, **values)


def is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def make_case(
    counts: list[int],
    gaps: list[int],
    width: int,
    dtype: torch.dtype = torch.float32,
    *,
    outputs: int | None = None,
    ordered: bool = False,
    training: bool = True,
    seed: int = 0,
) -> Case:
    """Segments of these counts, each with a gap behind it; ``outputs`` of one dense layer, or one output a segment.

    Columns have a mean of 4, and no y is so near to zero that rounding could take it to the other side.
    """
    g = torch.Generator().manual_seed(seed)
    classes, total = len(counts), sum(counts) + sum(gaps)
    count = torch.tensor(counts)
    start = torch.cat([torch.zeros(1, dtype=torch.int64), (count + torch.tensor(gaps)).cumsum(0)[:-1]])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    order = torch.randperm(total, generator=g) if ordered else None
    dense = outputs is not None
    case = Case(
        hidden=(normal(total, width) + 4).to(dtype),
        start=start,
        count=count,
        order=order,
        hidden_bias=normal(classes, width),
        norm_weight=torch.rand(classes, width, generator=g) * 0.5,
        norm_bias=torch.full((classes, width), 3.0).copysign(normal(classes, width)),
        running_mean=normal(classes, width) + 4,
        running_var=torch.rand(classes, width, generator=g) + 0.5,
        weight=normal(outputs if dense else classes, width),
        bias=normal(outputs if dense else classes),
        grad=normal(total, outputs) if dense else normal(total),
        slope=0.0 if dense else 0.2,
        training=training,
        dense=dense,
    )
    case.hidden[case.places[~case.valid]] = torch.nan
    if dense:
        case.weight, case.bias, case.grad = (t.to(dtype) for t in (case.weight, case.bias, case.grad))
    else:
        case.grad[~case.valid] = torch.nan
    return case


def formula(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, gradients and statistics in ``dtype``; rows outside of segments are 0 in ``out`` and ``hidden``."""
    case = case.to(dtype)
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in LEAVES}
    running = {name: getattr(case, name).clone() for name in ("running_mean", "running_var")}
    out = torch.zeros_like(case.grad)
    for c, segment in enumerate(case.segments):
        h = leaves["hidden"][case.places[segment]] + leaves["hidden_bias"][c]
        own = case.training and len(h) >= 2
        statistics = [running[name][c] for name in running]  # views: batch_norm moves them
        affine = (leaves["norm_weight"][c], leaves["norm_bias"][c])
        a = leaky_relu(batch_norm(h, *statistics, *affine, own, MOMENTUM, EPS), case.slope)
        layer = leaves["weight"] if case.dense else leaves["weight"][c]
        out[segment] = a @ layer.t() + (leaves["bias"] if case.dense else leaves["bias"][c])
    gradients = torch.autograd.grad(out, list(leaves.values()), torch.nan_to_num(case.grad), allow_unused=True)
    results = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), gradients, strict=True)
    }
    if case.dense:  # outside of segments, out is the bias
        results["bias"] = case.grad.sum(0)
        out = torch.where(case.valid[:, None], out, case.bias)
    return {"out": out.detach(), **results, **running}
