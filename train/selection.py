"""Choosing the student on the validation images, as the authors' code does: the best, a return to it, its renewal."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch

from train.checkpoint import read_checkpoint, save_checkpoint
from train.distributed import average_statistics
from train.evaluate import Scores, evaluate
from train.logs import Record
from train.session import Session
from train.step import to_float

RESTARTED = "selection/restarted"
"""Number in the log at steps after which the training went on from the best student."""


class Selection:
    """The best evaluation of the student so far, and since when nothing was better.

    Args:
        records: the log up to now, if the run is resumed.
        patience: steps without a better evaluation that are too many; 0: they never are.
    """

    def __init__(self, records: list[Record], patience: float) -> None:
        self.patience = patience
        self.best, self.since = -math.inf, 0
        for record in records:
            self.note(record)

    def note(self, record: Record) -> bool:
        """Take note of a record of the log; whether it has a better evaluation than all before."""
        miou = record.get("miou/student")
        miou = -math.inf if miou is None else miou  # the log has None for NaN
        better = miou > self.best
        if better:
            self.best = miou
        if better or RESTARTED in record:
            self.since = record["step"]
        return better

    def stuck(self, step: int) -> bool:
        """Whether nothing was better for too long."""
        return 0 < self.patience < step - self.since


def restart(session: Session) -> None:
    """Give student and teacher the student's best weights; memory, momentum and learning rate go on as they are."""
    state = read_checkpoint(session.best_checkpoint)["training"]["learner"]
    state = {name: tensor for name, tensor in state.items() if not name.startswith("branch.memory.")}
    session.training.learner.load_state_dict(state, strict=False)
    session.training.teacher.load_state_dict(state, strict=False)


@torch.no_grad()
def renew(session: Session, batches: int) -> Scores:
    """Move the BatchNorm statistics of the best student towards those of plain unlabelled crops.

    It is written to ``renewed.pt``; the training itself is left as it is.

    Args:
        batches: how many forwards in training mode.

    Returns:
        the scores of the renewed student.
    """
    training = session.training
    learner = copy.deepcopy(training.learner)
    learner.load_state_dict(read_checkpoint(session.best_checkpoint)["training"]["learner"])
    learner.train()
    for (images, _), _ in zip(session.unlabelled_batches(), range(batches), strict=False):
        learner(to_float(images))
    average_statistics(learner)
    path = session.best_checkpoint.with_name("renewed.pt")
    save_checkpoint(path, replace(training, learner=learner), session.data)
    return evaluate(learner, session.validation, session.device)
