"""``python tests/tsan/run.py``: CPU kernels under ThreadSanitizer, without races, and with one that is planted.

Python, PyTorch and its OpenMP are not compiled with the sanitizer, which takes the barriers of that OpenMP for none and
reports all that comes behind them. So the kernels that need no PyTorch are compiled with a ``parallel_for`` of
``std::thread`` and run from four threads: class_mean, gather_pixels, positive, the kept memory and the loops that they
share. What calls products of PyTorch (InfoNCE, heads) is not seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
FOLDER = ROOT / "build" / "sanitize" / "thread"
SOURCES = ("class_mean/cpu.cpp", "gather_pixels/cpu.cpp", "positive/cpu.cpp", "common/cpu/kernels.cpp",
           "common/cpu/kept_memory.cpp")  # fmt: skip


def build() -> Path:
    FOLDER.mkdir(parents=True, exist_ok=True)
    package = Path(torch.__file__).parent
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fsanitize=thread",
        f"-I{HERE}",
        f"-I{ROOT / 'csrc'}",
        f"-I{package / 'include'}",
    ]
    objects = []
    for source in [*(ROOT / "csrc" / name for name in SOURCES), HERE / "main.cpp"]:
        objects.append(FOLDER / f"{source.parent.name}_{source.stem}.o")
        subprocess.run(["g++", *flags, "-c", source, "-o", objects[-1]], check=True)
    library = package / "lib"
    link = [f"-L{library}", "-lc10", f"-Wl,-rpath,{library}"]
    subprocess.run(["g++", "-fsanitize=thread", *objects, *link, "-o", FOLDER / "kernels"], check=True)
    return FOLDER / "kernels"


def main() -> int:
    program = build()
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}
    right = subprocess.run([program], env=environment, capture_output=True, text=True)
    wrong = subprocess.run([program, "planted"], env=environment, capture_output=True, text=True)
    found = wrong.returncode == 66 and "data race" in wrong.stderr
    print(right.stdout + right.stderr[-4000:], end="")
    print(
        f"ThreadSanitizer: {right.returncode} (0: nothing found), the planted race {'found' if found else 'NOT found'}"
    )
    return int(right.returncode != 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
