"""Tables of scores."""

from __future__ import annotations

import math

from train.scores import Scores, scores_table


def test_table():
    columns = {"x": Scores({"a": 0.5, "b": math.nan}, 0.5), "y": Scores({"a": 1.0, "b": 0.0}, 0.5)}
    assert scores_table(columns).splitlines() == [
        "| IoU, % | x | y |",
        "| --- | ---: | ---: |",
        "| a | 50.0 | 100.0 |",
        "| b | – | 0.0 |",
        "| **mean** | **50.0** | **50.0** |",
    ]
