"""Check that this machine can build the extension; on Debian and Ubuntu, install what is missing if run as root.

Needs nothing but Python itself.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path


def missing_packages() -> dict[str, str]:
    """Debian package by what is missing."""
    missing = {}
    if find_spec("ensurepip") is None or find_spec("venv") is None:
        missing["Python's venv module"] = "python3-venv"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing["Python's C headers (Python.h)"] = "python3-dev"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        missing["a C++ compiler"] = "g++"
    return missing


def main() -> None:
    if sys.version_info < (3, 10):
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(
            f"pixcontrast needs Python 3.10 or newer, {sys.executable} is {found}; try: make PYTHON=python3.12 ..."
        )
    missing = missing_packages()
    if not missing:
        return
    command = ["apt-get", "install", "-y", *missing.values()]
    print(f"missing: {', '.join(missing)}", flush=True)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        sys.exit(f"install it first; on Debian and Ubuntu: sudo {' '.join(command)}")
    print(f"running: {' '.join(command)}", flush=True)
    subprocess.run(["apt-get", "update", "-qq"], check=True)
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
