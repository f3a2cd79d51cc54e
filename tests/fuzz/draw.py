"""Random inputs: shapes, layouts, dtypes, magnitudes and counts that follow from one seed."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

IGNORE = 255
CAPABILITIES = ("avx512_bf16", "avx512", "avx2", "baseline")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = ({"P": 4, "D": 3, "C": 2, "N": 3}, {"P": 24, "D": 20, "C": 5, "N": 6}, {"P": 64, "D": 40, "C": 20, "N": 10},
         {"P": 1500, "D": 130, "C": 40, "N": 100})  # fmt: skip


def capability_of(seed: int) -> str:
    """The instruction set that a case runs on, so that its seed alone repeats it."""
    return CAPABILITIES[seed % len(CAPABILITIES)]


class Draw:
    """The choices of a case; ``size`` (0 to 3, ``None``: by the seed) bounds the shapes and leaves the rest alone."""

    def __init__(self, seed: int, size: int | None = None) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        drawn = self.random.choices(range(4), (250, 600, 147, 3))[0]
        self.size = drawn if size is None else size
        self.threads = self.pick(1, 1, 1, 1, 2, 3, 4)
        self.dtype = self.pick(*DTYPES)

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def number(self, kind: str, least: int = 0) -> int:
        """A size up to the bound of its kind, small ones and the bound more often."""
        most, spread, special = SIZES[self.size][kind], self.random.random(), self.random.random()
        return max(least, most if special < 0.1 else 0 if special < 0.13 else 1 + int(spread * most))

    def magnitude(self) -> float:
        exponent, plain = self.random.uniform(-30, 30), self.chance(0.6)
        return 1.0 if plain else 10.0**exponent

    def temperature(self) -> float:
        exponent, plain = self.random.uniform(-3, 3), self.chance(0.5)
        return 0.1 if plain else 10.0**exponent

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def share(self, part: float, shape: tuple[int, ...]) -> Tensor:
        """Bool, true for about that share."""
        return torch.rand(shape, generator=self.generator) < part

    def map_shape(self, least: int = 0) -> tuple[int, int, int]:
        """``(B, h, w)`` of at most P pixels."""
        total, batch = self.number("P", least), self.pick(1, 2, 3)
        height = self.random.randint(1, max(1, int((total / batch) ** 0.5)))
        return (batch, height, total // batch // height) if least == 0 else (batch, height, max(1, total // height))

    def logits(self, shape: tuple[int, ...]) -> Tensor | None:
        """Logits of weights in the accumulation dtype, or none."""
        spread, none = self.pick(1.0, 8.0, 1e3), self.chance(0.35)
        return None if none else (self.randn(*shape) * spread).to(torch.promote_types(self.dtype, torch.float32))

    def rows(self, *shape: int, magnitude: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Rows of unlike norms, finite in their dtype."""
        dtype = dtype or self.dtype
        norms = torch.empty(*shape[:-1], 1, dtype=torch.float64).uniform_(0.01, 10, generator=self.generator)
        largest = torch.finfo(dtype).max / 2
        return (self.randn(*shape) * norms * magnitude).clamp(-largest, largest).to(dtype)

    def features(self, dim: int, magnitude: float, unit: bool = False) -> Tensor:
        """``[P, D]`` or ``[B, D, h, w]`` in one of the layouts that a caller may have."""
        layout = self.pick("rows", "columns", "slice", "map", "channels_last", "view of a map")
        if layout in ("rows", "columns", "slice"):
            rows = self.rows(self.number("P"), dim, magnitude=magnitude)
            rows = torch.nn.functional.normalize(rows.double(), dim=1).to(rows.dtype) if unit else rows
            if layout == "slice":
                return torch.stack([rows, torch.full_like(rows, torch.nan)], 1)[:, 0]
            return rows if layout == "rows" else rows.t().contiguous().t()
        batch, height, width = self.map_shape()
        maps = self.rows(batch, height, width, dim, magnitude=magnitude)
        maps = torch.nn.functional.normalize(maps.double(), dim=3).to(maps.dtype) if unit else maps
        maps = maps.permute(0, 3, 1, 2)
        if layout == "view of a map":
            return torch.cat([maps, torch.full_like(maps, torch.nan)], 3)[..., :width]
        return maps.contiguous(
            memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )

    def labels(self, shape: tuple[int, ...], classes: int) -> Tensor:
        """Labels of some of the classes; some are ignored."""
        used = self.pick(classes, min(2, classes), 1)
        labels = self.integers(0, used, shape)
        ignored = self.pick(0.0, 0.2, 0.2, 1.0 if self.chance(0.1) else 0.5)
        return torch.where(self.share(ignored, shape), self.pick(IGNORE, IGNORE, -1), labels)

    def counts(self, classes: int, capacity: int) -> Tensor:
        """Valid rows of each class; hostile ones are negative or beyond the capacity."""
        counts = torch.where(self.share(0.3, (classes,)), self.integers(0, 3, (classes,)), capacity)
        if self.chance(0.15):
            odd = torch.tensor([-1, -(2**62), capacity + 1, 2**31, 2**62])[self.integers(0, 5, (classes,))]
            counts = torch.where(self.share(0.4, (classes,)), odd, counts)
        return (
            counts
            if self.chance(0.15)
            else counts.clamp(max=capacity)
            if self.chance(0.5)
            else counts.clamp(0, capacity)
        )

    def bad(self) -> float:
        return self.pick(torch.nan, torch.inf, -torch.inf)
