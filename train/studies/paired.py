"""Paired differences with Student's t: interval, and the effect that so many seeds can detect."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def t_cdf(t: float, dof: int) -> float:
    """Probability that Student's t with ``dof`` degrees of freedom (1 or more) is below ``t``.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(dof))
    cosine = math.cos(angle)
    term, total = (cosine, 0.0) if dof % 2 else (1.0, 0.0)
    for k in range(1 if dof % 2 == 0 else 2, dof, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    both = 2 / math.pi * (angle + math.sin(angle) * total) if dof % 2 else math.sin(angle) * total
    return (1 + both) / 2


def t_quantile(probability: float, dof: int) -> float:
    """The value below which Student's t lies with that ``probability``, in 0.5 to 1."""
    low, high = 0.0, 1.0
    while t_cdf(high, dof) < probability:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, dof) < probability else (low, middle)
    return high


def detectable(spread: float, pairs: int) -> float:
    """Difference that a two-sided test at 5 % finds with 80 % power: ``(t_0.975 + t_0.8) spread / sqrt(pairs)``."""
    return (t_quantile(0.975, pairs - 1) + t_quantile(0.8, pairs - 1)) * spread / math.sqrt(pairs)


@dataclass(frozen=True)
class Paired:
    """Differences of pairs: how many, mean, half width of its 95 % interval, sample deviation, detectable effect."""

    pairs: int
    mean: float
    half: float
    spread: float
    detectable: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def pairs_for(self, effect: float) -> int:
        """How many pairs of this spread detect ``effect`` with 80 % power."""
        return next((n for n in range(2, 1000) if detectable(self.spread, n) <= effect), 1000)


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """``first - second``, pair by pair; of one pair, the spread is NaN."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return Paired(n, mean, math.nan, math.nan, math.nan)
    spread = statistics.stdev(differences)
    return Paired(n, mean, t_quantile(0.975, n - 1) * spread / math.sqrt(n), spread, detectable(spread, n))
