"""Each example trains: its loss falls, and its memory fills. `make test-examples` installs what they import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGES = {
    "smp_loop": "segmentation_models_pytorch",
    "lightning_module": "lightning",
    "hf_trainer": "transformers",
    "mmseg_head": "mmseg",
}


@pytest.mark.parametrize("example", PACKAGES)
def test_an_example_trains(example: str, tmp_path: Path) -> None:
    pytest.importorskip(PACKAGES[example], reason="run `make test-examples`", exc_type=ImportError)
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / f"{example}.py"), "--steps", "60"]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    losses = [float(re.findall(r"(?:cross.entropy|loss(?:_ce)?) ([\d.]+)", line)[0]) for line in lines]
    assert losses[-1] < 0.5 * losses[0], result.stdout
    filled = [float(value) for value in re.findall(r"[\d.]+", lines[-1].split("memory")[1])]
    assert min(filled) > 0.5, result.stdout  # every class has rows


def test_examples_are_short() -> None:
    lengths = {example: len((EXAMPLES / f"{example}.py").read_text().splitlines()) for example in PACKAGES}
    assert max(lengths.values()) < 60, lengths


def test_the_notebook_runs_and_its_pixels_gather_around_the_memory() -> None:
    nbclient = pytest.importorskip("nbclient", reason="run `make test-examples`")
    pytest.importorskip("ipykernel", reason="run `make test-examples`")
    import nbformat

    notebook = nbformat.read(EXAMPLES / "memory.ipynb", as_version=4)
    notebook.cells.append(
        nbformat.v4.new_code_cell(
            "features, logits = teacher['network'](test_images)\n"
            "known = test_labels < 4\n"
            "right = (logits.argmax(1) == test_labels)[known].float().mean()\n"
            "print(right.item() > 0.9, memory.counts.min().item() > 32)"
        )
    )
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    assert notebook.cells[-1].outputs[0].text == "True True\n"
