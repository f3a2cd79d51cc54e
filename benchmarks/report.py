"""The result file, the tables made from it, and the comparison with an earlier one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .measure import Outcome, Row


@dataclass
class Report:
    """A whole run."""

    machine: dict[str, str | int]
    outcomes: list[Outcome]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Report:
        """Raises ``ValueError`` for a file that is no report."""
        try:
            stored = json.loads(path.read_text())
            outcomes = [Outcome(**one | {"rows": [Row(**row) for row in one["rows"]]}) for one in stored["outcomes"]]
            return Report(stored["machine"], outcomes)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a result file of this version of the benchmarks: {error!r}") from error


def markdown(report: Report) -> str:
    """Machine and one table for each case."""
    machine = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    parts = [f"# Benchmarks\n\nMeasured on: {machine}.", LEGEND]
    parts += [_of_case(outcome) for outcome in report.outcomes]
    return "\n\n".join(parts) + "\n"


LEGEND = """\
Forward and backward. The contenders of a case take turns in rounds; times are medians with 20 and 80 % quantiles,
ratios medians of the ratios of the rounds. The floor is what moving the inputs and gradients once, and the matrix
products, take at the rates measured in the same rounds. MiB: peak memory above the inputs. Error: largest deviation
from float64, relative to the largest number of the result (whole training steps: in the Euclidean norm)."""


def _of_case(outcome: Outcome) -> str:
    head = f"## {outcome.case}: {outcome.about}"
    if not outcome.rates:
        return f"{head}\n\nNot measured: {outcome.note or 'nothing was timed'}."
    rates = "{gb_per_s:.0f} GB/s, {gflop_per_s:.0f} GFLOP/s".format(**outcome.rates)
    floor = (
        f"Floor {milliseconds(outcome.floor_ms)} ms, at {rates} ({str(outcome.work['dtype']).removeprefix('torch.')})."
    )
    if outcome.rest_ms:
        timed = [(row.contender, row.ms) for row in outcome.rows if row.ms]
        floor += f"\nThe rest of a training step takes {milliseconds(outcome.rest_ms)} ms."
        shares = ", ".join(f"{ms / (ms + outcome.rest_ms):.1%} with {name}" for name, ms in timed)
        if shares:
            floor += f" Share of the whole step: {shares}."
    if outcome.note:
        floor += f"\nNot measured: {outcome.note}."
    graphs = any(row.eager_ms for row in outcome.rows)
    columns = ["contender", "ms (20–80 %)", *(["eager ms", "nodes"] if graphs else [])]
    columns += ["× the first", "× floor", "peak MiB", "error"]
    return f"{head}\n\n{floor}\n\n" + _table(columns, [_cells(row, graphs) for row in outcome.rows])


def _cells(row: Row, graphs: bool) -> list[str]:
    if row.ms is None:
        why = f"{row.status}, not timed" + (f": {row.note}" if row.note else "")
        return [row.contender, why, *(["", ""] if graphs else []), "", "", "", _number(row.error, ".1e")]
    times = f"{milliseconds(row.ms)} ({milliseconds(row.ms_20)}–{milliseconds(row.ms_80)})"
    eager = [milliseconds(row.eager_ms), _number(row.nodes, "d")] if graphs else []
    shown = [_number(row.ratio, ".2f"), _number(row.times_floor, ".2f"), _number(row.peak_mib, ".0f")]
    return [row.contender, times, *eager, *shown, _number(row.error, ".1e")]


def comparison(now: Report, before: Report) -> str:
    """What changed since an earlier run, for every contender that both have timed."""
    earlier = {(o.case, row.contender): row for o in before.outcomes for row in o.rows if row.ms is not None}
    lines = []
    for outcome in now.outcomes:
        for row in outcome.rows:
            old = earlier.get((outcome.case, row.contender))
            if old is None or row.ms is None or old.ms is None:
                continue
            pairs = [(old.ratio, row.ratio), (old.times_floor, row.times_floor), (old.peak_mib, row.peak_mib)]
            shown = [f"{_number(a, '.3g')} → {_number(b, '.3g')}" for a, b in pairs]
            change = f"{milliseconds(old.ms)} → {milliseconds(row.ms)} (× {row.ms / old.ms:.2f})"
            lines.append([outcome.case, row.contender, change, *shown])
    commits = f"{before.machine.get('commit') or 'earlier'} → {now.machine.get('commit') or 'now'}"
    if not lines:
        return f"## Compared: {commits}\n\nThe two runs have no case and contender in common."
    columns = ["case", "contender", "ms", "× the first", "× floor", "peak MiB"]
    return f"## Compared: {commits}\n\n{_table(columns, lines)}"


def milliseconds(value: float | None) -> str:
    """Three digits, and no exponent."""
    return "–" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _table(columns: list[str], rows: Iterable[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
