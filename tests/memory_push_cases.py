"""Inputs of the operators behind ``ClassMemory.push`` and what they must give, by loops."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor


class TopkCase(NamedTuple):
    """Arguments of ``segment_topk``."""

    scores: Tensor | None
    order: Tensor | None
    start: Tensor
    count: Tensor
    k: int


def make_topk(seed: int) -> TopkCase:
    """Segments with gaps, some of them empty; scores with ties, zeros of both signs, NaN and infinities; rows listed
    in any order, some of them nowhere."""
    g, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = g.choice([1, 5, 40, 300])
    scores = torch.randn(rows, generator=generator) * 10.0 ** g.choice([-30, 0, 3, 36])
    if g.random() < 0.6:
        scores = torch.randint(-2, 3, (rows,), generator=generator).float()
        scores = torch.where(torch.rand(rows, generator=generator) < 0.5, scores, -scores)  # zeros of both signs
    if g.random() < 0.5:
        for value in (math.nan, math.inf, -math.inf):
            scores[torch.rand(rows, generator=generator) < 0.2] = value
    order = None
    if g.random() < 0.6:
        order = torch.randperm(rows + 5, generator=generator) - 2
    bounds = sorted(g.choices(range((rows if order is None else len(order)) + 1), k=2 * g.choice([1, 2, 5])))
    start, end = torch.tensor(bounds[::2]), torch.tensor(bounds[1::2])
    if g.random() < 0.5:
        start, end = start[[0]], end[[-1]]
    return TopkCase(None if g.random() < 0.1 else scores, order, start, end - start, g.choice([1, 3, 10, 64, 2000]))


def topk_by_loops(
    scores: Tensor | None, order: Tensor | None, start: Tensor, count: Tensor, k: int
) -> tuple[list[list[int]], int]:
    """The table, and how many scores of rows in segments are not finite."""
    table, not_finite = [], 0
    values = None if scores is None else scores.double().tolist()
    for first, size in zip(start.tolist(), count.tolist(), strict=True):
        members = []
        for position in range(first, first + size):
            row = position if order is None else int(order[position])
            if row < 0 or (values is not None and row >= len(values)):
                continue
            score = 0.0 if values is None else values[row]
            if not math.isfinite(score):
                not_finite += 1
                continue
            members.append((-score, row))
        chosen = [row for _, row in sorted(members)[:k]]
        table.append(chosen + [-1] * (k - len(chosen)))
    return table, not_finite


@dataclass
class WriteCase:
    """Arguments of ``memory_write``; ``before`` is what the rows were."""

    rows: Tensor
    counts: Tensor
    cursors: Tensor
    rejected: Tensor
    source: Tensor
    index: Tensor

    def __post_init__(self) -> None:
        self.before = self.rows.clone()

    def __iter__(self):
        return (getattr(self, field.name) for field in fields(self))

    def copy(self) -> WriteCase:
        memory = {name: getattr(self, name).clone() for name in ("rows", "counts", "cursors", "rejected")}
        return replace(self, **memory)


def make_write(
    seed: int,
    dtype: torch.dtype,
    source_dtype: torch.dtype,
    layout: str | None = None,
    sizes: tuple[int, int, int, int] | None = None,
) -> WriteCase:
    """Sizes are C, N, K, D. Entries with holes, a zero row, rows that are not finite; rings about to wrap around."""
    g, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    classes, capacity, entries, dim = sizes or (
        g.choice([1, 4]),
        g.choice([1, 3, 20]),
        g.choice([1, 5, 30]),
        g.choice([1, 3, 40]),
    )
    layout = layout or g.choice(["rows", "strided", "map", "channels_last"])
    source = torch.randn(2, dim, 5, 6, generator=generator) * 7  # 60 pixels
    as_rows = source.permute(0, 2, 3, 1).reshape(-1, dim)
    as_rows[7], as_rows[11, -1], as_rows[13, 0], as_rows[17, 0] = 0, math.nan, math.inf, -math.inf
    if layout == "strided":
        source = torch.cat([as_rows, as_rows * 2], 1).to(source_dtype)[:, dim:]
    elif layout == "rows":
        source = as_rows.to(source_dtype)
    else:
        source = as_rows.view(2, 5, 6, dim).permute(0, 3, 1, 2).to(source_dtype)
        source = source if layout == "channels_last" else source.contiguous()
    index = torch.randint(-3, 63, (classes, entries), generator=generator)  # outside 0..59: none
    rows = torch.randn(classes, capacity, dim, generator=generator).to(dtype)
    counts = torch.randint(0, capacity + 1, (classes,), generator=generator)
    cursors = torch.where(counts < capacity, counts, torch.randint(0, capacity, (classes,), generator=generator))
    return WriteCase(rows, counts, cursors, torch.tensor(3), source, index)


def write_by_loops(case: WriteCase) -> WriteCase:
    """What the memory must hold, in float64: entry after entry into the ring, the best last."""
    source = case.source if case.source.dim() == 2 else case.source.permute(0, 2, 3, 1).flatten(0, 2)
    memory = replace(case.copy(), rows=case.rows.double())
    capacity = memory.rows.shape[1]
    for c, entries in enumerate(case.index.tolist()):
        for entry in reversed(entries):
            if not 0 <= entry < len(source):
                continue
            row = source[entry].double()
            if not row.isfinite().all():
                memory.rejected += 1
                continue
            memory.rows[c, memory.cursors[c]] = row / row.norm() if row.norm() >= 1e-12 else 0
            memory.cursors[c] = (memory.cursors[c] + 1) % capacity
            memory.counts[c] = min(int(memory.counts[c]) + 1, capacity)
    return memory
