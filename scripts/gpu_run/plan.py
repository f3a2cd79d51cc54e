"""Options of a run, and what all stages need: paths, tests, environments."""

from __future__ import annotations

import re
import shlex
import shutil
import zipfile
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from .command import PYTHON, Command

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = ROOT / "scripts"


@dataclass(frozen=True)
class Plan:
    """Attributes:
    rehearse: no GPU: the CPU in its place, the emulation in place of kernels on it, small sizes.
    out, work: folders of results, and of everything else that commands write.
    capability: of the GPU, for which alone is compiled.
    compile: time `torch.compile` too.
    data: folder of images to train on (images/, masks/, classes.txt, train.txt, val.txt).
    learn_steps, learn_jobs, learn_options: length of each training, how many at once, options of `fit`.
    """

    rehearse: bool
    out: Path
    work: Path
    capability: str = ""
    compile: bool = False
    data: Path = ROOT / "train" / "data" / "landcover"
    learn_steps: int = 600
    learn_jobs: int = 6
    learn_options: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def build(self) -> Command:
        """The extension, for this GPU only. A rehearsal only asks setup.py how it would."""
        if self.rehearse:
            return Command("build", [PYTHON, "setup.py", "--version"], 60)
        environment = {"PIXCONTRAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": self.capability}
        return Command("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 300, environment)

    def tests(
        self, name: str, arguments: list[str], limit: float, environment: dict[str, str] | None = None, jobs: int = 8
    ) -> Command:
        """A command of pytest, in several processes where there is pytest-xdist."""
        parallel = []
        if not self.rehearse and jobs > 1 and find_spec("xdist"):
            parallel, environment = ["-n", str(jobs)], {"OMP_NUM_THREADS": "2"} | (environment or {})
        options = ["-q", "-p", "no:cacheprovider", "-p", "gpu_run.report_tests", "--continue-on-collection-errors"]
        options += ["--maxfail", "60", "--tb", "short"]
        failures = self.work / f"failures-{name}.jsonl"
        return Command(
            name, [PYTHON, "-m", "pytest", *options, *parallel, *arguments], limit, environment or {}, failures
        )


def marked_cuda(root: Path = ROOT) -> list[str]:
    """Test files with tests that need a GPU. Others are not collected: they may import what a GPU machine lacks."""
    files = sorted((root / "tests").rglob("test_*.py"))
    found = [path for path in files if re.search(r"mark\.cuda\b|\bDEVICES\b", path.read_text(errors="replace"))]
    return [str(path.relative_to(root)) for path in found if path.name != "test_gpu_run.py"]


def sanitizer(tool: str, reports: Path) -> str:
    """The command under which kernels run with a tool of compute-sanitizer."""
    command = [
        "compute-sanitizer",
        "--tool",
        tool,
        "--target-processes",
        "all",
        "--log-file",
        f"{reports}/{tool}-%p.txt",
    ]
    return shlex.join(command)


def complaints_of(tool: str, reports: Path) -> list[str]:
    """What compute-sanitizer has reported, and whether it has reported at all."""
    texts = {path.name: path.read_text(errors="replace") for path in sorted(reports.glob(f"{tool}-*.txt"))}
    if not any("SUMMARY" in text for text in texts.values()):
        last = [line for text in texts.values() for line in text.splitlines() if line.strip("= ")][-1:]
        return [": ".join([f"{tool} has left no summary", *last])]
    found = []
    for name, text in texts.items():
        counted = re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)
        if any(int(count) for count in counted):
            first = re.search(r"^========= (?!COMPUTE|ERROR SUMMARY|RACECHECK SUMMARY)(\S.*)$", text, re.MULTILINE)
            found.append(f"{name}: {first[1] if first else 'errors'}")
    return found


def without_tool(name: str) -> str:
    return "" if shutil.which(name) else f"{name} is not installed"


def unpack_wheels(folder: Path, site: Path) -> list[str]:
    """Pure Python wheels become importable from ``site``; returns their names."""
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as packed:
            packed.extractall(site)
    return [wheel.name for wheel in wheels]
