"""Device nodes of a training step of the branch, counted on meta tensors."""

from __future__ import annotations

import pytest

from benchmarks.nodes import LAUNCHES, count_step, table
from pixcontrast import ops

MOST = 250


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_of_the_branch_has_at_most_250_device_nodes(variant: str, autocast: bool) -> None:
    counter = count_step(variant, autocast)
    print(table({variant: counter}), sorted(counter.nodes.items()))
    assert 100 < counter.total <= MOST


def test_autocast_is_counted() -> None:
    assert count_step(autocast=True).total > count_step().total  # casts of features, weights and gradients


def test_the_step_counts_operators_of_ours() -> None:
    """Not those of the reference, which would be taken if the kernels were not found."""
    if not ops.available():
        pytest.skip("without the extension there are no operators")
    names = {name for _, name in count_step().nodes}
    ours = set(LAUNCHES) - {"gather_pixels"}  # for sampled anchors
    assert ours <= names
    assert not names & {"sort", "nonzero", "_local_scalar_dense"}
