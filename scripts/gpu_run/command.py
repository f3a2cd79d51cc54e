"""A command of a stage and what came out of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PYTHON = sys.executable


@dataclass(frozen=True)
class Command:
    """Attributes:
    name: unique in its stage; letters, digits, dots and dashes.
    limit: seconds.
    least: seconds; with less time left it is not begun.
    environment: on top of the one of this program.
    failures: file to which a test run appends a line for each test that fails, if it is one.
    missing: why it cannot run here, if so.
    instead: what to run when it has failed; the outcome is then that of this.
    complaints: what is wrong although the exit status is 0.
    """

    name: str
    argv: list[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    failures: Path | None = None
    missing: str = ""
    instead: list[str] = field(default_factory=list)
    complaints: Callable[[], list[str]] | None = None
    least: float = 5.0


@dataclass(frozen=True)
class Step:
    """Commands that run beside each other, ``jobs`` at once."""

    commands: list[Command]
    jobs: int = 1


@dataclass(frozen=True)
class Stage:
    """Attributes:
    found: looks at what the commands have written so far, and returns what is to stand in the results.
    """

    name: str
    question: str
    steps: list[Step]
    found: Callable[[], dict[str, Any]] | None = None


PASS, FAIL, STOPPED, RUNNING, WAITING, NOT_RUN = "pass", "fail", "stopped", "running", "waiting", "not run"


@dataclass
class Outcome:
    """Attributes:
    state: one of the constants above.
    said: one line about it.
    failures: tests that failed, each with the last line of its error.
    """

    state: str = WAITING
    seconds: float = 0.0
    said: str = ""
    failures: list[dict[str, str]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return self.state == PASS
