"""Kernels at sizes that keep a whole device busy; on the CPU with fewer rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cusim import infonce_cases, positive_cases
from cusim.build import BUILDS
from cusim.kernels import WAYS, Kernels

ON_GPU = "gpu" in BUILDS
FIRST = WAYS[0]
TYPES = positive_cases.TYPES if ON_GPU else [torch.bfloat16]
KernelsOf = Callable[..., Kernels]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("dim", "classes", "pixels"), [(128, 19, 20000), (256, 150, 131072), (720, 19, 20000), (2048, 19, 20000)]
)
@pytest.mark.parametrize("maps", [False, True])
def test_positive(kernels: KernelsOf, dim: int, classes: int, pixels: int, dtype: torch.dtype, maps: bool) -> None:
    pixels = pixels if ON_GPU else 320
    case = positive_cases.make_case(dim, classes, dtype, (2, pixels // 2) if maps else None, pixels)
    case = replace(case, multiprocessors=132)
    results = positive_cases.run(kernels("positive", "class_mean"), FIRST, case)
    positive_cases.check(results, case)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.parametrize(("dim", "classes"), [(128, 19), (256, 19), (256, 150), (720, 19), (2048, 19)])
def test_infonce(kernels: KernelsOf, dim: int, classes: int, dtype: torch.dtype, memory: bool) -> None:
    anchors, capacities = (1023, (500, 30)) if ON_GPU else (20, (6, 2))
    case = infonce_cases.make_case(
        dim, dtype, classes=classes, anchors=anchors, capacities=capacities if memory else (), tf32=True
    )
    case.multiprocessors = 132
    infonce_cases.check(case, infonce_cases.run(kernels("infonce"), FIRST, case))
