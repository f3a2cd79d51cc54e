"""The report of the demo: report.md with its pictures."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from train.config import FitConfig
from train.data.dataset import SegmentationDataset
from train.logs import Record, read_metrics
from train.models import Learner
from train.paper.figures import prediction_row
from train.paper.pages import draw_page
from train.scores import Scores, markdown_table, percent, scores_table
from train.session import Session
from train.studies.cost import ContrastCost, contrast_cost
from train.studies.curves import draw_curves, draw_memory


@dataclass(frozen=True)
class RunResult:
    """A finished run of the demo: its title in the report, its configuration, and its scores by network."""

    title: str
    config: FitConfig
    scores: dict[str, Scores]

    @property
    def records(self) -> list[Record]:
        return read_metrics(self.config.run.out)


def write_report(out: Path, runs: dict[str, RunResult], learners: dict[str, Learner], session: Session) -> Path:
    """Write ``out/report.md`` and the pictures it shows.

    Args:
        runs: by key: ``supervised``, ``pseudo``, ``contrast`` and perhaps ``all_labels``.
        learners: student networks of the runs ``contrast`` and ``supervised``, for the pictures.
        session: of the run ``contrast``. It takes a few more steps here, to be timed.

    Returns:
        the path of the report.
    """
    validation, device = session.validation, session.device
    titles = {run.title: run for run in runs.values()}
    records = {title: run.records for title, run in titles.items()}
    draw_curves(out / "curves.png", records)
    draw_memory(out / "memory.png", runs["contrast"].records, validation.classes)
    columns = ["image", runs["contrast"].title, runs["supervised"].title, "labels"]
    shown = [(learners[name], validation) for name in ("contrast", "supervised")]
    rows = [prediction_row(shown, index, device) for index in varied_tiles(validation)]
    draw_page(out / "predictions.png", columns, rows, validation)
    config = session.training.config
    parts = [
        "# Class-memory contrast on land cover",
        _setting(session),
        "## Intersection over union",
        scores_table({title: run.scores["student"] for title, run in titles.items()}),
        _teacher_line(titles),
        _caution(runs, config.optim.seed),
        "## Predictions on validation tiles",
        "![image, contrast, supervised, labels](predictions.png)",
        "These tiles have the most varied labels; they were not chosen by the predictions.",
        "## Curves",
        "![loss and mean IoU](curves.png)",
        "## Memory",
        "![fill of the memory](memory.png)",
        _memory_line(config, validation.classes, runs["contrast"].records),
        "## Time",
        _times(records, contrast_cost(session)),
    ]
    report = out / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def varied_tiles(validation: SegmentationDataset, count: int = 6) -> list[int]:
    """Indices of the images whose labels have the highest entropy of classes."""

    def entropy(index: int) -> float:
        _, mask = validation[index]
        shares = torch.bincount(mask.flatten(), minlength=256)[: len(validation.classes)] / mask.numel()
        return float(torch.special.entr(shares).sum())

    return sorted(range(len(validation)), key=entropy, reverse=True)[:count]


def _setting(session: Session) -> str:
    config = session.training.config
    data, optim = config.data, config.optim
    weights = "with" if config.model.pretrained else "without"
    return (
        f"Satellite images (NASA Blue Marble) with MODIS land-cover labels. {len(session.labelled)} of "
        f"{len(session.train)} training tiles have labels, the others are used without them; "
        f"{len(session.validation)} tiles from other regions are for validation.\n\n"
        f"(a), (b) and (c) have the same labelled tiles and settings: {config.model.encoder} {weights} ImageNet "
        f"weights, DeepLabV3+ head, {optim.steps} steps of {optim.optimizer} at learning rate {optim.lr:g}, crops of "
        f"{data.crop} pixels, {data.labelled_batch} labelled images a step and, in (b) and (c), "
        f"{data.unlabelled_batch} unlabelled ones seen twice. Seed {optim.seed}, "
        f"on {session.device.type} with {torch.get_num_threads()} threads."
    )


def _teacher_line(runs: dict[str, RunResult]) -> str:
    teachers = [
        f"{title} {percent(run.scores['teacher'].miou)}" for title, run in runs.items() if "teacher" in run.scores
    ]
    return f"These are the students, after the last step. Mean IoU of their teachers: {', '.join(teachers)}."


def _caution(runs: dict[str, RunResult], seed: int) -> str:
    miou = {key: 100 * run.scores["student"].miou for key, run in runs.items()}
    return (
        f"In this run, pseudo-labels changed the mean IoU by {miou['pseudo'] - miou['supervised']:+.1f} points, and "
        f"the contrast by a further {miou['contrast'] - miou['pseudo']:+.1f}. This is one seed ({seed}), one choice "
        f"of labelled tiles and a short training: it shows that all parts work and what they cost, but another seed "
        f"may change it by a few points, so it cannot rank the methods. For that, average several seeds (`--seed`) "
        f"of longer runs. The settings were chosen with about twenty short runs of all kinds scored on these "
        f"validation tiles, so the scores themselves are a little too high, for all methods alike."
    )


def _memory_line(config: FitConfig, classes: tuple[str, ...], records: list[Record]) -> str:
    method, last = config.method, records[-1]
    rows = [f"{name} {round(last[f'memory_fill/{name}'] * method.memory_rows)}" for name in classes]
    return (
        f"The memory opens after step {method.memory_start}, the contrast begins after step {method.contrast_start}. "
        f"Rows at the end, of {method.memory_rows}: {', '.join(rows)}. A row is a labelled pixel that the teacher "
        f"classifies correctly with a probability above {method.confidence:g}. A class without such pixels stays "
        f"empty, and there is no contrast for it."
    )


def _times(records: dict[str, list[Record]], cost: ContrastCost) -> str:
    table = [["run", "seconds per step (median)"]]
    for title, lines in records.items():
        seconds = statistics.median(record["time/step_seconds"] for record in lines if "time/step_seconds" in record)
        table.append([title, f"{seconds:.3f}"])
    step, contrast, teacher = (1000 * seconds for seconds in (cost.step, cost.contrast, cost.teacher))
    text = (
        f"Measured on the network of (c), medians: a step takes {step:.0f} ms. Filling the memory and both "
        f"contrast losses, forward and backward, take {contrast:.0f} ms of it "
        f"(**{100 * contrast / step:.0f} %**). The teacher's forward on the labelled "
        f"images, which only the memory needs, takes another {teacher:.0f} ms."
    )
    return f"{markdown_table(table)}\n\n{text}"
