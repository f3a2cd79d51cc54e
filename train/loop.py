"""The training loop: steps, and between them logs, evaluations, checkpoints."""

from __future__ import annotations

import math
import shlex
import sys
import time

import torch
from torch import Tensor
from tqdm import tqdm

from train.checkpoint import save_checkpoint
from train.config import FitConfig
from train.distributed import any_rank, join, launcher, mean_over_ranks, rank, wait
from train.errors import UserError
from train.evaluate import Scores, evaluate
from train.interrupt import CatchInterrupt, Interrupted
from train.logs import MetricsLog, read_metrics
from train.plain import write_config
from train.results import BEST, logged_scores
from train.selection import RESTARTED, Selection, renew, restart
from train.session import Session, open_session
from train.step import training_step
from train.training import Training


def fit(config: FitConfig) -> dict[str, Scores]:
    """Train until ``config.optim.steps``, from the checkpoint in ``config.run.out`` if there is one.

    Returns:
        on every rank, scores on the validation set of ``student`` and, unless the method is ``supervised``,
        ``teacher`` after the last step; and of the best of all evaluations of the student.

    Raises:
        UserError: options, data or a checkpoint that cannot be used; a loss that is not finite.
        Interrupted: on SIGINT, after the step was finished and saved.
    """
    join()
    session = open_session(config)
    if session.training.step >= config.optim.steps:
        return evaluate_all(session) | best_logged(session)
    log = None
    try:
        if rank() == 0:
            config.run.out.mkdir(parents=True, exist_ok=True)
            write_config(config)
            log = MetricsLog(config.run.out, session.training.step)
    except OSError as error:
        raise UserError(f"run folder {config.run.out} cannot be written ({error}): choose another --out") from error
    wait()
    try:
        with CatchInterrupt() as interrupt:
            return _loop(session, log, interrupt)
    finally:
        if log is not None:
            log.close()


def _loop(session: Session, log: MetricsLog | None, interrupt: CatchInterrupt) -> dict[str, Scores]:
    training, classes, batches = session.training, session.validation.classes, session.batches()
    run, steps = training.config.run, training.config.optim.steps
    scores: dict[str, Scores] = {}
    selection = Selection(read_metrics(run.out), training.config.optim.restart_after * steps)
    slow = 0.5 if sys.stderr.isatty() else 20.0  # a log file needs no new line every half second
    bar = {"total": steps, "initial": training.step, "unit": "step", "mininterval": slow, "disable": rank() > 0}
    with tqdm(desc=run.out.name, **bar) as progress:
        while training.step < steps:
            start = time.perf_counter()
            losses = training_step(training, *next(batches))
            last = training.step == steps
            numbers: dict[str, float] = {}
            if last or training.step % run.log_every == 0:
                numbers |= log_numbers(training, losses, classes)
                numbers["time/step_seconds"] = time.perf_counter() - start
                miou = f", mIoU {100 * scores['student'].miou:.1f}" if scores else ""
                progress.set_postfix_str(f"loss {numbers['loss/total']:.3f}{miou}", refresh=False)
            if last or training.step % run.evaluate_every == 0:
                scores = evaluate_all(session)
                numbers |= score_numbers(scores) | select(session, selection, scores["student"])
            if numbers and log is not None:
                log.write(training.step, numbers)
            interrupted = any_rank(interrupt.requested) and not last
            if last or interrupted or training.step % run.checkpoint_every == 0:
                save_checkpoint(session.checkpoint, training, session.data)
            progress.update()
            if interrupted:
                raise Interrupted(
                    f"interrupted after step {training.step} of {steps}, saved in {session.checkpoint}; to go on, "
                    f"run the same command again: {shlex.join([*launcher(), '-m', 'train', *sys.argv[1:]])}"
                )
    return scores | best_logged(session)


def select(session: Session, selection: Selection, student: Scores) -> dict[str, float]:
    """Keep the student if it is the best so far, return to the best one if that was long ago, renew it at the end.

    Returns:
        numbers for the log.
    """
    training, optim = session.training, session.training.config.optim
    last = training.step == optim.steps
    if selection.note({"step": training.step, "miou/student": student.miou}):
        save_checkpoint(session.best_checkpoint, training, session.data)
    elif selection.stuck(training.step) and not last:
        restart(session)
        selection.note({"step": training.step, RESTARTED: 1.0})
        return {RESTARTED: 1.0}
    return score_numbers({"renewed": renew(session, optim.renewal)}) if last and optim.renewal else {}


def best_logged(session: Session) -> dict[str, Scores]:
    """Scores of the best evaluation of the student, under its name."""
    scores = logged_scores(read_metrics(session.training.config.run.out), session.validation.classes)
    return {BEST: scores[BEST]} if scores else {}


def log_numbers(training: Training, losses: dict[str, Tensor], classes: tuple[str, ...]) -> dict[str, float]:
    """Losses, learning rate and fill of the memory as numbers, over all ranks. Only here does it wait for the device.

    Raises:
        UserError: the loss is not finite.
    """
    values = mean_over_ranks(torch.stack(list(losses.values()))).tolist()
    numbers = {f"loss/{name}": loss for name, loss in zip(losses, values, strict=True)}
    if not math.isfinite(numbers["loss/total"]):
        raise UserError(f"the loss is {numbers['loss/total']} after step {training.step}: try a lower --lr")
    numbers["schedule/lr"] = float(training.schedule.get_last_lr()[0])
    if training.learner.branch is not None:
        fill = mean_over_ranks(training.learner.branch.memory.fill).tolist()
        numbers |= {f"memory_fill/{name}": share for name, share in zip(classes, fill, strict=True)}
    return numbers


def evaluate_all(session: Session) -> dict[str, Scores]:
    """Scores of the student and, where the method uses it, of the teacher."""
    training = session.training
    scores = {"student": evaluate(training.learner, session.validation, session.device)}
    if training.config.method.method != "supervised":
        scores["teacher"] = evaluate(training.teacher, session.validation, session.device)
    return scores


def score_numbers(scores: dict[str, Scores]) -> dict[str, float]:
    """Scores under their names in the log."""
    numbers = {f"miou/{network}": score.miou for network, score in scores.items()}
    for network, score in scores.items():
        numbers |= {f"iou_{network}/{name}": iou for name, iou in score.iou.items()}
    return numbers
