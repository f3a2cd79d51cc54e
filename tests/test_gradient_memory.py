"""Gradients of large feature maps on the CPU take the memory that those of the step before had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixcontrast import _C
from pixcontrast.functional import infonce_contrast, positive_contrast, project
from pixcontrast.select import Anchors


def features_of(rows: int) -> Tensor:
    return torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows), requires_grad=True)


def loss_of(operator: str, features: Tensor) -> Tensor:
    rows = len(features)
    labels = torch.arange(rows) % 4  # class 3 has no memory
    if operator == "positive":
        return positive_contrast(features, labels, torch.ones(4, 3, 256).tril(), ignore_index=0).loss
    some = torch.arange(0, rows, 100)
    if operator == "infonce":
        return infonce_contrast(features, Anchors(some, labels[some])).loss
    return project(features, some, torch.ones(2, 256)).sum()


def gradient(operator: str, rows: int) -> Tensor:
    features = features_of(rows)
    loss_of(operator, features).backward()
    assert features.grad is not None
    return features.grad


@pytest.mark.parametrize("operator", ["positive", "infonce", "project"])
def test_what_the_memory_held_before_does_not_matter(operator: str) -> None:
    _C.release_memory()
    grad = gradient(operator, 10000)  # 10 MB
    first, place = grad.clone(), grad.data_ptr()
    grad.fill_(float("nan"))
    del grad
    again = gradient(operator, 10000)
    assert again.data_ptr() == place
    assert torch.equal(again, first)


def resident_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def test_a_gradient_in_use_is_not_given_away() -> None:
    one, other = gradient("positive", 10000), gradient("positive", 10000)
    assert one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize(
    "release", [_C.release_memory, lambda: gradient("positive", 10001)], ids=["asked", "other size"]
)
def test_kept_memory_goes_back_to_the_system(release: object) -> None:
    kept = [gradient("positive", 100_000) for _ in range(3)]  # 98 MiB each
    kept.clear()
    before = resident_mib()
    release()  # type: ignore[operator]
    assert resident_mib() < before - 250
