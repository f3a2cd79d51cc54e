"""What a build needs and makes, and what an import says about a build that is missing, broken or of another torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pixcontrast import ops

ROOT = Path(__file__).parent.parent
EXTENSION = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
NEEDS_A_CHECKOUT = re.compile(
    r"tests/(train|examples|mutate)/|tests/test_(benchmarks|cuda_graphs|features|gpu_|mutate|nodes|readme)|.*launches_cuda"
)
RELEASE = ".".join(torch.__version__.split(".")[:2])


def tracked(*folders: str) -> list[str]:
    done = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        pytest.skip("not a git checkout")
    return done.stdout.split()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The tracked files, and some that a build or a run may leave among them."""
    place = tmp_path / "checkout"
    for name in tracked():
        if not name.startswith(("train/", "benchmarks/", ".")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    (place / "pixcontrast" / "_built.py").write_text("TORCH = '0.1'\n")
    (place / "pixcontrast" / "ops" / "__pycache__").mkdir()
    for name in (f"pixcontrast/{EXTENSION}", "pixcontrast/ops/__pycache__/x.pyc", "csrc/x.o"):
        (place / name).touch()
    return place


def run_setup(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=place, env=os.environ | environment, capture_output=True, text=True)


def test_a_source_distribution_is_the_same_on_every_machine(checkout: Path, tmp_path: Path) -> None:
    no_torch = tmp_path / "no_torch"
    no_torch.mkdir()
    (no_torch / "torch.py").write_text("raise ImportError('none')\n")
    files = tracked("csrc", "pixcontrast", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
    files += [path for path in tracked("tests") if not NEEDS_A_CHECKOUT.match(path)]
    assert {"csrc/infonce/cuda.cu", "tests/test_infonce.py", "tests/cusim/instructions.cu"} <= {*files}
    generated = {"PKG-INFO", "setup.cfg", "CHANGELOG.md"}
    environments = [{"PIXCONTRAST_CUDA": "0"}, {"PIXCONTRAST_CUDA": "1"}, {"PYTHONPATH": str(no_torch)}]
    for number, environment in enumerate(environments):
        made = tmp_path / str(number)
        done = run_setup(checkout, "sdist", "-d", str(made), **environment)
        assert done.returncode == 0, done.stderr
        with tarfile.open(next(made.glob("*.tar.gz"))) as archive:
            members = [entry for entry in archive.getmembers() if entry.isfile()]
            names = {entry.name.split("/", 1)[1] for entry in members}
            info = next(entry for entry in members if entry.name.count("/") == 1 and entry.name.endswith("PKG-INFO"))
            content = archive.extractfile(info)
            assert content is not None and "Requires-Dist: torch>=2.10\n" in content.read().decode()
        assert {name for name in names if not name.startswith("pixcontrast.egg-info/")} == {*files, *generated}
    with tarfile.open(next(made.glob("*.tar.gz"))) as archive:
        archive.extractall(made, filter="data")
    (unpacked,) = (path.parent for path in made.glob("*/setup.py"))
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    collected = subprocess.run(command, cwd=unpacked, env=environment, capture_output=True, text=True)
    assert collected.returncode == 0 and "tests/test_infonce.py::" in collected.stdout, collected.stdout[-2000:]


def test_a_wheel_holds_the_package_alone_and_needs_the_torch_of_its_build(checkout: Path, tmp_path: Path) -> None:
    built = tmp_path / "built"
    assert run_setup(checkout, "build_py", "--build-lib", str(built), PIXCONTRAST_CUDA="0").returncode == 0
    names = {str(path.relative_to(built)) for path in built.rglob("*") if path.is_file()}
    assert names == {*tracked("pixcontrast"), "pixcontrast/_built.py"}
    assert run_setup(checkout, "dist_info", "--output-dir", str(built), PIXCONTRAST_CUDA="0").returncode == 0
    metadata = next(built.glob("*.dist-info")) / "METADATA"
    assert f"Requires-Dist: torch=={RELEASE}.*\n" in metadata.read_text()


def test_a_build_without_torch_says_what_to_do(checkout: Path, tmp_path: Path) -> None:
    (checkout / "torch.py").write_text("raise ImportError('none')\n")
    done = run_setup(checkout, "build_ext", PYTHONPATH=str(checkout))
    assert done.returncode == 1
    assert "Install torch first, then: pip install --no-build-isolation ." in done.stderr


@pytest.fixture
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_of_pixcontrast", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_language_standard_is_set_but_that_of_torch(setup_py: ModuleType, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setup_py, "with_cuda", lambda: False)
    flags = setup_py.extension().extra_compile_args
    assert flags["cxx"] and flags["nvcc"]
    assert not [flag for flag in flags["cxx"] + flags["nvcc"] if "-std" in flag]


@pytest.mark.parametrize(("version", "too_old"), [("2.9.1+cu128", True), ("2.10.0", False), ("3.0.0a0+git", False)])
def test_too_old_a_torch_is_found_before_compiling(setup_py, monkeypatch, version: str, too_old: bool) -> None:
    monkeypatch.setattr(setup_py.torch, "__version__", version)
    if not too_old:
        setup_py.check_torch()
        return
    with pytest.raises(SystemExit, match=r"needs torch 2\.10 or newer, 2\.9\.1\+cu128 is installed"):
        setup_py.check_torch()


@pytest.fixture
def toolkit(setup_py: ModuleType, tmp_path: Path, monkeypatch) -> Path:
    """A CUDA toolkit of release 12.4 that compiles nothing, and a torch of CUDA 12.8."""
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        (tmp_path / "cuda" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cuda" / name).write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.131'\n")
    (tmp_path / "cuda" / "bin" / "nvcc").chmod(0o755)
    monkeypatch.setattr(setup_py, "CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(setup_py.torch.version, "cuda", "12.8")
    monkeypatch.setenv("PIXCONTRAST_CUDA", "1")
    return tmp_path / "cuda"


def test_a_toolkit_of_the_same_major_release_builds(setup_py: ModuleType, toolkit: Path) -> None:
    assert setup_py.with_cuda()


@pytest.mark.parametrize(
    ("cuda", "missing", "message"),
    [
        ("13.0", None, r"nvcc is not of CUDA 13\.0, which PyTorch was built with.*or build with PIXCONTRAST_CUDA=0"),
        (None, None, "this PyTorch has no CUDA"),
        ("12.8", "bin/nvcc", r"no nvcc with its headers.*install the CUDA toolkit 12\.8 or set CUDA_HOME"),
        ("12.8", "include/cuda_runtime.h", "no nvcc with its headers"),
    ],
)
def test_a_toolkit_that_does_not_fit_is_found_before_compiling(
    setup_py: ModuleType, toolkit: Path, monkeypatch, capsys, cuda: str | None, missing: str | None, message: str
) -> None:
    monkeypatch.setattr(setup_py.torch.version, "cuda", cuda)
    if missing:
        (toolkit / missing).unlink()
    with pytest.raises(SystemExit, match=message):
        setup_py.with_cuda()
    monkeypatch.setenv("PIXCONTRAST_CUDA", "auto")
    assert not setup_py.with_cuda()
    assert "building without CUDA kernels: " in capsys.readouterr().out


def import_with(tmp_path: Path, built: str | None, extension: bytes | None) -> subprocess.CompletedProcess[str]:
    """Imports a copy of the package with this record of its build and this extension."""
    shutil.copytree(
        ROOT / "pixcontrast", tmp_path / "pixcontrast", ignore=shutil.ignore_patterns("_C*.so", "_built.py")
    )
    if built is not None:
        (tmp_path / "pixcontrast" / "_built.py").write_text(f'TORCH = "{built}"\n')
    if extension is not None:
        (tmp_path / "pixcontrast" / EXTENSION).write_bytes(extension)
    code = (
        "import sys\n"  # an editable install would lend its extension
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        "import torch, pixcontrast\n"
        "from pixcontrast import PixelContrastLoss\n"
        "x = torch.randn(8, 4, requires_grad=True)\n"
        "loss = PixelContrastLoss(objective='positive')(x, torch.arange(8) % 2, queue=torch.randn(2, 3, 4))\n"
        "loss.backward()\n"
        "print('works', pixcontrast.ops.available())\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("built", [None, "2.3.1"])  # a record that outlived its extension does not matter
def test_without_an_extension_the_reference_runs_and_one_warning_says_how_to_build(tmp_path, built) -> None:
    done = import_with(tmp_path, built, None)
    assert done.stdout == "works False\n", done.stderr
    assert done.stderr.count("Warning") == 1
    assert "there is no pixcontrast/_C for Python" in done.stderr and ops.REBUILD in done.stderr
    assert "circular" not in done.stderr


def test_an_extension_that_does_not_load_is_named_with_both_versions(tmp_path: Path) -> None:
    done = import_with(tmp_path, f"{RELEASE}.9+cu1", b"\x7fELF broken")
    assert done.stdout == "works False\n", done.stderr
    assert done.stderr.count("Warning") == 1
    assert f"built against torch {RELEASE}.9+cu1, torch {torch.__version__} is installed" in done.stderr
    assert ops.REBUILD in done.stderr


def test_an_extension_of_another_torch_is_one_error_with_both_versions(tmp_path: Path) -> None:
    done = import_with(tmp_path, "2.3.1+cu121", b"\x7fELF never opened")
    assert done.returncode == 1 and done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the compiled kernels of pixcontrast were built against torch 2.3.1+cu121")
    assert f"torch {torch.__version__} is installed" in last and ops.REBUILD in last
    assert "undefined symbol" not in done.stderr and "never opened" not in done.stderr
