"""What the benchmark does on a GPU, as far as it can be seen without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import __main__ as command_line
from benchmarks import cases, positive
from benchmarks.cases import CASES, Case
from benchmarks.clock import FLUSHED, ColdCache, CpuClock
from benchmarks.graphs import CaptureError, Waits, capture, node_count
from benchmarks.machine import Ceilings
from benchmarks.measure import Effort, Outcome, measure, products_in
from benchmarks.memory import peak_here
from benchmarks.problem import Contender, Results, Step, Work, is_capturable
from benchmarks.released import Checkouts
from benchmarks.report import Report, markdown

SHORT = Effort(rounds=3, seconds=0.2, memory=False)


def test_the_ceilings_are_those_of_random_data() -> None:
    ceilings = Ceilings(Work(bytes=1 << 20, flops=1, dtype=torch.bfloat16), "cpu")
    assert len(ceilings.source.unique()) == 256
    left, right = (factor.float() for factor in ceilings.factors)
    assert left.std() > 0.9 and right.std() > 0.9 and not torch.equal(left, right)
    copied = ceilings.steps["copy"]()["copy"]
    assert torch.equal(copied, ceilings.source)
    torch.testing.assert_close(ceilings.steps["matmul"]()["matmul"].float(), left @ right.t(), rtol=1e-2, atol=1.0)


class Operations(TorchDispatchMode):
    """Notes which operators touch which memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen.append((str(function), arguments[0].data_ptr()))
        return function(*arguments, **options or {})


def test_the_cache_is_cleared_by_reads_after_writes() -> None:
    cache = ColdCache("cpu")
    with Operations() as noted:
        cache.clear()
    (write, written), (read, was_read) = noted.seen
    assert "zero_" in write and "sum" in read and written != was_read
    assert cache.written.nbytes == cache.read.nbytes == FLUSHED


def on_a_pretended_gpu(monkeypatch: pytest.MonkeyPatch, contenders: dict[str, Contender]) -> tuple[Outcome, list[Step]]:
    """``measure`` on a device "cuda" that is the CPU, and the steps that were captured."""
    captured: list[Step] = []

    def capture(step: Step) -> tuple[Step, int]:
        captured.append(step)
        return step, 7

    monkeypatch.setattr("benchmarks.measure.capture", capture)
    monkeypatch.setattr("benchmarks.measure.clock_of", lambda device: CpuClock())
    monkeypatch.setattr("benchmarks.measure.Ceilings", lambda work, device: Ceilings(work, "cpu"))
    sizes = {"pixels": 500, "dim": 16, "classes": 3, "rows": 5}
    case = Case("tiny", "tiny", lambda device, **sizes: positive.Positive.random(**sizes), sizes, contenders)
    return measure(case, "cuda", SHORT, Checkouts(), frozenset(), lambda _: None), captured


def test_a_contender_not_declared_capturable_is_never_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, captured = on_a_pretended_gpu(monkeypatch, cases.without(positive.CONTENDERS, "torch.compile"))
    assert all(row.status == "ok" and row.ms for row in outcome.rows)
    declared = {row.contender for row in outcome.rows if row.nodes == 7 and row.eager_ms}
    assert declared == {"pixcontrast", "pixcontrast, means kept"} and len(captured) == 2
    assert "| eager ms | nodes |" in markdown(Report({}, [outcome]))
    everything = [
        contender for case in CASES.values() for name, contender in case.contenders.items() if is_capturable(contender)
    ]
    names = {name for case in CASES.values() for name, one in case.contenders.items() if one in everything}
    assert names == {"pixcontrast", "pixcontrast, means kept"}


def test_a_step_that_waits_is_timed_without_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []

    def waiting() -> Results:
        if modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return {}

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda **_: pytest.fail("captures"))
    with pytest.raises(Waits, match="synchronizing"):
        capture(waiting)
    assert modes == ["error", 0]


@pytest.mark.parametrize(("status", "expected"), [(0, 42), (1, None)])
def test_nodes_are_counted_by_the_driver(monkeypatch: pytest.MonkeyPatch, status: int, expected: int | None) -> None:
    class Driver:
        @staticmethod
        def cuGraphGetNodes(graph, nodes, count) -> int:
            assert graph.value == 1 << 40 and nodes is None
            count._obj.value = 42
            return status

    graph = SimpleNamespace(raw_cuda_graph=lambda: 1 << 40)
    monkeypatch.setattr("benchmarks.graphs.ctypes.CDLL", lambda name: Driver)
    assert node_count(graph) == expected
    monkeypatch.undo()
    if not torch.cuda.is_available():
        assert node_count(graph) is None


def test_a_lost_gpu_ends_the_run_and_keeps_what_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = command_line.measure

    def losing(case: Case, *rest) -> Outcome:
        if case.name == "small-sampling":
            raise CaptureError("capture failed")
        if case.name == "small":
            return real(replace(case, sizes={"pixels": 500, "dim": 16, "rows": 5}), *rest)
        return pytest.fail("goes on")

    monkeypatch.setattr(command_line, "measure", losing)
    with pytest.raises(SystemExit, match="capture failed"):
        command_line.main(["--quick", "--rounds", "2", "--no-compile", "--out", str(tmp_path)])
    done, lost = Report.load(tmp_path / "results.json").outcomes
    assert done.rows[0].ms and "torch.compile" not in {row.contender for row in done.rows}
    assert "CaptureError: capture failed" in lost.note and lost.note in (tmp_path / "report.md").read_text()


def test_products_are_rounded_only_while_a_case_wants_it() -> None:
    with pytest.raises(ArithmeticError), products_in(True):
        assert torch.backends.cuda.matmul.allow_tf32
        raise ArithmeticError
    assert not torch.backends.cuda.matmul.allow_tf32
    assert CASES["infonce-tf32"].tf32 and not CASES["infonce"].tf32


def test_memory_in_this_process_is_that_of_a_fresh_one() -> None:
    problem = CASES["small"].problem("cpu")
    step = CASES["small"].contenders["pixcontrast"](problem)
    step()
    assert 4 <= peak_here(problem, step, "cpu") < 16
