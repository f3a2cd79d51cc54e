"""Which images count as labelled."""

from __future__ import annotations

import numpy as np

from train.errors import UserError


def split_labelled(n: int, labelled: int | float, seed: int) -> tuple[list[int], list[int]]:
    """Split ``range(n)`` into labelled and unlabelled indices.

    The shuffle depends on nothing but ``n`` and ``seed``. With the same seed, a smaller labelled set is part of every
    larger one.

    Args:
        n: number of images.
        labelled: how many are labelled: a count (int, 1 to ``n``) or a fraction (float, above 0 to 1; rounded to the
            nearest count, at least one image).
        seed: any integer.

    Returns:
        The labelled and the unlabelled indices, each ascending.

    Raises:
        UserError: ``labelled`` is out of range.
    """
    count = labelled_count(n, labelled)
    order = np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, n]).permutation(n).tolist()
    return sorted(order[:count]), sorted(order[count:])


def labelled_count(n: int, labelled: int | float) -> int:
    """How many of ``n`` images ``labelled`` means. Arguments and errors as in `split_labelled`."""
    if isinstance(labelled, float):
        if not 0.0 < labelled <= 1.0:
            raise UserError(f"labelled fraction {labelled}: expected above 0 and at most 1 (a whole number is a count)")
        return max(1, round(n * labelled))
    if not 1 <= labelled <= n:
        raise UserError(f"{labelled} labelled images: expected 1 to {n}, the number of images in the train split")
    return labelled
