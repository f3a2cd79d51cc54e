"""The benchmark times only what computes the right thing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import positive
from benchmarks.positive_contenders import CONTENDERS, Case, masked_pairs

EAGER = [name for name in CONTENDERS if name != "torch.compile"]


@pytest.mark.parametrize("weighted_rows", [True, False])
@pytest.mark.parametrize("name", EAGER)
def test_every_contender_computes_the_same(name: str, weighted_rows: bool) -> None:
    case = Case.random(300, 24, 5, 7, weighted_rows)
    truth = case.to(torch.float64).step(masked_pairs)
    assert len(truth) == 3 + weighted_rows
    assert positive.worst_error(case, name, truth) < 1e-4


def test_a_wrong_contender_is_reported_and_not_timed(monkeypatch) -> None:
    monkeypatch.setitem(positive.CASES, "tiny", (300, 24, 5, 7, True))
    monkeypatch.setitem(CONTENDERS, "wrong", lambda case: masked_pairs(case) * 1.01)
    monkeypatch.setattr(positive, "peak_mebibytes", lambda *_: 0.0)
    rows = positive.measure("tiny", ["pixcontrast", "wrong"], rounds=3)
    assert "ms" in rows[0] and "ms" not in rows[1]
    assert "| tiny | wrong | wrong, not timed |" in positive.table(rows)
