"""What the results say about machine and code. Nothing here may fail, whatever the machine lacks."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path
from typing import Any


def describe(root: Path, rehearsal: bool) -> dict[str, Any]:
    """Date, commit, versions, GPU and driver."""
    about: dict[str, Any] = {"rehearsal": True} if rehearsal else {}
    about |= {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit_of(root),
        "python": platform.python_version(),
    }
    try:
        import torch

        about |= {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
        if torch.cuda.is_available():
            capability = "{}.{}".format(*torch.cuda.get_device_capability())
            about |= {"gpu": torch.cuda.get_device_name(), "capability": capability, "driver": driver()}
    except Exception as error:  # a PyTorch that does not load is a result too
        about["torch"] = f"{type(error).__name__}: {error}"
    return about


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def commit_of(root: Path) -> str:
    """The checked-out commit, read from ``.git`` (a folder, or the file of a further work tree); git is not needed."""
    git = root / ".git"
    try:
        if git.is_file():
            git = root / git.read_text().removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head[:12]
        name = head.removeprefix("ref:").strip()
        common = git / "commondir"
        folders = [git, git / common.read_text().strip()] if common.exists() else [git]
        for folder in folders:
            if (folder / name).exists():
                return (folder / name).read_text().strip()[:12]
        for folder in folders:
            if (folder / "packed-refs").exists():
                found = re.search(
                    rf"^([0-9a-f]+) {re.escape(name)}$", (folder / "packed-refs").read_text(), re.MULTILINE
                )
                if found:
                    return found[1][:12]
    except (OSError, UnicodeDecodeError):
        pass
    return "unknown"
