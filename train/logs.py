"""Metrics of a run: one line of JSON per step in metrics.jsonl, and tensorboard events."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"

Record = dict[str, Any]  # "step" and flat "group/name" numbers


class MetricsLog:
    """Appends records to ``out/metrics.jsonl`` and ``out/tensorboard``.

    Args:
        out: folder of the run.
        start: steps already taken; what an interrupted run logged after them is dropped, so no step appears twice.
    """

    def __init__(self, out: Path, start: int) -> None:
        self.path = out / METRICS
        kept = [record for record in read_metrics(out) if record["step"] <= start]
        partial = self.path.with_name(METRICS + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(partial, self.path)
        self.file = open(self.path, "a")  # noqa: SIM115 - closed by close()
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Record ``numbers`` after ``step`` steps; those that are not finite become null."""
        record = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        self.file.flush()
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()


def read_metrics(out: Path) -> list[Record]:
    """Records of a run, in order; a line that a killed run left unfinished is skipped."""
    path = out / METRICS
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records
