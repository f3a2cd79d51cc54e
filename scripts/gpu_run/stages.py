"""The four stages: is it right, how fast is it, does it learn, and what do the sanitizers say."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from .command import PYTHON, Command, Stage, Step
from .findings import benchmarks_found, kernels_found
from .learn import learn
from .plan import Plan, complaints_of, marked_cuda, sanitizer, without_tool

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CUSIM = "tests/cusim"
GRAPHS = "tests/test_cuda_graphs.py"


def stage(name: str, plan: Plan) -> Stage:
    return {"right": right, "fast": fast, "learn": learn, "sanitize": sanitize}[name](plan)


def right(plan: Plan) -> Stage:
    """All kernels and operators against float64; kernels are compiled while the extension is."""
    if plan.rehearse:
        on = {"CUSIM_RUN_ON": "plain"}
        compiled = Command("compile", [PYTHON, "-m", "cusim.build", "instructions", "scale"], 120, on)
        operators = ["tests/test_cuda.py", "-m", "not cuda", "-k", "64-rows-dtype0 or positive-cpu"]
        graphs = ["tests/test_benchmarks_on_gpu.py", "-k", "capture"]
        kernels = [
            f"{CUSIM}/test_scale_cuda.py",
            f"{CUSIM}/test_infonce_cuda.py",
            "-k",
            "scale or long_rows and dtype1 and False",
        ]
    else:
        on = {"CUSIM_RUN_ON": "gpu"}
        compiled = Command("compile", [PYTHON, "-m", "cusim.build"], 300, on)
        operators, kernels = [*(path for path in marked_cuda() if path != GRAPHS), "-m", "cuda"], [CUSIM]
        graphs = [GRAPHS]
    instructions = [f"{CUSIM}/test_instructions.py"]
    return Stage(
        "right",
        "is it right?",
        [
            Step([plan.build(), compiled], jobs=2),
            Step([Command("environment", [PYTHON, "-m", "pixcontrast.env"], 30)]),
            Step([plan.tests("instructions", instructions, 60, on, jobs=1)]),
            Step([plan.tests("operators", operators, 150)]),
            Step([plan.tests("graphs", graphs, 60, jobs=1)]),
            Step([plan.tests("kernels", kernels, 240, on)]),
            Step([_sanitized(plan, "right", "memcheck", 100)]),
        ],
    )


def sanitize(plan: Plan) -> Stage:
    """All tools of compute-sanitizer, beside each other, on the cases that every build of a kernel runs."""
    return Stage(
        "sanitize",
        "does it touch, race, wait or read where it must not?",
        [Step([_sanitized(plan, "sanitize", tool, 500) for tool in TOOLS], jobs=2 if plan.rehearse else 4)],
    )


def _sanitized(plan: Plan, stage: str, tool: str, limit: float) -> Command:
    if plan.rehearse:  # the emulation's own checkers take the place of NVIDIA's
        build = {"memcheck": "asan", "racecheck": "race"}.get(tool, "plain")
        chosen = [f"{CUSIM}/test_scale_cuda.py", "-k", f"{build}-0 and dtype0"]
        return plan.tests(tool, chosen, limit, {"CUSIM_RUN_ON": build})
    reports = plan.work / "logs" / f"{stage}-sanitizer"
    reports.mkdir(parents=True, exist_ok=True)
    environment = {"CUSIM_RUN_ON": "gpu", "CUSIM_GPU_TOOL": sanitizer(tool, reports)}
    tests = plan.tests(tool, [CUSIM, "-k", "gpu-0"], limit, environment, jobs=4)
    return Command(
        tool, tests.argv, limit, tests.environment, tests.failures, without_tool("compute-sanitizer"),
        complaints=partial(complaints_of, tool, reports),
    )  # fmt: skip


def fast(plan: Plan) -> Stage:
    """Operators, whole branches and their kernels."""
    folder = plan.work / "fast"
    shutil.rmtree(folder, ignore_errors=True)
    groups = {"small": ["small"], "steps": ["tiny-step"]} if plan.rehearse else GROUPS
    names = [f"bench-{name}" for name in groups]
    commands = [_bench(plan, folder / name, cases, 200) for name, cases in zip(names, groups.values(), strict=True)]
    return Stage(
        "fast",
        "how fast is it?",
        [Step([plan.build()]), *(Step([command]) for command in commands[:2]), Step([_profile(plan)])]
        + [Step([command]) for command in commands[2:]],
        partial(_found, plan, [folder / name for name in names]),
    )


GROUPS = {"paper": ["paper", "tf32"], "steps": ["steps", "precisions"], "sweeps": ["sweeps"]}


def _bench(plan: Plan, out: Path, cases: list[str], limit: float) -> Command:
    argv = [PYTHON, "-m", "benchmarks", "--device", plan.device, "--one-process", "--out", str(out), "--case", *cases]
    if plan.rehearse:
        argv += ["--rounds", "2", "--seconds", "0.5"]
    else:
        argv += ["--seconds", "3"]
    argv += ["--compile"] if plan.compile else ["--no-compile"]
    return Command(out.name, argv, limit, instead=[*argv, "--no-graphs"])


def _profile(plan: Plan) -> Command:
    """Each kernel of some cases under Nsight Compute, which replays it to read the counters."""
    out = plan.work / "logs" / "fast-ncu.csv"
    program = [PYTHON, "-m", "benchmarks.kernels", "--device", plan.device]
    if plan.rehearse:
        return Command("profile", [*program, "small"], 60)
    program += ["infonce-bf16", "infonce-tf32", "city", "large", "selectors-bf16"]
    tool = ["ncu", "--target-processes", "all", "--profile-from-start", "off", "--clock-control", "none"]
    tool += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(out), "--force-overwrite"]
    sections = ["--section", "SpeedOfLight", "--section", "ComputeWorkloadAnalysis", "--launch-count", "80"]
    metrics = ["--metrics", "gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum"]
    return Command(
        "profile", [*tool, *sections, *metrics, *program], 120, missing=without_tool("ncu"),
        instead=[*tool, *sections, *program],
    )  # fmt: skip


def _found(plan: Plan, folders: list[Path]) -> dict[str, Any]:
    tables = benchmarks_found(folders, plan.out) + kernels_found(plan.work / "logs" / "fast-ncu.csv", plan.out)
    return {"tables": tables} if tables else {}
