"""The run on a GPU is rehearsed without one, and whatever can be known before it is checked here."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from gpu import search_path
from gpu_run.command import FAIL, NOT_RUN, PASS, RUNNING, STOPPED, Command, Stage, Step
from gpu_run.plan import ROOT
from gpu_run.process import Process
from gpu_run.results import FILES, Results
from gpu_run.runner import Runner

GPU = ROOT / "scripts" / "gpu.py"
COMMANDS = {
    "right": ["build", "compile", "environment", "instructions", "operators", "graphs", "kernels", "memcheck"],
    "fast": ["build", "bench-small", "bench-steps", "profile"],
    "learn": ["build", "trainer", "labels-6-seed0", "positive-6-seed0"],
    "sanitize": ["memcheck", "racecheck", "synccheck", "initcheck"],
}


@pytest.fixture(scope="module")
def path_without_git_and_make(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bin")
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*") if Path(place).is_dir() else ():
            link = folder / program.name
            if not re.match(r"git|g?make$", program.name) and not link.exists():
                link.symlink_to(program)
    assert shutil.which("git", path=str(folder)) is None and shutil.which("make", path=str(folder)) is None
    return str(folder)


@pytest.fixture(scope="module")
def rehearsal(
    path_without_git_and_make: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("rehearsal")
    environment = os.environ | {"PATH": path_without_git_and_make}
    ran = subprocess.run(
        rehearse(folder),
        env=environment, capture_output=True, text=True, cwd=folder, timeout=1800,
    )  # fmt: skip
    return ran, folder / "out"


def rehearse(folder: Path) -> list[str]:
    return [sys.executable, str(GPU), "--rehearse", "--out", str(folder / "out"), "--work", str(folder / "work")]


def states(out: Path, stage: str) -> dict[str, str]:
    found = json.loads((out / "checks.json").read_text())["stages"][stage]["commands"]
    return {name: outcome["state"] for name, outcome in found.items()}


def test_the_rehearsal_passes_without_git_and_make(
    rehearsal: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    ran, out = rehearsal
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for stage, commands in COMMANDS.items():
        assert states(out, stage) == dict.fromkeys(commands, PASS)
        assert all(f"| {stage} | {command} | pass |" in ran.stdout for command in commands)
    assert "## Benchmarks" in ran.stdout and "## Mean IoU after 30 steps" in ran.stdout


def test_its_files_are_few_and_whole(rehearsal: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    _, out = rehearsal
    files = sorted(path.name for path in out.iterdir())
    assert {"checks.json", "checks.md", "logs.tar.gz", "benchmarks.json", "benchmarks.md", "learn.json"} <= set(files)
    assert len(FILES) <= 8 and set(files) <= set(FILES)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in files)
    assert sum(path.stat().st_size for path in out.iterdir()) < 4 << 20
    assert "| right | kernels | pass |" in (out / "checks.md").read_text()
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert {f"{stage}-{name}.log" for stage, names in COMMANDS.items() for name in names} <= {*logs.getnames()}
    assert {one["case"] for one in json.loads((out / "benchmarks.json").read_text())["outcomes"]} == {
        "small",
        "tiny-step",
    }
    assert {row["arm"] for row in json.loads((out / "learn.json").read_text())["rows"]} == {"labels", "positive"}


@pytest.mark.parametrize(
    ("stage", "how"), [("right", "KILL"), ("fast", "TERM"), ("learn", "KILL"), ("sanitize", "INT")]
)
def test_a_stage_killed_in_the_middle_leaves_its_results(stage: str, how: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*rehearse(tmp_path), "--stages", stage],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    number = signal.Signals[f"SIG{how}"]
    try:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            found = states(out, stage).values() if (out / "checks.json").exists() else ()
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            if PASS in found and RUNNING in found and children:
                break
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=300) != 0
    finally:
        process.kill()
    left = states(out, stage)
    assert PASS in left.values() and PASS not in {left[name] for name in list(left)[-1:]}
    assert (STOPPED if how != "KILL" else RUNNING) in left.values()
    assert (out / "checks.md").read_text().count(f"| {stage} |") == len(COMMANDS[stage])
    with tarfile.open(out / "logs.tar.gz") as logs:
        assert logs.getnames()
    assert all(has_ended(int(child)) for child in children)


def running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def has_ended(number: int) -> bool:
    """Whether a process that was killed is gone, as soon as the machine finds time for it."""
    deadline = time.monotonic() + 30
    while running(number) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not running(number)


def finish(process: Process) -> Process:
    while not process.ended():
        time.sleep(0.01)
    return process


def finish_within_a_limit(argv: list[str], log: Path, begun: str, limit: float) -> Process:
    """Runs into a limit, of ``limit`` seconds or, on a busy machine, of some times that, after writing ``begun``."""
    for patience in (1, 4, 16, 64):
        log.unlink(missing_ok=True)
        process = finish(Process(argv, log, dict(os.environ), log.parent, patience * limit))
        assert process.stopped and process.seconds < 300  # of the 600 that it would take
        if begun in log.read_text():
            break
    return process


def test_a_limit_ends_the_whole_group(tmp_path: Path) -> None:
    script = "trap '' INT; sleep 600 & echo $! > child; echo begun; wait; wait"
    finish_within_a_limit(["sh", "-c", script], tmp_path / "log", "begun", 1.0)
    assert (tmp_path / "log").read_text() == "begun\n"
    assert has_ended(int((tmp_path / "child").read_text()))


def test_what_a_command_leaves_running_is_ended(tmp_path: Path) -> None:
    process = finish(
        Process(["sh", "-c", "sleep 600 & echo $! > child"], tmp_path / "log", dict(os.environ), tmp_path, 300.0)
    )
    assert process.status == 0 and not process.stopped
    assert has_ended(int((tmp_path / "child").read_text()))


def test_a_command_ends_with_the_program_that_began_it(tmp_path: Path) -> None:
    script = "import os, sys, time; from pathlib import Path; from gpu_run.process import Process; "
    script += "Process(['sh', '-c', 'echo $$ > child; exec sleep 600'], Path('log'), dict(os.environ), Path(), 600); "
    script += "time.sleep(600)"
    path = os.environ | {"PYTHONPATH": str(ROOT / "scripts")}
    program = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=path)
    child = tmp_path / "child"
    while not (child.exists() and child.read_text().strip()):
        time.sleep(0.02)
    assert running(int(child.read_text()))
    program.kill()
    program.wait()
    assert has_ended(int(child.read_text()))


def test_a_command_is_asked_to_end_before_it_is_killed(tmp_path: Path) -> None:
    script = (
        "import time\ntry:\n    print('on', flush=True); time.sleep(600)\nexcept KeyboardInterrupt:\n    print('saved')"
    )
    process = finish_within_a_limit([sys.executable, "-c", script], tmp_path / "log", "on", 4.0)
    assert process.status == 0 and (tmp_path / "log").read_text() == "on\nsaved\n"


FAILING = """
import time
def test_right(): pass
def test_wrong(): assert 1 + 1 == 3, "arithmetic"
def test_slow(): time.sleep(600)
"""


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "out", tmp_path / "logs", {"commit": "none"})


def run(stage: Stage, results: Results, seconds: float = 60.0) -> bool:
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return Runner(ROOT, results, seconds, environment).run(stage)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_failing_tests_are_named_even_if_the_run_is_stopped(results: Results, tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(FAILING)
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_run.report_tests", str(tmp_path / "test_some.py")]
    after = Command("after", ["true"], 60.0)
    for limit in (8.0, 32.0, 128.0):  # on a busy machine, pytest may need long to begin
        tests = Command("tests", argv, limit, failures=tmp_path / "failures")
        assert not run(Stage("right", "?", [Step([tests]), Step([after])]), results, 600.0)
        found = json.loads((results.folder / "checks.json").read_text())["stages"]["right"]["commands"]
        if found["tests"]["failures"]:
            break
    assert found["tests"]["state"] == STOPPED and found["after"]["state"] == PASS
    (failure,) = found["tests"]["failures"]
    assert failure["test"].endswith("test_some.py::test_wrong") and "arithmetic" in failure["error"]
    assert "test_wrong`: AssertionError: arithmetic" in (results.folder / "checks.md").read_text()


def test_what_fails_stops_nothing(results: Results) -> None:
    commands = [
        Command("absent", ["no-such-program"], 60.0),
        Command("failing", ["sh", "-c", "echo because; exit 3"], 60.0),
        Command("second-way", ["false"], 60.0, instead=["true"]),
        Command("impossible", ["true"], 60.0, missing="no such tool"),
        Command("complaining", ["true"], 60.0, complaints=lambda: ["a race"]),
        Command("last", ["true"], 60.0),
    ]
    stage = Stage("right", "?", [Step([command]) for command in commands])
    assert not run(stage, results)
    found = results.of(stage)
    assert [found[command.name].state for command in commands] == [FAIL, FAIL, PASS, NOT_RUN, FAIL, PASS]
    assert "no-such-program" in found["absent"].said and "exit status 3: because" in found["failing"].said
    assert found["impossible"].said == "no such tool" and found["complaining"].said == "a race"
    good = Stage("fast", "?", [Step(commands[2:4])])
    assert run(good, results)  # what a machine lacks is no failure of ours
    assert {*json.loads((results.folder / "checks.json").read_text())["stages"]} == {"right", "fast"}
    kept = Results(results.folder, results.logs, {})
    assert {*kept.stages} == {"right", "fast"}


def test_a_stage_ends_in_time(results: Results) -> None:
    slow, late = Command("slow", ["sleep", "600"], 600.0), Command("late", ["true"], 60.0)
    start = time.monotonic()
    assert not run(Stage("right", "?", [Step([slow]), Step([late])]), results, seconds=6.0)
    assert time.monotonic() - start < 60
    commands = results.stages["right"]["commands"]
    assert commands["slow"]["state"] == STOPPED and commands["late"]["said"] == "no time left"


def test_python_path_is_kept(results: Results, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ran = subprocess.run(
        [*rehearse(tmp_path), "--stages", "right", "--seconds", "0"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 1 and "| right | build | **not run** | 0 | no time left |" in ran.stdout
    assert search_path([]).split(os.pathsep)[-1] == str(tmp_path)
    assert search_path([]).split(os.pathsep)[:2] == [str(ROOT), str(ROOT / "tests")]
