"""A plugin of pytest that writes each failure to a file when it happens, so that a run that is killed has named them.

``GPU_RUN_FAILURES`` names the file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

MOST = 300  # characters of an error


def _write(test: str, error: str) -> None:
    if path := os.environ.get("GPU_RUN_FAILURES"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"test": test, "error": error[:MOST]}) + "\n")


def _error(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash else str(report.longrepr)
    return " ".join(text.split()) if crash else " ".join(text.strip().splitlines()[-1:])


class Reporter:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            _write(report.nodeid, _error(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            _write(report.nodeid, _error(report))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of the processes of pytest-xdist, the first hears of all tests
        config.pluginmanager.register(Reporter())
