"""What tests of kernels share: the kernels, compiled for the CPU, and the ways to run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from cusim.build import BENCH, BUILDS, ROOT, missing
from cusim.kernels import WAYS, Kernels, Way

if "gpu" in BUILDS and (lacking := missing()):
    raise pytest.UsageError(f"CUSIM_RUN_ON=gpu: {lacking}")  # skipped tests would look like a pass
# what these two test is the emulation, in all of its builds
collect_ignore = [] if {"plain", "asan", "race"} <= BUILDS.keys() else ["test_kernels.py", "test_planted_bugs.py"]


@pytest.fixture(scope="session")
def kernels() -> Iterator[Callable[..., Kernels]]:
    """``kernels("positive").run(way, "function", *arguments)`` runs a function of ``bindings_positive.cpp``, compiled
    with ``csrc/positive/cuda.cu`` and those of the further names."""
    if reason := missing():
        pytest.skip(reason)
    compiled: dict[tuple[str, ...], Kernels] = {}

    def find(*names: str) -> Kernels:
        if names not in compiled:
            sources = [ROOT / "csrc" / name / "cuda.cu" for name in names]
            compiled[names] = Kernels(names[0], [*sources, BENCH / f"bindings_{names[0]}.cpp"])
        return compiled[names]

    yield find
    for each in compiled.values():
        each.close()


@pytest.fixture(params=WAYS, ids=lambda way: f"{way.build}-{way.order}")
def way(request: pytest.FixtureRequest) -> Way:
    return request.param
