"""What a GPU is needed for, unattended, in stages of at most nine minutes each.

    right     builds for this GPU; tests instructions, operators and all kernels on it against float64; memcheck
    fast      times operators and whole branches, eagerly and as graphs; profiles the slowest kernels
    learn     trains the ablation on real images, several runs at once
    sanitize  all tools of compute-sanitizer

Needs no network, git or make and installs nothing: it runs with the Python it is started with, which must have PyTorch
with CUDA, pytest, tqdm and matplotlib; for `learn` also what scripts/gpu_packages.txt names, or its wheels by --wheels.
After every command it rewrites its results (at most 8 files in --out), so that a run that is killed has kept them.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

from gpu_run.machine import describe
from gpu_run.plan import HERE, ROOT, Plan, unpack_wheels
from gpu_run.results import Results
from gpu_run.runner import Ended, Runner
from gpu_run.stages import stage

STAGES = ("right", "fast", "learn", "sanitize")
SECONDS = 540.0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all, in this order")
    made.add_argument("--rehearse", action="store_true", help="without a GPU: the same stages on the CPU, small sizes")
    made.add_argument("--out", type=Path, help="results folder (default: benchmarks/results/<gpu>)")
    made.add_argument("--work", type=Path, help="folder of logs and trained networks (default: runs/gpu)")
    made.add_argument("--seconds", type=float, default=SECONDS, help=f"for each stage (default: {SECONDS:.0f})")
    made.add_argument("--wheels", type=Path, help="folder of wheels to import from")
    made.add_argument("--compile", action="store_true", help="fast: time torch.compile too")
    made.add_argument("--data", type=Path, help="learn: images/, masks/, classes.txt, train.txt, val.txt")
    made.add_argument("--learn-steps", type=int, default=Plan.learn_steps, help="learn: steps of each run")
    made.add_argument("--learn-jobs", type=int, default=Plan.learn_jobs, help="learn: runs at once")
    made.add_argument("--learn-options", nargs=argparse.REMAINDER, default=[], help="learn: options of fit; comes last")
    return made


def search_path(more: list[Path]) -> str:
    """PYTHONPATH of all commands: ours, ``more``, and what it was."""
    before = [path for path in [os.environ.get("PYTHONPATH", "")] if path]
    return os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(HERE), *map(str, more), *before])


def main() -> None:
    arguments = parser().parse_args()
    about = describe(ROOT, arguments.rehearse)
    if not arguments.rehearse and "gpu" not in about:
        sys.exit(f"gpu.py: no GPU found by PyTorch {about.get('torch')} of {sys.executable}; --rehearse needs none")
    name = re.sub(r"[^a-z0-9]+", "-", str(about.get("gpu", "rehearsal")).lower()).strip("-")
    work = (arguments.work or ROOT / "runs" / ("gpu-rehearsal" if arguments.rehearse else "gpu")).resolve()
    default = work / "results" if arguments.rehearse else ROOT / "benchmarks" / "results" / name
    plan = Plan(
        arguments.rehearse, (arguments.out or default).resolve(), work, str(about.get("capability", "")),
        arguments.compile, (arguments.data or Plan.data).resolve(), arguments.learn_steps, arguments.learn_jobs,
        arguments.learn_options,
    )  # fmt: skip
    for chosen in arguments.stages:
        for path in (work / "logs").glob(f"{chosen}-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    results = Results(plan.out, work / "logs", about)
    site = []
    if arguments.wheels:
        print(f"wheels: {', '.join(unpack_wheels(arguments.wheels, work / 'site')) or 'none found'}")
        site = [work / "site"]
    environment = {"PYTHONPATH": search_path(site), "PYTHONUNBUFFERED": "1"}
    runner = Runner(ROOT, results, arguments.seconds, environment)
    try:
        passed = [runner.run(stage(chosen, plan)) for chosen in arguments.stages]
    except Ended as signal_name:
        sys.exit(f"gpu.py: ended by {signal_name}; what is done is in {plan.out}")
    print(f"\n{results.markdown()}\n\nResults: {plan.out}, logs: {results.logs}", flush=True)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
