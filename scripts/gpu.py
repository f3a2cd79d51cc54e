"""`make gpu`: everything that a GPU is needed for, unattended, in less than ten minutes.

Builds the extension for the GPU of this machine, runs the tests on it, looks for memory errors and races with
compute-sanitizer, times all cases of the benchmarks, and writes benchmarks/results/<gpu>/. It needs no network and
installs nothing: it runs with the Python it is started with, which must have PyTorch with CUDA, pytest, tqdm and
matplotlib. A stage that fails is named at the end and does not stop the next one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


@dataclass
class Stage:
    name: str
    command: list[str]
    seconds: int
    environment: dict[str, str] = field(default_factory=dict)
    reports: tuple[str, ...] = ()  # of compute-sanitizer, in the folder of the logs
    ok: bool = False
    took: float = 0.0
    said: str = ""

    def run(self, logs: Path) -> None:
        """Runs the command, prints its output and keeps it in ``logs``."""
        print(f"\n==> {self.name}: {' '.join(self.command)}", flush=True)
        start, log = time.monotonic(), logs / f"{self.name.replace(' ', '-')}.log"
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | self.environment
        with log.open("w") as file:
            try:
                done = subprocess.run(
                    self.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=self.seconds
                )
                self.ok, self.said = done.returncode == 0, f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                self.said = f"stopped after {self.seconds} s"
            except FileNotFoundError as error:
                self.said = str(error)
        self.took = time.monotonic() - start
        lines = log.read_text(errors="replace").splitlines()
        print("\n".join(lines[-25:]), flush=True)
        found = [hit for pattern in self.reports for path in logs.glob(pattern) for hit in errors_in(path)]
        if found:
            self.ok, self.said = False, "; ".join(found[:3])
        elif self.ok:
            self.said = next((line.strip("= ") for line in reversed(lines) if " passed" in line), "")
        else:
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            self.said = "; ".join(failed[:3]) or f"{self.said}: {lines[-1] if lines else ''}"


def errors_in(report: Path) -> list[str]:
    """What compute-sanitizer wrote down as an error."""
    text = report.read_text(errors="replace")
    return re.findall(r"^========= ((?:Invalid|Error|Uninitialized|Barrier|Misaligned).*)$", text, re.MULTILINE)


def stages(results: Path, logs: Path, quick: bool) -> list[Stage]:
    python = sys.executable
    test = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    architecture = "{}.{}".format(*capability())
    architecture_only = {"PIXCONTRAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture}
    found = [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 200, architecture_only),
        Stage("environment", [python, "-m", "pixcontrast.env"], 30),
        Stage("operators", [*test, "-m", "cuda", "tests/test_cuda.py"], 90),
        Stage("kernels", [*test, "tests/cusim", "-k", "gpu"], 120),
    ]
    for tool in SANITIZER_TOOLS if shutil.which("compute-sanitizer") else ():
        run = f"compute-sanitizer --tool {tool} --log-file {logs}/{tool}-%p.txt"
        kernels = [*test, "tests/cusim", "-k", "gpu and not instructions and not planted"]
        found.append(Stage(tool, kernels, 60, {"CUSIM_GPU_TOOL": run}, (f"{tool}-*.txt",)))
    bench = [python, "-m", "benchmarks", "--device", "cuda", "--out", str(results)]
    found.append(Stage("benchmarks", [*bench, *(["--quick"] if quick else ["--seconds", "4"])], 180))
    return found


def capability() -> tuple[int, int]:
    import torch

    return torch.cuda.get_device_capability()


def machine() -> dict[str, str]:
    """GPU, driver and versions, for the results folder."""
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[0]
    except (FileNotFoundError, IndexError):
        driver = "unknown"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small benchmarks only")
    parser.add_argument("--out", type=Path, help="results folder (default: benchmarks/results/<gpu>)")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        sys.exit(f"make gpu: {sys.executable} has no PyTorch; choose another with `make gpu PYTHON=...`")
    if not torch.cuda.is_available():
        sys.exit(f"make gpu: PyTorch {torch.__version__} finds no GPU here (torch.version.cuda: {torch.version.cuda})")
    described = machine()
    name = re.sub(r"[^a-z0-9]+", "-", described["gpu"].lower()).strip("-")
    results = (arguments.out or ROOT / "benchmarks" / "results" / name).resolve()
    logs = ROOT / "runs" / "gpu"
    shutil.rmtree(logs, ignore_errors=True)
    for folder in (results, logs):
        folder.mkdir(parents=True, exist_ok=True)

    ran = stages(results, logs, arguments.quick)
    for stage in ran:
        stage.run(logs)
    rows = [f"| {s.name} | {'pass' if s.ok else '**FAIL**'} | {s.took:.0f} | {s.said.replace('|', '/')} |" for s in ran]
    if not any(s.name in SANITIZER_TOOLS for s in ran):
        rows.append("| compute-sanitizer | not run | | it is not installed |")
    table = "\n".join(["| stage | result | seconds | |", "|---|---|---:|---|", *rows])
    outcome = described | {"stages": {s.name: {"ok": s.ok, "seconds": round(s.took), "said": s.said} for s in ran}}
    (results / "checks.json").write_text(json.dumps(outcome, indent=2) + "\n")
    title = ", ".join(f"{key} {value}" for key, value in described.items())
    (results / "checks.md").write_text(f"# Checks on a GPU\n\n{title}\n\n{table}\n")
    report = results / "report.md"
    if report.exists():
        print(f"\n{report.read_text()}")
    print(f"\n{title}\n{table}\n\nResults: {results}, logs: {logs}")
    sys.exit(0 if all(s.ok for s in ran) else 1)


if __name__ == "__main__":
    main()
