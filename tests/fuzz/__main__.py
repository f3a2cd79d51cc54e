"""``python -m fuzz --minutes 10``: random cases in a few processes, a table of what ran and failed, a record."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .draw import CAPABILITIES, DTYPES, capability_of

ROOT = Path(__file__).parents[2]
SHOWN = 20  # failures that are printed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--first", type=int, default=int(time.time()) * 1000, help="first seed; by default of the clock"
    )
    parser.add_argument("--function", help="only this function")
    parser.add_argument("--record", type=Path, help="add machine, versions and counts to those of this file")
    parser.add_argument("--seed", type=int, help="run this one case")
    parser.add_argument("--size", type=int, help="bound of the shapes of that case, 0 to 3")
    parser.add_argument("--worker", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    parser.add_argument("--at", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def one_case(options: argparse.Namespace) -> int:
    """The case of a seed, on the instruction set of that seed."""
    wanted = {"PIXCONTRAST_CPU_CAPABILITY": capability_of(options.seed)}
    if wanted.items() - os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "fuzz", *sys.argv[1:]], os.environ | wanted)
    from .run import case

    name, draw, problems = case(options.seed, options.size, options.function)
    about = f"{draw.dtype}, size {draw.size}, {draw.threads} threads, {wanted['PIXCONTRAST_CPU_CAPABILITY']}"
    print(f"{name} ({about}): {'as it should be' if not problems else ''}", *problems, sep="\n  ")
    return bool(problems)


def work(options: argparse.Namespace) -> None:
    """Cases of one instruction set; reports as lines of JSON, the seed at hand in the file ``at``."""
    from pixcontrast import _C

    from .run import run

    place = os.open(options.at, os.O_WRONLY)

    def seeds() -> Any:
        for seed in itertools.count(options.first, len(CAPABILITIES)):
            os.pwrite(place, b"%24d" % seed, 0)
            yield seed

    capability = _C.build_info()["cpu_capability"]
    for report in run(seeds(), options.worker, options.function):
        print(json.dumps(report | {"capability": capability}), flush=True)


class Fuzz:
    """Worker processes, and the sum of their reports."""

    def __init__(self, options: argparse.Namespace) -> None:
        from tqdm import tqdm

        from benchmarks.machine import describe

        self.machine = describe("cpu")  # and commit, of the start
        self.options, self.lock = options, threading.Lock()
        self.cases: Counter[str] = Counter()
        self.capabilities: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []
        self.bar = tqdm(unit=" cases", desc="fuzz", mininterval=1, disable=None)

    def run(self) -> None:
        seconds = self.options.minutes * 60 * self.options.processes / len(CAPABILITIES)
        # two turns of half the time each, so that no instruction set waits for all of the others
        with ThreadPoolExecutor(self.options.processes) as pool:
            list(pool.map(self.worker, range(2 * len(CAPABILITIES)), [seconds / 2] * 2 * len(CAPABILITIES)))
        self.bar.close()

    def worker(self, turn: int, seconds: float) -> None:
        number, share = turn % len(CAPABILITIES), 10**8  # seeds of a turn
        first = (
            self.options.first // len(CAPABILITIES) * len(CAPABILITIES) + number + share * (turn // len(CAPABILITIES))
        )
        end = time.monotonic() + seconds
        environment = os.environ | {"PIXCONTRAST_CPU_CAPABILITY": CAPABILITIES[number], "OMP_WAIT_POLICY": "passive"}
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder) / "at"
            while (left := end - time.monotonic()) > 0:
                at.write_bytes(b"%24d" % first)
                command = [sys.executable, "-m", "fuzz", "--worker", str(left), "--first", str(first), "--at", str(at)]
                command += ["--function", self.options.function] if self.options.function else []
                process = subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
                errors: list[str] = []
                listener = threading.Thread(target=lambda p=process, e=errors: e.append(p.stderr.read()))
                listener.start()
                for line in process.stdout or []:
                    self.add(json.loads(line))
                listener.join()
                if process.wait() == 0:
                    return
                seed = int(at.read_bytes())
                said = " ".join("".join(errors).split())[-2000:]
                problem = f"the process ended with {process.returncode}: {said}"
                self.add(
                    {"cases": {}, "failures": [{"seed": seed, "size": None, "function": "?", "problems": [problem]}]}
                )
                if seed == first and not errors[0]:
                    return
                first = seed + len(CAPABILITIES)

    def add(self, report: dict[str, Any]) -> None:
        with self.lock:
            count = sum(report["cases"].values())
            self.cases.update(report["cases"])
            if count:
                self.capabilities[report["capability"]] += count
            self.failures += report["failures"]
            self.bar.update(count)
            self.bar.set_postfix(failures=len(self.failures))

    def table(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
        failed = Counter(failure["function"] for failure in self.failures)
        lines = [
            "| function | " + " | ".join(names) + " | cases | failures |",
            "| --- |" + " ---: |" * (len(names) + 2),
        ]
        functions = sorted({key.split("|")[0] for key in self.cases})
        for function in functions:
            counts = [self.cases[f"{function}|{name}"] for name in names]
            lines.append(
                f"| {function} | " + " | ".join(f"{n:,}" for n in (*counts, sum(counts), failed[function])) + " |"
            )
        totals = [sum(self.cases[f"{function}|{name}"] for function in functions) for name in names]
        lines.append("| all | " + " | ".join(f"{n:,}" for n in (*totals, sum(totals), len(self.failures))) + " |")
        return "\n".join(lines)

    def record(self, seconds: float) -> dict[str, Any]:
        functions: dict[str, dict[str, int]] = {}
        for key, count in sorted(self.cases.items()):
            function, dtype = key.split("|")
            functions.setdefault(function, {})[dtype] = count
        return {
            **self.machine, "first_seed": self.options.first, "seconds": round(seconds),
            "processes": self.options.processes, "cases": sum(self.cases.values()), "functions": functions,
            "capabilities": dict(sorted(self.capabilities.items())), "failures": self.failures,
        }  # fmt: skip


def added(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of several runs, which drew from other seeds: their sums, then each run without its table."""
    functions: dict[str, Counter[str]] = {}
    capabilities: Counter[str] = Counter()
    for run in runs:
        capabilities.update(run["capabilities"])
        for name, counts in run["functions"].items():
            functions.setdefault(name, Counter()).update(counts)
    return {
        "cases": sum(run["cases"] for run in runs), "failures": sum(len(run["failures"]) for run in runs),
        "functions": functions, "capabilities": capabilities, "runs": runs,
    }  # fmt: skip


def runs_of(record: Path | None) -> list[dict[str, Any]]:
    return json.loads(record.read_text())["runs"] if record and record.exists() else []


def main() -> int:
    options = arguments()
    if options.seed is not None:
        return one_case(options)
    if options.worker is not None:
        work(options)
        return 0
    if any(run["first_seed"] == options.first for run in runs_of(options.record)):
        sys.exit(f"--first {options.first} is in {options.record} already; another first seed draws other cases")
    fuzz, start = Fuzz(options), time.monotonic()
    fuzz.run()
    print(fuzz.table())
    print(f"first seed {options.first}, " + ", ".join(f"{name} {n:,}" for name, n in sorted(fuzz.capabilities.items())))
    for failure in fuzz.failures[:SHOWN]:
        size = "" if failure["size"] is None else f" --size {failure['size']}"
        print(f"\n{failure['function']}: PYTHONPATH=tests python -m fuzz --seed {failure['seed']}{size}")
        print("", *failure["problems"], sep="\n  ")
    if len(fuzz.failures) > SHOWN:
        print(f"\nand {len(fuzz.failures) - SHOWN} more failures")
    if options.record:
        options.record.parent.mkdir(parents=True, exist_ok=True)
        runs = [*runs_of(options.record), fuzz.record(time.monotonic() - start)]
        options.record.write_text(json.dumps(added(runs), indent=1) + "\n")
        print(f"{options.record}: {sum(run['cases'] for run in runs):,} cases of {len(runs)} runs")
    return bool(fuzz.failures) or not fuzz.cases


if __name__ == "__main__":
    sys.exit(main())
