"""`python -m pixcontrast.env` with and without a build."""

from __future__ import annotations

import subprocess
import sys

import torch

from pixcontrast import env


def test_report_names_versions_and_build() -> None:
    done = subprocess.run([sys.executable, "-m", "pixcontrast.env"], capture_output=True, text=True, check=True)
    assert f"built against torch {torch.__version__}" in done.stdout
    assert "GPUs" in done.stdout and "nvcc" in done.stdout


def test_report_says_what_to_do_without_a_build_or_with_a_stale_one(monkeypatch) -> None:
    monkeypatch.setattr("pixcontrast.env.torch.__version__", "9.9")
    assert "torch is now 9.9: rebuild with" in env.report()["extension"]
    monkeypatch.setattr("pixcontrast.ops._C", None)
    monkeypatch.setattr("pixcontrast.ops.load_error", "no such file")
    assert "missing" in env.report()["extension"] and "no such file" in env.report()["extension"]
