"""Every code block of the pages runs, in the order of its page; links are whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

from pixcontrast import ClassMemory, PixelContrastLoss

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples/README.md"]
CLASSES = 19


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_are_whole(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(interpolate(logits, labels.shape[1:]), labels)


def names_of_readme() -> dict[str, Any]:
    network = torch.nn.Conv2d(3, CLASSES + 256, 3, stride=4, padding=1)
    return {
        "model": lambda images: network(images).split([CLASSES, 256], dim=1),
        "loader": [(torch.randn(2, 3, 32, 32), torch.randint(0, CLASSES, (2, 32, 32)))] * 3,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
        "cross_entropy": cross_entropy,
    }


def names_of_guide() -> dict[str, Any]:
    return {
        "teacher_features": torch.randn(2, 2048, 4, 4),
        "student_features": torch.randn(2, 2048, 4, 4, requires_grad=True),
        "teacher_logits": torch.randn(2, CLASSES, 4, 4),
        "labels": torch.randint(0, CLASSES, (2, 32, 32)),
    }


class Network(torch.nn.Module):
    """Gives features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.both = torch.nn.Conv2d(3, 256 + CLASSES, 3, stride=4, padding=1)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return list(self.both(images).split([256, CLASSES], dim=1))


def names_of_trainers() -> dict[str, Any]:
    options = {
        "temperature": 0.1, "base_temperature": 0.07, "max_samples": 64, "max_views": 1, "loss_weight": 0.1,
        "loss": "contrast", "ce_ignore_index": -1, "with_memory": True, "use_rmi": False,
    }  # fmt: skip
    labels = torch.randint(0, CLASSES, (2, 32, 32))
    embedding = torch.randn(2, 256, 8, 8, requires_grad=True)

    class Configer:
        def get(self, *key: str) -> object:
            return {"params": {"ce_ignore_index": -1, "ce_reduction": "mean"}}.get(key[-1], options.get(key[-1]))

        def exists(self, *key: str) -> bool:
            return key[-1] in options and key[-1] != "loss_weights"

    return {
        "configer": Configer(),
        "outputs": {"seg": torch.randn(2, CLASSES, 8, 8), "embed": embedding},
        "targets": labels,
        "iteration": 2,
        "warmup_iters": 1,
        "SGD": torch.optim.SGD,
        "model": Network(),
        "images": torch.randn(2, 3, 32, 32),
        "labels": labels,
        "cross_entropy": cross_entropy,
    }


def names_of_zero_loss() -> dict[str, Any]:
    return {
        "criterion": PixelContrastLoss(objective="positive"),
        "embedding": torch.randn(2, 8, 4, 4),
        "labels": torch.zeros(2, 4, 4, dtype=torch.int64),
        "memory": ClassMemory(2, 4, 8),
    }


NAMES = {
    "README.md": names_of_readme,
    "guide.md": names_of_guide,
    "trainers.md": names_of_trainers,
    "zero_loss.md": names_of_zero_loss,
}


@pytest.mark.filterwarnings("ignore:PixelContrastLoss. the loss is 0")  # the maps here are small
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page: Path) -> None:
    names: dict[str, Any] = NAMES[page.name]()
    for code in blocks(page):
        exec(code, names)
        if "loss" in names:
            assert names["loss"].isfinite()


def test_the_first_example_trains() -> None:
    names, losses = names_of_readme(), []

    def recorded(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses.append(cross_entropy(logits, labels))
        return losses[-1]

    names["cross_entropy"] = recorded
    exec(blocks(ROOT / "README.md")[0], names)
    assert names["memory"].counts.sum() > 0
    assert names["loss"] > losses[-1]  # the contrast took part
    assert losses[-1] < losses[0]
