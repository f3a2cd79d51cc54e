"""The README's first example runs as it stands; links and code of all pages are whole."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_code_of_a_page_are_whole(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing
    for code in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        ast.parse(code)


def test_the_first_example_trains() -> None:
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    network = torch.nn.Conv2d(3, 19 + 256, 3, stride=4, padding=1)
    losses = []

    def cross_entropy(logits, labels):
        losses.append(torch.nn.functional.cross_entropy(torch.nn.functional.interpolate(logits, (32, 32)), labels))
        return losses[-1]

    names = {
        "model": lambda images: network(images).split([19, 256], dim=1),
        "loader": [(torch.randn(2, 3, 32, 32), torch.randint(0, 19, (2, 32, 32)))] * 3,
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1),
        "cross_entropy": cross_entropy,
    }
    exec(code, names)
    assert names["memory"].counts.sum() > 0
    assert names["loss"] > losses[-1]  # the contrast took part
    assert losses[-1] < losses[0]
