"""The demo over several seeds: its table with paired differences, and the committed results.

``python -m train.studies.seeds runs/seeds/*/scores.json`` gathers the ``scores.json`` of several demos, one a seed.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

from train.scores import Scores, markdown_table
from train.studies.paired import Paired, paired

COMMITTED = Path(__file__).parents[1] / "results" / "demo" / "seeds.json"

TITLES = {
    "supervised": "labels only",
    "pseudo": "+ pseudo-labels",
    "contrast": "+ contrast",
    "all_labels": "all labels",
}

PAIRS = (("pseudo", "supervised"), ("contrast", "pseudo"), ("contrast", "supervised"), ("all_labels", "supervised"))
"""Runs that are compared seed by seed."""

Seeds = dict[int, dict[str, float]]
"""Mean IoU in percent of each run, by seed."""


def write_seed(path: Path, seed: int, scores: dict[str, Scores]) -> None:
    """Write the mean IoU of each run of one demo."""
    runs = {key: round(100 * score.miou, 2) for key, score in scores.items()}
    path.write_text(json.dumps({"seed": seed, "miou": runs}) + "\n")


def read_seeds(path: Path = COMMITTED) -> Seeds:
    """The gathered results."""
    return {int(seed): runs for seed, runs in json.loads(path.read_text()).items()}


def differences_of(seeds: Seeds) -> dict[tuple[str, str], Paired]:
    """Differences of :data:`PAIRS` over the seeds that have both runs; a pair needs two of them."""
    differences = {}
    for ours, theirs in PAIRS:
        both = [(runs[ours], runs[theirs]) for runs in seeds.values() if ours in runs and theirs in runs]
        if len(both) > 1:
            differences[ours, theirs] = paired(*zip(*both, strict=True))
    return differences


def seeds_tables(seeds: Seeds, own: dict[str, float] | None = None) -> str:
    """Markdown: mean IoU of each run over the seeds, beside that of this demo; then the paired differences.

    Args:
        seeds: the gathered results.
        own: mean IoU in percent of the runs of this demo.
    """
    head = ["Mean IoU, %", *(["this demo"] if own else []), f"mean of {len(seeds)} seeds", "lowest", "highest"]
    table = [head]
    for key, title in TITLES.items():
        values = [runs[key] for runs in seeds.values() if key in runs]
        cells = [statistics.fmean(values), min(values), max(values)] if values else [math.nan] * 3
        first = [f"{own[key]:.1f}" if key in own else "–"] if own else []
        table.append([title, *first, *(f"{cell:.1f}" for cell in cells)])
    gains = [["Difference, points", "mean", "95 % interval", "detectable with 80 % power", "real?"]]
    for (ours, theirs), d in differences_of(seeds).items():
        interval = f"{d.mean - d.half:+.1f} to {d.mean + d.half:+.1f}"
        verdict = "**yes**" if d.excludes_zero else "not shown"
        title = f"{TITLES[ours]}, over {TITLES[theirs]}"
        gains.append([title, f"{d.mean:+.1f}", interval, f"{d.detectable:.1f}", verdict])
    return f"{markdown_table(table)}\n\n{markdown_table(gains)}"


def verdict(seeds: Seeds) -> str:
    """One sentence on which differences the seeds show."""
    words = {("pseudo", "supervised"): "pseudo-labels add", ("contrast", "pseudo"): "the contrast adds to them"}
    parts = []
    for pair, text in words.items():
        d = differences_of(seeds)[pair]
        shown = "its interval excludes zero" if d.excludes_zero else "its interval includes zero, so no effect is shown"
        parts.append(f"{text} {d.mean:+.1f} ± {d.half:.1f} points ({shown})")
    return f"Over {len(seeds)} seeds, {'; '.join(parts)}."


def main(paths: list[str]) -> None:
    """Gather the ``scores.json`` of several demos into :data:`COMMITTED`, and print the tables."""
    results = [json.loads(Path(path).read_text()) for path in paths]
    seeds: Seeds = {result["seed"]: result["miou"] for result in sorted(results, key=lambda result: result["seed"])}
    COMMITTED.parent.mkdir(parents=True, exist_ok=True)
    COMMITTED.write_text(json.dumps(seeds, indent=1) + "\n")
    text = f"# The demo over {len(seeds)} seeds\n\n{seeds_tables(seeds)}\n\n{verdict(seeds)}\n"
    COMMITTED.with_name("README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
