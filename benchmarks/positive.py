"""Benchmark of the positive objective, forward and backward, all contenders in one run.

Each contender's loss and gradients are first compared with the formula in float64; a wrong one is reported, not
timed. Contenders take turns round by round, and a ratio is the median of the rounds' ratios, so that a slow moment of
the machine hits all of them alike.

    python -m benchmarks.positive [--case city large] [--rounds 20] [--out results.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from .positive_contenders import CONTENDERS, Case, masked_pairs

# pixels, channels, classes, memory rows of each class, whether these have weights (in the released code they have not)
CASES = {
    "city": (21125, 256, 19, 256, False),
    "city-paper": (21125, 256, 19, 256, True),
    "large": (131072, 256, 19, 2048, False),
    "small": (4096, 256, 19, 256, False),
}
TOLERANCE = 1e-3  # of the largest number of each result: tells a wrong formula from rounding in float32


def worst_error(case: Case, name: str, truth: tuple[torch.Tensor, ...]) -> float:
    """Largest deviation from float64, relative to the largest number of each of loss and gradients."""
    results = case.step(CONTENDERS[name])
    return max(float((r.double() - t).abs().max() / t.abs().max()) for r, t in zip(results, truth, strict=True))


def milliseconds(case: Case, name: str) -> float:
    start = time.perf_counter()
    case.step(CONTENDERS[name])
    return (time.perf_counter() - start) * 1e3


def copy_milliseconds(case: Case, rounds: int = 9) -> float:
    """Time to read the features and write as much: the floor of any method that gives their gradient."""
    target = torch.empty_like(case.features)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(case.features.detach())
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def peak_mebibytes(case_name: str, name: str) -> float:
    """Peak memory of one step above the inputs, in a fresh process (Linux)."""
    code = f"from benchmarks.positive import _print_peak; _print_peak({case_name!r}, {name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _print_peak(case_name: str, name: str) -> None:
    _, dim, classes, _, weighted_rows = CASES[case_name]
    Case.random(256, dim, classes, 8, weighted_rows).step(CONTENDERS[name])  # loads libraries, threads
    case = Case.random(*CASES[case_name])
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = _resident("VmRSS")
    case.step(CONTENDERS[name])
    print(_resident("VmHWM") - before)


def measure(case_name: str, names: list[str], rounds: int) -> list[dict]:
    """One row for each contender."""
    case = Case.random(*CASES[case_name])
    truth = case.to(torch.float64).step(masked_pairs)
    errors = {name: worst_error(case, name, truth) for name in names}
    timed = [name for name in names if errors[name] <= TOLERANCE]
    times: dict[str, list[float]] = {name: [] for name in timed}
    for name in timed:
        milliseconds(case, name)
    for _ in tqdm(range(rounds), desc=case_name, leave=False):
        for name in timed:
            # the first calls of a turn find caches and heap as another contender left them
            turn = [milliseconds(case, name) for _ in range(7)]
            times[name].append(statistics.median(turn[2:]))
    floor = copy_milliseconds(case)
    rows = []
    for name in names:
        row: dict = {"case": case_name, "contender": name, "error": errors[name]}
        if name in times:
            low, median, high = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
            ratios = [other / own for other, own in zip(times[name], times[timed[0]], strict=True)]
            row |= {"ms": median, "ms_20": low, "ms_80": high, "slower_than_first": statistics.median(ratios)}
            row |= {"times_copy": median / floor, "peak_mib": peak_mebibytes(case_name, name)}
        rows.append(row)
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = [
        "| case | contender | ms (20–80 %) | × the first | × a copy of the features | peak MiB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['case']} | {row['contender']} |"
        if "ms" not in row:
            lines.append(f"{head} wrong, not timed | | | | {row['error']:.1e} |")
            continue
        lines.append(
            f"{head} {row['ms']:.2f} ({row['ms_20']:.2f}–{row['ms_80']:.2f}) | {row['slower_than_first']:.1f} "
            f"| {row['times_copy']:.1f} | {row['peak_mib']:.0f} | {row['error']:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--case", nargs="+", choices=CASES, default=["city", "city-paper"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--skip", nargs="*", choices=CONTENDERS, default=[], help="contenders to leave out")
    parser.add_argument("--out", type=Path, help="also write the rows and the machine as JSON")
    arguments = parser.parse_args()
    names = [name for name in CONTENDERS if name not in arguments.skip]
    rows = [row for case in arguments.case for row in measure(case, names, arguments.rounds)]
    print(f"float32, forward + backward, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(rows))
    if arguments.out:
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        arguments.out.write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=1))
        print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
