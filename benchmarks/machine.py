"""The machine: what it is, and what it can do at best."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import pixcontrast
from pixcontrast import ops

from .problem import Step, Work

MOST_COPIED = 1 << 29  # bytes; beyond, a copy goes at the same rate
MATRIX = {"cpu": 1024, "cuda": 8192}


def describe(device: str) -> dict[str, str | int]:
    """Hardware, versions and commit, for the result file."""
    found: dict[str, str | int] = {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": ops._C.build_info()["cpu_capability"] if ops.available() else "no extension",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pixcontrast": pixcontrast.__version__,
        "commit": _commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []  # fmt: skip
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """Commit of the working tree, with ``+`` if it has changes; empty outside a repository."""
    folder = Path(__file__).parent
    try:
        asked = [["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain"]]
        commit, changes = (
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout for command in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.strip() + ("+" if changes.strip() else "")


class Ceilings:
    """Steps that move as many bytes, or multiply as fast, as the machine can; timed in turn with the contenders.

    On random data: zeros are moved and multiplied faster than anything real.
    """

    def __init__(self, work: Work, device: str) -> None:
        self.work = work
        copied = min(work.bytes, MOST_COPIED)
        self.source = torch.randint(256, (max(copied // 2, 1),), dtype=torch.uint8, device=device)
        source, target = self.source, torch.zeros_like(self.source)
        size = MATRIX[device]
        self.factors = [torch.randn(size, size, device=device).to(work.dtype) for _ in range(2)]
        left, right = self.factors
        product = torch.empty_like(left)
        self.copied, self.multiplied = 2 * source.numel(), 2 * size**3
        self.steps: dict[str, Step] = {
            "copy": lambda: {"copy": target.copy_(source)},
            "matmul": lambda: {"matmul": torch.mm(left, right.t(), out=product)},
        }

    def floor(self, copy: float, matmul: float) -> float:
        """Least seconds for the work, from the seconds of the two steps."""
        return max(self.work.bytes / self.copied * copy, self.work.flops / self.multiplied * matmul)

    def rates(self, copy: float, matmul: float) -> dict[str, float]:
        """GB/s and GFLOP/s, from the seconds of the two steps."""
        return {"gb_per_s": self.copied / copy / 1e9, "gflop_per_s": self.multiplied / matmul / 1e9}
