"""The bench on trial: planted/planted.cu is right as it stands, and each of its bugs must be found, where it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cusim.build import BENCH, missing
from cusim.kernels import WAYS, KernelError, Kernels, Way

SOURCE = BENCH / "planted" / "planted.cu"
BUGS = re.findall(r"\w+", re.findall(r"enum Bug {(.*?)}", SOURCE.read_text(), re.DOTALL)[0])
ON_CPU = [way for way in WAYS if way.build != "gpu"]


@pytest.fixture(scope="module")
def planted() -> Iterator[Kernels]:
    if reason := missing():
        pytest.skip(reason)
    kernels = Kernels("planted", [SOURCE])
    yield kernels
    kernels.close()


def wrong_sum(kernels: Kernels, way: Way, bug: str) -> bool:
    """Whether the result of the kernel is wrong; whole numbers, which add up exactly in any order."""
    blocks = 3
    numbers = np.random.default_rng(0).integers(-50, 50, (2 * blocks, 128)).astype(np.float32)
    sums, partial, done = np.zeros(9, np.float32), np.empty(blocks, np.float32), np.zeros(1, np.uint32)
    kernels.run(way, "sum", numbers, partial, sums, done, blocks, BUGS.index(bug))
    classes = numbers.reshape(-1, 8).sum(0)
    return not np.array_equal(sums, [*classes, numbers.sum()])


def wrong_product(kernels: Kernels, way: Way, bug: str) -> bool:
    a, b = torch.randint(-8, 9, (2, 16, 64)).bfloat16()
    product = torch.empty(16, 16)
    kernels.run(way, "product", a, b, product, a.shape[1], BUGS.index(bug))
    return not torch.equal(product, a.float() @ b.float().T)


@dataclass(frozen=True)
class Planted:
    """Builds that must find the bug in one of their orders, and what the race checker must say."""

    bug: str
    builds: str
    message: str

    def wrong(self, kernels: Kernels, way: Way) -> bool:
        in_product = BUGS.index(self.bug) >= BUGS.index("early_wait")
        return (wrong_product if in_product else wrong_sum)(kernels, way, self.bug)


PLANTED = [
    Planted("no_barrier_after_start", "plain race", "race: shared memory"),
    Planted("no_barrier_before_read", "plain asan race", "uninitialised: shared memory"),
    Planted("no_barrier_before_reuse", "plain asan race", "race: shared memory"),
    Planted("no_barrier_after_read", "race", "race: shared memory"),
    Planted("static_shared_overrun", "plain asan race", "out of bounds"),
    Planted("dynamic_shared_overrun", "plain asan race", "out of bounds: shared memory, byte 16"),
    Planted("unwritten_shared_read", "plain asan race", "uninitialised: shared memory, byte 12 of class_sums"),
    Planted("no_atomic_in_shared", "race", "race: shared memory"),
    Planted("no_atomic_in_global", "race", "race: global memory"),
    Planted("no_atomic_read", "race", "race: shared memory"),
    Planted("no_fence", "race", "race: global memory"),
    Planted("divergent_barrier", "plain asan race", "divergent barrier"),
    Planted("early_return", "plain asan race", "exits while"),
    Planted("half_warp_shuffle", "plain asan race", "__shfl_xor_sync"),
    Planted("divergent_shuffle", "plain asan race", "divergent warp operation"),
    Planted("exited_lanes", "plain asan race", ", which have exited"),
    Planted("absent_source", "plain asan race", "reads lane 20, which takes no part"),
    Planted("deadlock", "plain asan race", "wait in __syncwarp"),
    Planted("no_syncwarp", "race", "race: shared memory"),
    Planted("no_second_syncwarp", "race", "race: shared memory"),
    Planted("misaligned_vector", "asan race", "misaligned address"),
    Planted("global_read_overrun", "asan race", "out of bounds: global memory"),
    Planted("global_write_overrun", "plain asan race", "out of bounds: global memory"),
    Planted("null_write", "plain asan race", "SIGSEGV"),
    Planted("host_read", "race", "code of the host"),
    Planted("early_wait", "plain asan race", "target of a copy that begins"),
    Planted("no_wait", "plain asan race", "target of a copy that begins"),
    Planted("no_barrier_after_wait", "plain asan race", "uninitialised: shared memory"),
    Planted("no_barrier_before_copy", "plain race", "race: shared memory"),
    Planted("misaligned_matrix", "plain asan race", "ldmatrix"),
]


def test_each_bug_is_tried() -> None:
    assert ["none", *(case.bug for case in PLANTED)] == BUGS


@pytest.mark.parametrize("way", WAYS)
def test_right_kernels_pass(planted: Kernels, way: Way) -> None:
    assert not wrong_sum(planted, way, "none")
    assert not wrong_product(planted, way, "none")


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: case.bug)
def test_bug_is_found(planted: Kernels, case: Planted) -> None:
    found: dict[str, list[str]] = {way.build: [] for way in ON_CPU}
    for way in ON_CPU:
        try:
            if case.wrong(planted, way):
                found[way.build].append("wrong result")
        except KernelError as error:
            found[way.build].append(str(error))
    assert {build for build in found if found[build]} >= set(case.builds.split())
    assert len(found["race"]) == sum(way.build == "race" for way in ON_CPU)  # whatever the order
    assert any(case.message in report for report in found["race"]), found["race"]
    lines = {i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if case.bug in line}
    named = {int(line) for report in found["race"] for line in re.findall(r"planted\.cu:(\d+)", report)}
    assert case.bug == "null_write" or named & {near for line in lines for near in (line, line + 1)}, found["race"]
