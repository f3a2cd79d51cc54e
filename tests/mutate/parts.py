"""The four parts: which files are mutated, how a mutant is built, and which tests should notice it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

# tests of a file beside those that have its name; the quick ones first
OPERATORS = ("class_order", "gather_pixels", "memory_push", "grouped_linear", "norm_linear", "positive", "infonce")
ALSO = {
    "csrc/class_mean/": "positive loss",
    "csrc/scale/": "loss_scaling memory fuzz",
    "csrc/bindings.cpp": "env",
    "csrc/common/cpu/kept_memory": "kept_memory gather_pixels",
    "csrc/common/cpu/": "positive infonce norm_linear grouped_linear memory_push",
    "csrc/common/": " ".join(OPERATORS),
    "csrc/positive/": "loss loss_scaling",
    "csrc/infonce/": "loss_infonce loss_scaling",
    "csrc/memory_push/": "memory queues",
    "csrc/norm_linear/": "heads",
    "csrc/grouped_linear/": "heads",
    "pixcontrast/reference.py": " ".join((*OPERATORS, "memory")),
    "pixcontrast/checks.py": "mistakes memory loss infonce without_values",
    "pixcontrast/stats.py": "loss loss_infonce loss_many",
    "pixcontrast/loss": "loss loss_infonce loss_many zero_loss mistakes loss_scaling",
    "pixcontrast/memory.py": "queues mistakes without_values loss_many",
    "pixcontrast/distributed.py": "distributed memory",
    "pixcontrast/sharded_infonce.py": "distributed",
    "pixcontrast/select.py": "branch loss_infonce zero_loss gather_pixels",
    "pixcontrast/branch.py": "branch_infonce heads without_values mistakes loss_scaling",
    "pixcontrast/heads.py": "branch",
    "pixcontrast/queues.py": "compat_contrastive_seg",
    "pixcontrast/ops/__init__.py": "env install",
    "pixcontrast/ops/autograd.py": "loss loss_scaling positive infonce norm_linear",
    "pixcontrast/ops/pixel_linear.py": "heads branch",
    "pixcontrast/ops/class_mean.py": "positive loss",
    "pixcontrast/ops/unit_rows.py": "memory loss_scaling",
    "pixcontrast/compat/contrastive_seg.py": "compat_contrastive_seg",
    "pixcontrast/compat/semiseg.py": "compat_semiseg",
    "train/losses": "training_losses",
    "train/loop.py": "loop failures logs",
    "train/config.py": "command_line failures",
    "train/command_line.py": "failures check",
    "train/run_folder.py": "failures checkpoint",
    "train/config_file.py": "command_line failures",
    "train/distributed.py": "processes",
    "train/models.py": "session step timm_deeplab",
    "train/session.py": "step loop",
    "train/step.py": "training_losses loop",
    "train/signals.py": "failures under_fire",
    "train/checkpoint.py": "failures",
    "train/augment": "augment",
    "train/data/": "folder batches published splits scenes",
    "train/networks/": "paper_networks timm_deeplab weights",
    "train/paper/": "reproduce compare rows variants figures",
    "train/studies/": "ablation demo",
}
# what they draw is looked at; the real instructions, which only a GPU runs; text
LEFT_OUT = re.compile(
    "train/(data/scenes|paper/(figures|pages|their_loop|small_problem)|studies/(curves|report)|networks/lite0_weights)|"
    "common/cuda/(device|launch)|_C.pyi|_built.py|pixcontrast/env.py"
)


def sources(*patterns: str) -> list[Path]:
    found = {path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)}
    return sorted(path for path in found if not LEFT_OUT.search(str(path)))


def named(path: Path, folder: str) -> list[str]:
    """Test files that have the name of a source or of its folder, then those of ``ALSO``, for the longest that fits."""
    words = [path.stem, path.parent.name, f"{path.parent.name}_{path.stem}"]
    also = max((key for key in ALSO if str(path).startswith(key)), key=len, default=None)
    words += ALSO[also].split() if also else []
    files = [found for word in dict.fromkeys(words) for found in sorted((ROOT / folder).rglob(f"test_{word}.py"))]
    return [str(file.relative_to(ROOT)) for file in files if "cusim" not in file.parts]


@cache
def includes(path: Path) -> frozenset[Path]:
    """The file with all files of ``csrc`` that it includes."""
    found = {path}
    for name in re.findall(r'^#include "(.+)"', (ROOT / path).read_text(), re.MULTILINE):
        if (ROOT / "csrc" / name).exists():
            found |= includes(Path("csrc") / name)
    return frozenset(found)


def emulated(path: Path) -> list[str]:
    """The kernel tests of each operator that includes the file."""
    rooms = [cuda.parent.name for cuda in sources("csrc/*/cuda.cu") if path in includes(cuda)]
    quick = [
        "scale",
        "memory_push",
        "grouped_linear",
        "class_order",
        "gather_pixels",
        "norm_linear",
        "class_mean",
        "positive",
        "infonce",
    ]
    return [f"tests/cusim/test_{room}_cuda.py" for room in sorted(rooms, key=quick.index)]


@dataclass(frozen=True)
class Part:
    """``build`` compiles what the tests do not compile themselves; it raises CalledProcessError for what is no code."""

    files: Callable[[], list[Path]]
    tests: Callable[[Path], list[str]]
    build: Callable[[Path], None] = lambda tree: None
    environment: tuple[tuple[str, str], ...] = ()


def build_extension(tree: Path) -> None:
    environment = os.environ | {"PIXCONTRAST_CUDA": "0", "PYTHONPATH": str(tree)}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, text=True)


PARTS = {
    "cpu": Part(
        lambda: [path for path in sources("csrc/**/*.cpp", "csrc/**/cpu.h", "csrc/common/**/*.h")],
        lambda path: named(path, "tests"),
        build_extension,
    ),
    "cuda": Part(
        lambda: sources("csrc/**/*.cu", "csrc/**/*.cuh"), emulated, environment=(("CUSIM_RUN_ON", "plain race"),)
    ),
    "pixcontrast": Part(lambda: sources("pixcontrast/**/*.py"), lambda path: named(path, "tests")),
    "train": Part(lambda: sources("train/**/*.py"), lambda path: named(path, "tests/train")),
}
