"""The README's first example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parent.parent / "README.md"


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
