"""What benchmarks and profiler have written so far, as result files and tables."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

SHOWN = 12  # kernels in the table
TIME = "gpu__time_duration.sum"


def replace_file(path: Path, content: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(content)
    unfinished.replace(path)


def benchmarks_found(folders: list[Path], out: Path) -> list[str]:
    """Puts the outcomes of all groups into one file; pictures go where logs are archived."""
    merged: dict[str, Any] = {"machine": {}, "outcomes": []}
    reports = []
    for folder in folders:
        results = folder / "results.json"
        if not results.exists():
            continue
        found = json.loads(results.read_text())
        merged["machine"] = found["machine"]
        merged["outcomes"] += found["outcomes"]
        if (folder / "report.md").exists():
            text = (folder / "report.md").read_text()
            reports.append(re.sub(r"\n!\[\]\(.*?\)\n", "", text))
            pictures = folder.parent.parent / "logs" / f"fast-{folder.name}"
            pictures.mkdir(parents=True, exist_ok=True)
            for picture in folder.glob("*.png"):
                shutil.copy(picture, pictures)
    if not merged["outcomes"]:
        return []
    replace_file(out / "benchmarks.json", json.dumps(merged, indent=1) + "\n")
    if reports:
        replace_file(out / "benchmarks.md", "\n\n".join(reports))
    return [_benchmark_table(merged["outcomes"])]


def _benchmark_table(outcomes: list[dict[str, Any]]) -> str:
    """One line for each case: the first contender."""
    columns = "| case | ms | eager ms | nodes | × floor | peak MiB | error | next best |"
    rows = ["## Benchmarks", "", columns, "|---|---:|---:|---:|---:|---:|---:|---|"]
    for outcome in outcomes:
        if not outcome["rows"]:
            continue
        first, *others = outcome["rows"]
        timed = [row for row in others if row["ms"] and first["ms"]]
        best = min(timed, key=lambda row: row["ms"], default=None)
        shown = [_short(first.get(name)) for name in ("ms", "eager_ms", "nodes", "times_floor", "peak_mib", "error")]
        if first["ms"] is None:
            shown[0] = f"{first['status']}: {first['note']}"[:80].replace("|", "/")
        rival = f"{best['contender']}: × {best['ms'] / first['ms']:.1f}" if best else "–"
        rows.append(f"| {' | '.join([outcome['case'], *shown, rival])} |")
    return "\n".join(rows)


def _short(value: float | int | None) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def kernels_found(report: Path, out: Path) -> list[str]:
    """Time, bytes and tensor-core use of the kernels that Nsight Compute has measured, slowest first."""
    if not report.exists():
        return []
    kernels = sorted(read_ncu(report.read_text(errors="replace")), key=lambda one: -one["ns"])
    if not kernels:
        return []
    replace_file(out / "kernels.json", json.dumps(kernels, indent=1) + "\n")
    rows = ["## Slowest kernels", "", "| kernel | µs | MB | GB/s | tensor cores, % |", "|---|---:|---:|---:|---:|"]
    for one in kernels[:SHOWN]:
        moved = None if one["bytes"] is None else one["bytes"] / 1e6
        rate = None if one["bytes"] is None else one["bytes"] / one["ns"]
        values = [one["ns"] / 1e3, moved, rate, one["tensor_percent"]]
        rows.append(f"| `{one['kernel'][:80]}` | {' | '.join(_short(value) for value in values)} |")
    return ["\n".join(rows)]


def read_ncu(text: str) -> list[dict[str, Any]]:
    """From the CSV of ``--page raw --print-units base``, whose second line has the units; other lines begin with ==."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    found = []
    for row in list(csv.DictReader(lines))[1:]:
        read, written = _number(row.get("dram__bytes_read.sum")), _number(row.get("dram__bytes_write.sum"))
        time = _number(row.get(TIME) or row.get("gpc__cycles_elapsed.max"))
        tensor = [_number(value) for name, value in row.items() if name and re.search("tensor.*pct", name)]
        used = [value for value in tensor if value is not None]
        if time is None:
            continue
        found.append(
            {
                "kernel": row.get("Kernel Name", ""),
                "ns": time,
                "bytes": None if read is None or written is None else read + written,
                "tensor_percent": max(used, default=None),
                "grid": row.get("Grid Size", ""),
                "block": row.get("Block Size", ""),
                "all": {name: value for name, value in row.items() if name and "__" in name and value},
            }
        )
    return found


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None
