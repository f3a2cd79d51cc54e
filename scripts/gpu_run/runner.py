"""Runs stages: each within its time, whatever its commands do."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from .command import FAIL, NOT_RUN, PASS, RUNNING, STOPPED, Command, Outcome, Stage, Step
from .process import Process
from .results import Results

REFRESH = 15.0  # seconds between two updates of the result files while commands run
TAIL = 15  # lines of a log that are printed


class Ended(Exception):
    """A signal has asked this program to end; the results say so."""


class Runner:
    """Runs the commands of stages in ``root``, and keeps ``results`` up to date.

    SIGINT, SIGTERM and SIGHUP end what is running; :meth:`run` then raises ``Ended``.
    """

    def __init__(self, root: Path, results: Results, seconds: float, environment: Mapping[str, str]) -> None:
        self.root, self.results, self.seconds = root, results, seconds
        self.environment = dict(environment)
        self._running: dict[str, Process] = {}
        self._asked = ""  # the signal that has asked for the end, which the loop below looks at
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = signal.Signals(number).name

    def run(self, stage: Stage) -> bool:
        """Whether every command of the stage passed, or cannot be run on this machine."""
        print(f"\n=== {stage.name}: {stage.question}", flush=True)
        deadline = time.monotonic() + self.seconds
        self.results.begin(stage)
        for step in stage.steps:
            self._run_step(stage, step, deadline)
        commands = [command for step in stage.steps for command in step.commands]
        outcomes = self.results.of(stage)
        return all(outcomes[command.name].good or command.missing for command in commands)

    def _run_step(self, stage: Stage, step: Step, deadline: float) -> None:
        waiting = list(step.commands)
        commands = {command.name: command for command in step.commands}
        refreshed = time.monotonic()
        while waiting or self._running:
            if self._asked:
                self._end(stage)
            while waiting and len(self._running) < step.jobs:
                self._start(stage, waiting.pop(0), deadline)
            for name in [name for name, process in self._running.items() if process.ended()]:
                process = self._running.pop(name)
                command = commands[name]
                outcome = self._outcome(command, process, self._log(stage, name))
                if outcome.state == FAIL and command.instead:
                    print(f"    {name}: {outcome.said}; now without what failed", flush=True)
                    again = Command(name, command.instead, command.limit, command.environment)
                    commands[name] = again
                    self._start(stage, again, deadline, append=True)
                    continue
                self.results.note(stage, commands[name], outcome)
                self._print(name, outcome, self._log(stage, name))
            if time.monotonic() - refreshed > REFRESH:
                self.results.write(stage)
                refreshed = time.monotonic()
            time.sleep(0.05)

    def _log(self, stage: Stage, name: str) -> Path:
        return self.results.logs / f"{stage.name}-{name}.log"

    def _start(self, stage: Stage, command: Command, deadline: float, append: bool = False) -> None:
        left = deadline - time.monotonic()
        if command.missing or left < command.least:
            outcome = Outcome(NOT_RUN, said=command.missing or "no time left")
            self.results.note(stage, command, outcome)
            print(f"    {command.name}: not run: {outcome.said}", flush=True)
            return
        limit = min(command.limit, left)
        print(f"--> {command.name} (at most {limit:.0f} s): {' '.join(command.argv)}", flush=True)
        self.results.note(stage, command, Outcome(RUNNING, said=f"at most {limit:.0f} s"))
        environment = {**os.environ, **self.environment, **command.environment}
        if command.failures:
            command.failures.unlink(missing_ok=True)
            environment["GPU_RUN_FAILURES"] = str(command.failures)
        log = self._log(stage, command.name)
        if not append:
            log.unlink(missing_ok=True)
        self._running[command.name] = Process(command.argv, log, environment, self.root, limit)

    def _outcome(self, command: Command, process: Process, log: Path) -> Outcome:
        text = log.read_text(errors="replace") if log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        failures = read_failures(command.failures)
        complaints = command.complaints() if command.complaints else []
        if process.problem:
            state, said = FAIL, process.problem
        elif process.stopped:
            state, said = STOPPED, f"stopped after {process.seconds:.0f} s"
        elif process.status == 0 and not complaints:
            state, said = PASS, ""
        else:
            state = FAIL
            said = "; ".join(complaints[:3]) or f"exit status {process.status}"
        counted = next(
            (line.strip("= ") for line in reversed(lines) if re.search(r"^=*\s*\d+ (passed|failed|error)", line)), ""
        )
        last = lines[-1][:200] if lines and state in (FAIL, STOPPED) and not process.problem else ""
        said = ": ".join(part for part in (said, counted or last) if part)
        return Outcome(state, round(process.seconds, 1), said, failures)

    def _print(self, name: str, outcome: Outcome, log: Path) -> None:
        if not outcome.good and log.exists():
            print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]), flush=True)
        print(f"    {name}: {outcome.state} in {outcome.seconds:.0f} s: {outcome.said}", flush=True)

    def _end(self, stage: Stage) -> None:
        for command, process in self._running.items():
            process.kill()
            said = f"the run was ended by {self._asked}"
            self.results.of(stage)[command] = Outcome(STOPPED, round(process.seconds, 1), said)
        self.results.write(stage)
        raise Ended(self._asked)


def read_failures(path: Path | None) -> list[dict[str, str]]:
    if path is None or not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
