"""The demo over several seeds: its table with paired differences, and the committed results.

``python -m train.studies.seeds runs/seeds/*/scores.json`` gathers the ``scores.json`` of several demos, one a seed.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from train.scores import Scores, markdown_table

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


@dataclass(frozen=True)
class Difference:
    """Paired differences of two runs, in points: their mean, half the width of its 95 % interval, and the true
    difference that so many seeds find with a probability of 80 %."""

    mean: float
    half: float
    detectable: float

    @property
    def real(self) -> bool:
        """Whether the interval excludes zero."""
        return abs(self.mean) > self.half


def write_seed(path: Path, seed: int, scores: dict[str, Scores]) -> None:
    """Write the mean IoU of each run of one demo."""
    runs = {key: round(100 * score.miou, 2) for key, score in scores.items()}
    path.write_text(json.dumps({"seed": seed, "miou": runs}) + "\n")


def read_seeds(path: Path = COMMITTED) -> Seeds:
    """The gathered results."""
    return {int(seed): runs for seed, runs in json.loads(path.read_text()).items()}


def difference(values: list[float]) -> Difference:
    """Mean, t-interval and detectable effect of two or more paired differences."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    t, power = (t_quantile(share, len(values) - 1) for share in (0.975, 0.8))
    return Difference(statistics.fmean(values), t * error, (t + power) * error)


def t_quantile(share: float, freedom: int) -> float:
    """The ``share`` quantile, above 0.5, of Student's t distribution with ``freedom`` degrees of freedom."""
    log_norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)

    def below(t: float) -> float:
        # t = sqrt(freedom) tan(angle): the density becomes a power of the cosine; Simpson's rule
        end, steps = math.atan(t / math.sqrt(freedom)), 200
        cosines = [math.cos(end * i / steps) ** (freedom - 1) for i in range(steps + 1)]
        total = cosines[0] + cosines[-1] + 4 * sum(cosines[1:-1:2]) + 2 * sum(cosines[2:-1:2])
        return 0.5 + math.exp(log_norm) * math.sqrt(freedom) * total * end / steps / 3

    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return low


def paired(seeds: Seeds) -> dict[tuple[str, str], Difference]:
    """Differences of :data:`PAIRS` over the seeds that have both runs; a pair needs two of them."""
    differences = {}
    for ours, theirs in PAIRS:
        values = [runs[ours] - runs[theirs] for runs in seeds.values() if ours in runs and theirs in runs]
        if len(values) > 1:
            differences[ours, theirs] = difference(values)
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
    for (ours, theirs), d in paired(seeds).items():
        interval = f"{d.mean - d.half:+.1f} to {d.mean + d.half:+.1f}"
        verdict = "**yes**" if d.real else "not shown"
        title = f"{TITLES[ours]}, over {TITLES[theirs]}"
        gains.append([title, f"{d.mean:+.1f}", interval, f"{d.detectable:.1f}", verdict])
    return f"{markdown_table(table)}\n\n{markdown_table(gains)}"


def verdict(seeds: Seeds) -> str:
    """One sentence on which differences the seeds show."""
    words = {("pseudo", "supervised"): "pseudo-labels add", ("contrast", "pseudo"): "the contrast adds to them"}
    parts = []
    for pair, text in words.items():
        d = paired(seeds)[pair]
        shown = "its interval excludes zero" if d.real else "its interval includes zero, so no effect is shown"
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
