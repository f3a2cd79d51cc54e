"""`python -m pixcontrast.env` with and without a build."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cusim.build import CUDA_HOME, nvcc

from pixcontrast import env, ops


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


def test_a_build_with_nvcc_has_a_cuda_kernel_of_every_operator_and_loads_without_a_gpu() -> None:
    if not ops._cuda_version:
        assert nvcc() is None or not (CUDA_HOME / "include" / "cuda_runtime.h").exists(), "rebuild: nvcc is there"
        pytest.skip("no nvcc")
    named = ("class_mean", "class_mean_backward", "positive", "infonce", "project", "project_backward", "scale_")
    named += ("labels_at", "class_order", "gather_pixels", "scatter_pixels")
    named += ("segment_topk", "memory_write")
    for name in (*named, "grouped_linear_cuda", "grouped_outer_cuda"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"pixcontrast::{name}", "CUDA"), name
    assert f"with CUDA {torch.version.cuda} kernels" in env.report()["extension"]
    if not torch.cuda.is_available():
        assert env.report()["GPUs"] == "none found, everything runs on the CPU"
