"""``make sanitize``: a CPU build with AddressSanitizer and UndefinedBehaviorSanitizer, and tests and the fuzz on it.

The build stands in ``build/sanitize/address`` beside links to the Python files, and leaves that of the package alone.
AddressSanitizer does not look for leaks, because Python and PyTorch keep memory until the process ends: ``leaks.py``
does, on the build of the package, and ``tsan/run.py`` looks for races.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "sanitize" / "address"
FLAGS = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"  # vptr needs types of PyTorch
TESTS = ("class_order", "fuzz", "gather_pixels", "grouped_linear", "infonce", "kept_memory", "loss_scaling", "memory",
         "memory_push", "norm_linear", "positive", "queues")  # fmt: skip
# in processes of their own, for which nothing is preloaded, or by compilers
LEFT_OUT = "compile or export or opcheck or subprocess or gather_gives_every_rank"


def build(jobs: str) -> Path:
    """The folder with the package."""
    environment = os.environ | {
        "PIXCONTRAST_CUDA": "0", "MAX_JOBS": jobs, "LDFLAGS": FLAGS, "CFLAGS": f"-g1 -fno-omit-frame-pointer {FLAGS}",
    }  # fmt: skip
    lib = FOLDER / "lib"
    command = [
        sys.executable,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        str(lib),
        "--build-temp",
        str(FOLDER / "temp"),
    ]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    for source in (ROOT / "pixcontrast").rglob("*.py"):
        link = lib / source.relative_to(ROOT)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(source)
    return lib


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="of the fuzz")
    parser.add_argument("--jobs", default=str(os.cpu_count() or 1), help="compilers at once")
    options = parser.parse_args()
    lib = build(options.jobs)
    # libstdc++ too: without it, the sanitizer finds no __cxa_throw, and the first exception ends the process
    asked = [["gcc", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so")]
    libraries = [subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in asked]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(map(str, (lib, ROOT / "tests", ROOT))),
    }
    # from another folder, because python -m puts the current one first
    where = "from pixcontrast import _C; print(_C.__file__)"
    used = subprocess.run([sys.executable, "-c", where], env=environment, cwd=lib, capture_output=True, text=True)
    if not used.stdout.startswith(str(lib)):
        print(f"the build with sanitizers did not load: {used.stdout}{used.stderr}", file=sys.stderr)
        return 1
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    start, codes = time.monotonic(), []
    for command in (
        ["pytest", "-q", "-x", "-k", f"not ({LEFT_OUT})", *tests],
        ["fuzz", "--minutes", str(options.minutes)],
    ):
        codes.append(subprocess.run([sys.executable, "-m", *command], env=environment, cwd=lib).returncode)
    plain = os.environ | {"PYTHONPATH": str(ROOT)}
    for script in ("tsan/run.py", "leaks.py"):
        codes.append(subprocess.run([sys.executable, str(ROOT / "tests" / script)], env=plain, cwd=ROOT).returncode)
    results = ", ".join(
        f"{name} {code}" for name, code in zip(("tests", "fuzz", "threads", "leaks"), codes, strict=True)
    )
    print(f"sanitizers: {results} (0: nothing found), {time.monotonic() - start:.0f} s")
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
