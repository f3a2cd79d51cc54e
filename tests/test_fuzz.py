"""The fuzz finds nothing in a few seconds, and finds faults that are planted; regressions of what it has found."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz.__main__ import added, main
from fuzz.draw import capability_of
from fuzz.run import SHARES, case, run
from torch import Tensor

from pixcontrast import ClassMemory, ContrastBranch
from pixcontrast.functional import infonce_contrast, memory_mean, positive_contrast
from pixcontrast.queues import PixelQueues
from pixcontrast.select import Anchors

BACKENDS = ("reference", "extension")
OPERATORS = torch.ops.pixcontrast


def test_a_few_seconds_of_every_function_find_nothing() -> None:
    for function in SHARES:
        seeds = range(8 if function == "ContrastBranch" else 50)
        reports = list(run(seeds, function=function))
        assert sum(sum(report["cases"].values()) for report in reports) == len(seeds)
        assert not [failure for report in reports for failure in report["failures"]]


def loses_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OPERATORS.positive

    def positive(features: Tensor, labels: Tensor, *rest) -> list[Tensor]:
        return real(features, torch.where(labels == 0, -1, labels), *rest)

    monkeypatch.setattr(OPERATORS, "positive", positive)


def scales_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OPERATORS.infonce

    def infonce(*arguments) -> list[Tensor]:
        *results, grad = real(*arguments)
        return [*results, grad * 1.05]

    monkeypatch.setattr(OPERATORS, "infonce", infonce)


def hides_a_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OPERATORS.infonce
    monkeypatch.setattr(OPERATORS, "infonce", lambda *arguments: [t.nan_to_num(0.0) for t in real(*arguments)])


def reads_beyond_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OPERATORS.class_mean

    def class_mean(queue: Tensor, counts: Tensor, logits: Tensor | None) -> Tensor:
        return real(queue, (counts + 1).clamp(max=queue.shape[1]), logits)

    monkeypatch.setattr(OPERATORS, "class_mean", class_mean)


def stores_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OPERATORS.memory_write

    def memory_write(rows: Tensor, counts: Tensor, cursors: Tensor, rejected: Tensor, source: Tensor, index: Tensor):
        real(rows, counts, cursors, rejected, source, index)
        if rejected:
            rows[0, 0] = torch.nan

    monkeypatch.setattr(OPERATORS, "memory_write", memory_write)


def loses_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OPERATORS.scatter_pixels
    monkeypatch.setattr(OPERATORS, "scatter_pixels", lambda *arguments: real(*arguments).contiguous())


def is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    real = OPERATORS.unit_rows
    monkeypatch.setattr(OPERATORS, "unit_rows", lambda rows: real(rows) * (1 + 1e-7 * torch.randn(())))


@pytest.mark.parametrize(
    ("plant", "function", "said"),
    [
        (loses_a_class, "positive_contrast", "other integers"),
        (loses_a_class, "PixelContrastLoss", "loss: off by"),
        (scales_a_gradient, "infonce_contrast", "grad features: off by"),
        (hides_a_nan, "infonce_contrast", "does not reach the result (extension)"),
        (reads_beyond_the_count, "memory_mean", "places that are not valid"),
        (stores_nan, "ClassMemory", "the memory holds rows that are not finite"),
        (loses_the_layout, "gather_pixels", "has strides"),
        (is_random, "unit_rows", "other bits the second time"),
    ],
)
def test_planted_faults_are_found(monkeypatch: pytest.MonkeyPatch, plant, function: str, said: str) -> None:
    plant(monkeypatch)
    problems = [problem for seed in range(80) for problem in case(seed, function=function)[2]]
    assert any(said in problem for problem in problems), problems[:5]


def test_a_seed_repeats_its_case_in_a_process_of_its_own() -> None:
    seed = next(n for n in itertools.count() if capability_of(n) == "baseline")
    command = [sys.executable, "-m", "fuzz", "--seed", str(seed), "--function", "unit_rows"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "unit_rows" in done.stdout and "baseline" in done.stdout, done.stderr


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0, 1e3, 1e30])
def test_an_excluded_key_at_any_temperature(temperature: float) -> None:
    features = torch.randn(4, 3, dtype=torch.float64)
    anchors, queue = Anchors(torch.arange(4), torch.tensor([0, 1, 0, 1])), torch.randn(2, 2, 3, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        losses = [
            infonce_contrast(
                features.to(dtype), anchors, [queue.to(dtype)], excluded=torch.tensor([0, 1, -1, 0]),
                temperature=temperature, backend=backend,
            ).loss
            for backend in BACKENDS
        ]  # fmt: skip
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_rows_without_channels_get_a_gradient_of_zero(backend: str) -> None:
    for _ in range(20):
        logits = torch.randn(2, 3, requires_grad=True)
        mean = memory_mean(torch.randn(2, 3, 0), torch.tensor([3, 2]), logits, backend)
        (grad,) = torch.autograd.grad(mean.sum(), logits)
        assert not grad.any()


def test_queues_of_the_released_variant_stay_finite() -> None:
    queues = PixelQueues(3, 4, 5, variant="released", stride=1)
    before = [part.rows.clone() for part in queues.parts()]
    queues.update(torch.full((1, 5, 2, 3), torch.nan), torch.full((1, 2, 3), 1))
    assert all(torch.equal(part.rows, rows) for part, rows in zip(queues.parts(), before, strict=True))
    assert [int(part.rejected) for part in queues.parts()] == [1, 4]


@pytest.mark.filterwarnings("ignore:PixelContrastLoss. the loss is 0")  # there are no pixels
@pytest.mark.parametrize("objective", ["positive", "infonce"])
@pytest.mark.parametrize("dense", [True, False])
def test_a_branch_takes_maps_without_pixels(objective: str, dense: bool) -> None:
    options = {"dense": dense, "max_samples": 4} if objective == "infonce" else {}
    branch = ContrastBranch(6, 3, dim=4, objective=objective, capacity=2, **options)
    features, logits, labels = torch.randn(2, 6, 0, 3), torch.randn(2, 3, 0, 3), torch.zeros(2, 0, 3, dtype=torch.int64)
    branch.remember(features, logits, labels)
    loss = branch(features.requires_grad_(), labels)
    loss.backward()
    assert loss == 0 and not branch.memory.counts.any() and isinstance(branch.memory, ClassMemory)


def test_a_record_adds_runs_of_other_seeds() -> None:
    counts = {"functions": {"unit_rows": {"float32": 3}}, "capabilities": {"avx2": 3}}
    runs = [counts | {"first_seed": seed, "cases": 3, "failures": [{}] * seed} for seed in (0, 1)]
    record = added(runs)
    assert (record["cases"], record["failures"], record["runs"]) == (6, 1, runs)
    assert record["functions"] == {"unit_rows": {"float32": 6}} and record["capabilities"] == {"avx2": 6}


def test_a_record_takes_no_seed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "fuzz.json"
    record.write_text(
        json.dumps(added([{"first_seed": 7, "cases": 0, "failures": [], "functions": {}, "capabilities": {}}]))
    )
    monkeypatch.setattr(sys, "argv", ["fuzz", "--first", "7", "--record", str(record)])
    with pytest.raises(SystemExit, match="--first 7 is in"):
        main()


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_beyond_a_memory_of_one_row_are_cut_to_one_and_no_class_takes_part(backend: str) -> None:
    features, labels = torch.randn(6, 3), torch.zeros(6, dtype=torch.int64)
    for rows in (1, 2):
        queue, counts = torch.randn(1, rows, 3), torch.tensor([5])
        output = positive_contrast(features, labels, queue, queue_counts=counts, backend=backend)
        assert bool(output.loss) == bool(output.class_loss.any()) == (rows == 2)
