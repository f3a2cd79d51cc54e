"""Large results on the CPU take the memory that those of the step before had."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pixcontrast.functional import gather_pixels, infonce_contrast, positive_contrast
from pixcontrast.ops import release_memory
from pixcontrast.ops.pixel_linear import pixel_linear
from pixcontrast.select import Anchors


@pytest.fixture(autouse=True)
def nothing_in_use() -> None:
    gc.collect()  # a large gradient that another test left in a cycle would be given back in the middle of a test
    release_memory()


def features_of(rows: int) -> Tensor:
    return torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows), requires_grad=True)


def loss_of(operator: str, features: Tensor) -> Tensor:
    rows = len(features)
    labels = torch.arange(rows) % 4  # class 3 has no memory
    if operator == "positive":
        return positive_contrast(features, labels, torch.ones(4, 3, 256).tril(), ignore_index=0).loss
    if operator == "pixel_linear":
        return pixel_linear(features, torch.ones(4, 256)).sum()
    some = torch.arange(0, rows, 100)
    if operator == "infonce":
        return infonce_contrast(features, Anchors(some, labels[some])).loss
    return gather_pixels(features, some).sum()


def gradient(operator: str, rows: int) -> Tensor:
    features = features_of(rows)
    loss_of(operator, features).backward()
    assert features.grad is not None
    return features.grad


@pytest.mark.parametrize("operator", ["positive", "infonce", "gather_pixels"])
def test_what_the_memory_held_before_does_not_matter(operator: str) -> None:
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


@pytest.mark.parametrize("operator", ["positive", "pixel_linear"])
def test_kept_memory_goes_back_to_the_system_when_asked(operator: str) -> None:
    kept = [gradient(operator, 100_000) for _ in range(3)]  # 98 MiB each
    kept.clear()
    before = resident_mib()
    release_memory()
    assert resident_mib() < before - 250


def test_no_more_is_kept_than_was_once_in_use() -> None:
    resident = []
    for rows in range(50_000, 50_020):  # each of another size: 49 MiB
        gradient("positive", rows)
        resident.append(resident_mib())
    assert max(resident[1:]) < resident[0] + 25
    both = [gradient("positive", 50_100), gradient("positive", 50_200)]
    places = {grad.data_ptr() for grad in both}
    both.clear()  # now two blocks may be kept
    again = [gradient("positive", 50_200), gradient("positive", 50_100)]
    assert {grad.data_ptr() for grad in again} == places


def test_batches_of_two_sizes_share_their_memory() -> None:
    place = gradient("positive", 50_000).data_ptr()
    for rows in (40_000, 50_000, 34_000, 50_000):  # the block is at most half as large again
        assert gradient("positive", rows).data_ptr() == place
    held = gradient("positive", 20_000)
    assert held.data_ptr() != place  # the block is much too large


FORK = """
import os, sys, traceback, torch
from pixcontrast.functional import positive_contrast

def gradient(factor):
    features = torch.ones(10_000, 256).cumsum(0).requires_grad_()
    queue = torch.arange(4.0 * 3 * 256).view(4, 3, 256).cos()
    positive_contrast(features, torch.arange(10_000) % 4, queue, loss_weight=factor).loss.backward()
    return features.grad

torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
expected, twice = gradient(1.0).clone(), gradient(2.0).clone()
held = gradient(1.0)
child = os.fork()
if child == 0:
    try:
        right = torch.equal(gradient(2.0), twice) and torch.equal(held, expected)
        held.fill_(float("nan"))
        os._exit(0 if right and torch.equal(gradient(2.0), twice) else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(2)
again = gradient(1.0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(held, expected) and torch.equal(again, expected)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_a_forked_child_has_kept_memory_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
