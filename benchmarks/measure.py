"""Checks every contender of a case against the truth, and times the right ones in turn."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from .cases import Case
from .clock import Clock, clock_of
from .graphs import Waits, capture
from .machine import Ceilings
from .memory import peak_here, peak_mebibytes
from .problem import Problem, Step, is_capturable
from .released import Checkouts


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: each contender has one turn in a round.
        seconds: after its share of these, a contender that has had three turns has no more.
        memory: whether to measure peak memory, each in a fresh process.
        one_process: measure it in this process instead, which the allocator of a GPU allows without error.
        graphs: on a GPU, time contenders that are declared capturable as CUDA graphs, and eagerly besides.
        patience: seconds; a contender whose step takes longer has two turns of one call, and its memory is that of its
            first step.
    """

    rounds: int = 20
    seconds: float = 8.0
    memory: bool = True
    patience: float = 2.0
    one_process: bool = False
    graphs: bool = True


@dataclass
class Row:
    """What came out for one contender. Times in milliseconds; ``None``: not measured."""

    contender: str
    status: str  # "ok", "wrong" or "failed"
    error: float | None = None  # deviation from float64
    note: str = ""
    ms: float | None = None
    ms_20: float | None = None
    ms_80: float | None = None
    ratio: float | None = None  # times slower than the first contender
    times_floor: float | None = None
    peak_mib: float | None = None
    rounds: int = 0
    eager_ms: float | None = None  # where ``ms`` is that of a CUDA graph
    nodes: int | None = None  # kernels, copies and fills of that graph


@dataclass
class Outcome:
    """What came out for one case."""

    case: str
    about: str
    work: dict[str, float | str]
    floor_ms: float = 0.0
    rest_ms: float | None = None  # of a whole training step without the contrast
    rates: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    sweep: str = ""
    x: int = 0
    note: str = ""


Progress = Callable[[str], None]


@contextlib.contextmanager
def products_in(tf32: bool) -> Iterator[None]:
    """Whether products of float32 on a GPU may be rounded to tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measure(
    case: Case, device: str, effort: Effort, checkouts: Checkouts, skip: frozenset[str], progress: Progress
) -> Outcome:
    """One row for each contender that is not in ``skip``.

    Raises:
        CaptureError: nothing more can be done on the GPU in this process.
    """
    outcome = Outcome(case.name, case.about, {}, sweep=case.sweep, x=case.x)
    with products_in(case.tf32):
        _measure(outcome, case, device, effort, checkouts, skip, progress)
    if effort.memory and not effort.one_process:
        for row in outcome.rows:
            if row.status == "ok":
                progress(f"{case.name}: memory of {row.contender}")
                warm = row.ms is None or row.ms <= 1e3 * effort.patience
                row.peak_mib = peak_mebibytes(case, row.contender, device, checkouts, torch.get_num_threads(), warm)
    return outcome


def _measure(
    outcome: Outcome,
    case: Case,
    device: str,
    effort: Effort,
    checkouts: Checkouts,
    skip: frozenset[str],
    progress: Progress,
) -> None:
    """Everything but the memory of fresh processes."""
    problem = case.problem(device)
    work = problem.work()
    outcome.work |= {"bytes": work.bytes, "flops": work.flops, "dtype": str(work.dtype)}
    steps: dict[str, Step] = {}
    for name, contender in case.contenders_of(problem, checkouts).items():
        if name in skip:
            continue
        progress(f"{case.name}: checking {name}")
        row, step = _check(problem, name, contender)
        outcome.rows.append(row)
        if step is not None:
            if effort.memory and effort.one_process:
                row.peak_mib = peak_here(problem, step, device)
            steps[name] = step
            if device == "cuda" and effort.graphs and is_capturable(contender):
                steps[name] = _as_graph(row, step)
    _time(outcome, problem, steps, device, effort, progress)
    steps.clear()
    try:
        for rest, count in problem.surroundings():
            progress(f"{case.name}: the rest of the step")
            clock = clock_of(device)
            clock.seconds(rest)  # warms up
            outcome.rest_ms = (outcome.rest_ms or 0.0) + 1e3 * count * clock.seconds(rest)
    except Exception as failure:  # the network needs packages and memory that what is measured here does not
        outcome.rest_ms, outcome.note = None, f"the rest of the step: {_first_line(failure)}"


def _as_graph(row: Row, step: Step) -> Step:
    """The step as a graph, if it can be one; its eager time goes into the row."""
    clock = clock_of("cuda")
    row.eager_ms = 1e3 * statistics.median(clock.seconds(step) for _ in range(5))
    try:
        replay, row.nodes = capture(step)
    except Waits as reason:
        row.note, row.eager_ms = f"no graph: {reason}", None
        return step
    return replay


def _first_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0]


def _check(problem: Problem, name: str, contender: Callable[[Problem], Step]) -> tuple[Row, Step | None]:
    """The row of a contender, and its step if it does the right thing."""
    try:
        step = contender(problem)
        error = problem.error(step())
    except Exception as failure:  # a contender that cannot run here must not stop the others
        return Row(name, "failed", note=_first_line(failure)), None
    if not problem.accepts(error):
        return Row(name, "wrong", error), None
    return Row(name, "ok", error), step


def _time(
    outcome: Outcome, problem: Problem, steps: dict[str, Step], device: str, effort: Effort, progress: Progress
) -> None:
    """Fill in times, ratios and the floor."""
    ceilings = Ceilings(problem.work(), device)
    times = interleaved(
        {**ceilings.steps, **steps},
        clock_of(device),
        effort,
        problem.forget_gradients,
        lambda: progress(f"{outcome.case}: timing"),
    )
    copies, products = times.pop("copy"), times.pop("matmul")
    floors = [ceilings.floor(copy, product) for copy, product in zip(copies, products, strict=False)]
    outcome.floor_ms = statistics.median(floors) * 1e3
    outcome.rates = ceilings.rates(statistics.median(copies), statistics.median(products))
    first = outcome.rows[0].contender if outcome.rows else ""
    for row in outcome.rows:
        own = times.get(row.contender)
        if not own:
            continue
        row.rounds = len(own)
        row.ms_20, row.ms, row.ms_80 = (1e3 * value for value in quantiles(own))
        row.times_floor = statistics.median(a / b for a, b in zip(own, floors, strict=False))
        if first in times:
            row.ratio = statistics.median(a / b for a, b in zip(own, times[first], strict=False))


def interleaved(
    steps: Mapping[str, Step],
    clock: Clock,
    effort: Effort,
    before_turn: Callable[[], None] = lambda: None,
    after_round: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each step, one number for each round that it took part in.

    In each round every step has one turn, so that a slow moment of the machine hits all alike. Slow steps take part in
    the first rounds only.
    """
    calls, rounds = {}, {}
    for name, step in steps.items():
        before_turn()
        cost = clock.seconds(step)  # with what only the first call does
        patient = cost <= effort.patience
        if patient:
            cost = clock.seconds(step)
        calls[name] = min(max(int(0.1 / cost), 2), 7) if patient else 1
        share = effort.seconds / len(steps)
        rounds[name] = min(max(int(share / (cost * calls[name])), 3 if patient else 2), effort.rounds)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(max(rounds.values(), default=0)):
        for name, step in steps.items():
            if number < rounds[name]:
                before_turn()
                turn = [clock.seconds(step) for _ in range(calls[name])]
                # the first calls of a turn find caches and heap as another step left them
                times[name].append(statistics.median(turn[len(turn) // 2 :]))
        after_round()
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20, 50 and 80 % quantile."""
    if len(values) < 2:
        return (values[0],) * 3
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], statistics.median(values), tenths[7]
