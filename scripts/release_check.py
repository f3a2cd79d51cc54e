"""Install the source distribution in empty environments, and print the support table of docs/install.md.

For each Python and torch: a new environment, torch and the source distribution by pip, the first example of
the README with the kernels, and again after the extension was removed. A cell is "tested" only if all of that worked.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SMOKE = """
import sys, warnings, torch
from torch.nn.functional import interpolate
kernels = sys.argv[1] == "kernels"
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import pixcontrast
    pixcontrast.PixelContrastLoss(objective="positive")
assert "site-packages" in pixcontrast.__file__, pixcontrast.__file__
assert pixcontrast.ops.available() == kernels, [str(w.message) for w in said]
network = torch.nn.Conv2d(3, 19 + 256, 3, stride=4, padding=1)
names = {
    "model": lambda images: network(images).split([19, 256], dim=1),
    "loader": [(torch.randn(2, 3, 32, 32), torch.randint(0, 19, (2, 32, 32)))] * 3,
    "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
    "cross_entropy": lambda logits, labels: torch.nn.functional.cross_entropy(interpolate(logits, (32, 32)), labels),
}
exec(open(sys.argv[2]).read(), names)
assert names["memory"].counts.sum() > 0 and names["loss"].isfinite()
print("torch", torch.__version__, "kernels", kernels)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command; ``SystemExit`` with its last lines if it fails."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise RuntimeError(f"`{' '.join(map(str, command))}` failed:\n{tail}")
    return done.stdout.strip()


def check(python: str, torch: str, sdist: Path, place: Path, tests: list[str]) -> str:
    """Install and try one pair; returns the versions, raises ``RuntimeError`` where something fails."""
    example = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)[0]
    (place / "example.py").write_text(example)
    (place / "smoke.py").write_text(SMOKE)
    run(python, "-m", "venv", place / "env", cwd=place)
    own = place / "env" / "bin" / "python"
    packages = Path(run(own, "-c", "import site; print(site.getsitepackages()[0])", cwd=place))
    pip = (own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    if torch == "current":  # lend the torch of this environment, but not its pixcontrast
        lent = Path(run(sys.executable, "-c", "import site; print(site.getsitepackages()[0])", cwd=place))
        for entry in lent.iterdir():
            if "pixcontrast" not in entry.name and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    else:
        run(*pip, f"torch=={torch}", "numpy", "setuptools", "wheel", "ninja", "pybind11", "pytest", cwd=place)
    run(*pip, "--no-build-isolation", "--no-deps", sdist, cwd=place, PIXCONTRAST_CUDA="0")
    said = run(own, "smoke.py", "kernels", "example.py", cwd=place)
    if tests:
        shutil.copytree(ROOT / "tests", place / "tests")
        run(own, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests, cwd=place)
    for extension in (packages / "pixcontrast").glob("_C*.so"):
        extension.unlink()
    run(own, "smoke.py", "none", "example.py", cwd=place)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--torch", nargs="+", default=["2.10.0", "2.11.0", "2.15.0"], help="or current: the one of here"
    )
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument(
        "--tests", nargs="*", default=["tests/test_loss.py", "tests/test_branch.py", "tests/test_memory.py"]
    )
    options = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=ROOT)
        (sdist,) = Path(folder).glob("*.tar.gz")
        print("| torch | Python | from the source distribution, without and with kernels |\n|---|---|---|", flush=True)
        for python in options.python:
            version = run(python, "-c", "import platform; print(platform.python_version())", cwd=ROOT)
            for torch in options.torch:
                with tempfile.TemporaryDirectory(dir=folder) as place:
                    try:
                        said = check(python, torch, sdist, Path(place), options.tests)
                        print(f"| {said.split()[1]} | {version} | tested |", flush=True)
                    except RuntimeError as error:
                        failed = True
                        print(f"| {torch} | {version} | **fails** |\n\n{error}\n", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
