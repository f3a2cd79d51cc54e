"""The report of the demo: report.md with its pictures."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from train.config import DataConfig, FitConfig
from train.data.dataset import SegmentationDataset
from train.data.datasets import open_dataset
from train.logs import Record, read_metrics
from train.paper.figures import prediction_row
from train.paper.introspection import MemoryRows, memory_rows
from train.paper.pages import Row, draw_page
from train.scores import Scores, markdown_table, percent, scores_table
from train.session import Session, build_training
from train.step import to_float
from train.studies.cost import ContrastCost, contrast_cost
from train.studies.curves import draw_curves, draw_memory_planes
from train.studies.seeds import read_seeds, seeds_tables, verdict


@dataclass(frozen=True)
class RunResult:
    """A finished run of the demo: its title in the report, its configuration, and its scores by network."""

    title: str
    config: FitConfig
    scores: dict[str, Scores]

    @property
    def records(self) -> list[Record]:
        return read_metrics(self.config.run.out)


def test_split(data: DataConfig) -> Literal["test", "val"]:
    """The split that the scores are of: tiles by which nothing was chosen, where the data set has them."""
    return "test" if data.dataset == "landcover" else "val"


def write_report(out: Path, runs: dict[str, RunResult], sessions: dict[str, Session]) -> Path:
    """Write ``out/report.md`` and the pictures it shows.

    Args:
        runs: by key: ``supervised``, ``pseudo``, ``contrast`` and perhaps ``all_labels``.
        sessions: of the same runs, finished. That of ``contrast`` takes a few more steps here, to be timed.

    Returns:
        the path of the report.
    """
    session = sessions["contrast"]
    config, device = session.training.config, session.device
    shown = open_dataset(config.data.dataset, test_split(config.data), config.data.root, config.data.scale)
    networks = [(sessions[key].training.learner, shown) for key in runs]
    rows = [_labels_second(prediction_row(networks, index, device)) for index in varied_tiles(shown)]
    draw_page(out / "predictions.png", ["image", "labels", *(run.title for run in runs.values())], rows, shown)
    records = {run.title: run.records for run in runs.values()}
    draw_curves(out / "curves.png", records)
    branch = session.training.learner.branch
    assert branch is not None
    before, after = initial_rows(session), memory_rows(branch.eval())
    draw_memory_planes(out / "memory.png", {"before the training": before, "after": after}, shown)
    miou = {key: 100 * run.scores["student"].miou for key, run in runs.items()}
    parts = [
        "# Class-memory contrast on land cover",
        _setting(session, len(shown)),
        "## What the networks see",
        "![image, labels, and the prediction of each run](predictions.png)",
        "These test tiles have the most varied labels; they were not chosen by the predictions. The closer a column is "
        "to *labels*, the better. *All labels* shows what the same network learns if nothing is hidden from it.",
        "## Did it work?",
        _verdict(miou, config.optim.seed),
        "## What the memory has learned",
        "![rows of the memory before and after the training](memory.png)",
        _memory_line(config, session.validation.classes, runs["contrast"].records, before, after),
        "## Curves",
        "![loss and mean IoU](curves.png)",
        "## Intersection over union of each class in this run, test tiles",
        scores_table({run.title: run.scores["student"] for run in runs.values()}),
        _teacher_line({run.title: run for run in runs.values()}),
        "## Time",
        _times(records, contrast_cost(session)),
    ]
    report = out / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def _labels_second(row: Row) -> Row:
    image, *predictions, labels = row.pictures
    return Row(row.name, [image, labels, *predictions])


@torch.no_grad()
def initial_rows(session: Session) -> MemoryRows:
    """Rows that a memory would have before the first step: the labelled tiles, seen by the network it starts from."""
    data = session.train
    training = build_training(
        session.training.config, len(data.classes), data.ignore_index, len(session.labelled), 1, session.device
    )
    learner = training.learner.eval()
    assert learner.branch is not None
    for index in session.labelled:
        image, labels = (tensor[None].to(session.device) for tensor in data[index])
        learner.branch.remember(learner(to_float(image))[1], None, labels)
    return memory_rows(learner.branch)


def similarity(memory: MemoryRows) -> tuple[float, float]:
    """Mean cosine of two rows of one class, and of two rows of different classes; a class counts once."""
    unit = torch.nn.functional.normalize(memory.rows, dim=1)
    present = memory.classes.unique()
    means = torch.stack([unit[memory.classes == label].mean(0) for label in present])
    cosines = means @ means.t()
    same = cosines.diag().mean()  # of a row with itself too, which 256 rows hardly notice
    other = (cosines.sum() - cosines.trace()) / max(1, len(present) * (len(present) - 1))
    return float(same), float(other)


def varied_tiles(validation: SegmentationDataset, count: int = 5) -> list[int]:
    """Indices of the images whose labels have the highest entropy of classes."""

    def entropy(index: int) -> float:
        _, mask = validation[index]
        shares = torch.bincount(mask.flatten(), minlength=256)[: len(validation.classes)] / mask.numel()
        return float(torch.special.entr(shares).sum())

    return sorted(range(len(validation)), key=entropy, reverse=True)[:count]


def _setting(session: Session, tested: int) -> str:
    config = session.training.config
    data, optim = config.data, config.optim
    weights = "with" if config.model.pretrained else "without"
    return (
        f"**The task**: colour a satellite image (NASA Blue Marble) by land cover (MODIS). Only "
        f"{len(session.labelled)} of {len(session.train)} training tiles have labels. *Labels only* learns from these; "
        f"*+ pseudo-labels* also from the other tiles, which a moving average of the network labels; *+ contrast* also "
        f"keeps a memory of features of each class, and draws the features of a class towards it; *all labels* is the "
        f"reference that has every label.\n\n"
        f"The first three have the same labelled tiles and settings: {config.model.encoder} {weights} ImageNet "
        f"weights, DeepLabV3+ head, {optim.steps} steps of {optim.optimizer} at learning rate {optim.lr:g}, crops of "
        f"{data.crop} pixels, {data.labelled_batch} labelled images a step and, with pseudo-labels, "
        f"{data.unlabelled_batch} unlabelled ones seen twice. The labelled tiles are drawn at random such that each "
        f"class occurs. Scores are of {tested} tiles from other regions. Seed {optim.seed}, on "
        f"{session.device.type} with {torch.get_num_threads()} threads."
    )


def _teacher_line(runs: dict[str, RunResult]) -> str:
    teachers = [
        f"{title} {percent(run.scores['teacher'].miou)}" for title, run in runs.items() if "teacher" in run.scores
    ]
    return f"These are the students, after the last step. Mean IoU of their teachers: {', '.join(teachers)}."


def _verdict(miou: dict[str, float], seed: int) -> str:
    """This run beside the committed seeds, and one sentence on what these show."""
    seeds = read_seeds()
    return (
        f"{seeds_tables(seeds, miou)}\n\n**{verdict(seeds)}** This demo is one seed ({seed}), which may come out "
        f"either way; what is real is what the intervals over the seeds say. An effect smaller than the "
        f"detectable one may exist and not be seen. The committed runs have the demo's default settings."
    )


def _memory_line(
    config: FitConfig, classes: tuple[str, ...], records: list[Record], before: MemoryRows, after: MemoryRows
) -> str:
    method, last = config.method, records[-1]
    rows = [f"{name} {round(last[f'memory_fill/{name}'] * method.memory_rows)}" for name in classes]
    (same, other), (same_after, other_after) = similarity(before), similarity(after)
    return (
        f"Each point is a feature of a labelled pixel, seen in the plane in which the features vary most. Before the "
        f"training the classes lie in one cloud: the mean cosine is {same:.2f} within a class and {other:.2f} between "
        f"classes; after it, {same_after:.2f} and {other_after:.2f}. Both losses do this, cross-entropy and contrast. "
        f"A row of the memory is a labelled pixel that the teacher classifies correctly with a probability above "
        f"{method.confidence:g}. Rows at the end, of {method.memory_rows}: {', '.join(rows)}. A class without such "
        f"pixels stays empty, and there is no contrast for it. The memory opens after step {method.memory_start}, "
        f"the contrast begins after step {method.contrast_start}."
    )


def _times(records: dict[str, list[Record]], cost: ContrastCost) -> str:
    table = [["run", "seconds per step (median)"]]
    for title, lines in records.items():
        seconds = statistics.median(record["time/step_seconds"] for record in lines if "time/step_seconds" in record)
        table.append([title, f"{seconds:.3f}"])
    step, contrast, teacher = (1000 * seconds for seconds in (cost.step, cost.contrast, cost.teacher))
    text = (
        f"Measured on the network with contrast, medians: a step takes {step:.0f} ms. Filling the memory and both "
        f"contrast losses, forward and backward, take {contrast:.0f} ms of it "
        f"(**{100 * contrast / step:.0f} %**). The teacher's forward on the labelled "
        f"images, which only the memory needs, takes another {teacher:.0f} ms."
    )
    return f"{markdown_table(table)}\n\n{text}"
