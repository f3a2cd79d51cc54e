"""The training loop: steps, and between them logs, evaluations, checkpoints and the choice of the best student."""

from __future__ import annotations

import copy
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from pixcontrast.distributed import world_size
from train.checkpoint import read_checkpoint, save_checkpoint
from train.config import FitConfig
from train.config_file import write_config
from train.contrast import memory_fill
from train.data.batches import Batch, loader_ended
from train.distributed import any_rank, average_statistics, join, launcher, mean_over_ranks, rank, wait
from train.errors import Interrupted, UserError, reason
from train.evaluate import evaluate
from train.logs import BEST, MetricsLog, Record, logged_scores, read_metrics, score_numbers
from train.models import without_memory
from train.run_folder import locked, not_written
from train.scores import Scores
from train.session import Session, Training, open_session
from train.signals import caught_interrupts
from train.step import to_float, training_step

RESTARTED = "selection/restarted"
"""Number in the log at steps after which the training went on from the best student."""


def fit(config: FitConfig) -> dict[str, Scores]:
    """Train until ``config.optim.steps``, from the checkpoint in ``config.run.out`` if there is one.

    Returns:
        on every rank, scores on the validation set of ``student`` and, unless the method is ``supervised``,
        ``teacher`` after the last step; and of the best of all evaluations of the student.

    Raises:
        UserError: options, data or a checkpoint that cannot be used; a folder that another program trains in or that
            cannot be written; a loss or weights that are not finite; a loader process that ended.
        Interrupted: on SIGINT or SIGTERM, after the step was finished and saved.
    """
    join()
    try:
        with locked(config.run.out):
            return _fit(config)
    except (RuntimeError, EOFError, OSError) as error:
        _explain_ended_process(error, config)
        raise


def _explain_ended_process(error: Exception, config: FitConfig) -> None:
    """Raise an error of one line if another process of this training, or one that loads images, has ended.

    It is raised here and not returned, because a variable of :func:`fit` would keep it alive, with its traceback the
    data loaders, and so their processes.
    """
    again = f"the same command goes on from the last checkpoint in {config.run.out}"
    if world_size() > 1 and ("peer" in str(error) or isinstance(error, torch.distributed.DistError)):
        raise UserError(f"another process of this training ended ({reason(error)}): {again}") from None
    if ended := loader_ended(error, config.data.workers):
        raise UserError(f"{ended}; {again}") from None


def _fit(config: FitConfig) -> dict[str, Scores]:
    session = open_session(config)
    if session.training.step >= config.optim.steps:
        return evaluate_all(session) | best_logged(session)
    log = None
    if rank() == 0:
        try:
            write_config(config)
            log = MetricsLog(config.run.out, session.training.step)
        except OSError as error:
            raise not_written(f"run folder {config.run.out}", error) from error
    wait()
    try:
        # after an error, loader processes end now, not when the last reference to its traceback goes
        with caught_interrupts() as interrupts, closing(session.batches()) as batches:
            return _loop(session, batches, log, interrupts)
    finally:
        if log is not None:
            log.close()


def _loop(
    session: Session,
    batches: Iterator[tuple[Batch, Batch | None]],
    log: MetricsLog | None,
    interrupts: list[int],
) -> dict[str, Scores]:
    training, classes = session.training, session.validation.classes
    run, steps, saved = training.config.run, training.config.optim.steps, training.step
    scores: dict[str, Scores] = {}
    selection = Selection(read_metrics(run.out), training.config.optim.restart_after * steps)
    interval = 0.5 if sys.stderr.isatty() else 20.0  # seconds; in a log file, each update of the bar is a new line
    bar = {"total": steps, "initial": training.step, "unit": "step", "mininterval": interval, "disable": rank() > 0}
    with tqdm(desc=run.out.name, **bar) as progress:
        while training.step < steps:
            start = time.perf_counter()
            step = training.step + 1
            last = step == steps
            logs, evaluates, saves = (
                last or step % every == 0 for every in (run.log_every, run.evaluate_every, run.checkpoint_every)
            )
            evaluates &= step >= run.evaluate_from
            watch: dict[str, Tensor] | None = {} if run.watch and logs else None
            losses = training_step(training, *next(batches), watch)
            numbers: dict[str, float] = {}
            if logs:
                numbers |= log_numbers(training, losses, classes)
                numbers |= {f"watch/{name}": float(mean_over_ranks(value)) for name, value in (watch or {}).items()}
                warn_of_empty_memory(training, numbers, last)
                numbers["time/step_seconds"] = time.perf_counter() - start
                miou = f", mIoU {100 * scores['student'].miou:.1f}" if scores else ""
                progress.set_postfix_str(f"loss {numbers['loss/total']:.3f}{miou}", refresh=False)
            if evaluates or not math.isfinite(numbers.get("loss/total", 0.0)):
                check_finite(session, losses, saved)
            if evaluates:
                scores = evaluate_all(session)
                numbers |= score_numbers(scores) | select(session, selection, scores["student"])
            if numbers and log is not None:
                log.write(training.step, numbers)
            interrupted = any_rank(bool(interrupts)) and not last
            if saves or interrupted:
                check_finite(session, losses, saved)
                save_checkpoint(session.checkpoint, training, session.data)
                saved = training.step
            progress.update()
            if interrupted:
                raise Interrupted(
                    f"interrupted after step {training.step} of {steps}, saved in {session.checkpoint}; to go on, "
                    f"run the same command again: {shlex.join([*launcher(), '-m', 'train', *sys.argv[1:]])}",
                    status=128 + (interrupts or [signal.SIGINT])[0],
                )
    return scores | best_logged(session)


def check_finite(session: Session, losses: dict[str, Tensor], saved: int) -> None:
    """Refuse to go on with a loss, weights or statistics that are not finite. Synchronises with the device.

    Args:
        saved: step of the last checkpoint, 0 if there is none.

    Raises:
        UserError: on all ranks, if on any of them a value is not finite.
    """
    t = session.training
    states = (*t.learner.state_dict().values(), *t.teacher.state_dict().values())
    if any_rank(not torch.stack([tensor.isfinite().all() for tensor in (losses["total"], *states)]).all()):
        advice = "nothing was saved; try a lower --lr"
        if saved:
            advice = f"{session.checkpoint} is that of step {saved}; to go on from there, run the same command with "
            advice += f"--lr {t.config.optim.lr / 2:g} --change-lr, or another lower --lr"
        raise UserError(f"the loss or a weight is not finite after step {t.step}: {advice}")


def log_numbers(training: Training, losses: dict[str, Tensor], classes: tuple[str, ...]) -> dict[str, float]:
    """Losses, learning rate and fill of the memory as numbers, over all ranks. Synchronises with the device."""
    values = mean_over_ranks(torch.stack(list(losses.values()))).tolist()
    numbers = {f"loss/{name}": loss for name, loss in zip(losses, values, strict=True)}
    numbers["schedule/lr"] = float(training.schedule.get_last_lr()[0])
    if (fill := memory_fill(training.learner.branch)) is not None:
        shares = zip(classes, mean_over_ranks(fill).tolist(), strict=True)
        numbers |= {f"memory_fill/{name}": share for name, share in shares}
    return numbers


def warn_of_empty_memory(training: Training, numbers: dict[str, float], last: bool) -> None:
    """Say on stderr that the contrast has nothing to compare with: of no class once it is on, or of some at the end."""
    method, steps = training.config.method, training.config.optim.steps
    fill = {name.split("/")[1]: share for name, share in numbers.items() if name.startswith("memory_fill/")}
    empty = [name for name, share in fill.items() if share == 0]
    on = training.step > method.contrast_start
    begins = on and training.step - training.config.run.log_every <= method.contrast_start + 1
    if rank() == 0 and on and empty and (last or (begins and len(empty) == len(fill))):
        which = "all classes" if len(empty) == len(fill) else ", ".join(empty)
        print(
            f"warning: after step {training.step} of {steps} the memory of {which} is still empty, so there is no "
            f"contrast for it: try --remember adaptive, a lower --confidence or an earlier --memory-start",
            file=sys.stderr,
        )


def evaluate_all(session: Session) -> dict[str, Scores]:
    """Scores of the student and, where the method uses it, of the teacher."""
    training = session.training
    networks = {"student": training.learner}
    if training.config.method.uses_teacher:
        networks["teacher"] = training.teacher
    return evaluate(networks, session.validation, session.device, training.config.data.workers)


def best_logged(session: Session) -> dict[str, Scores]:
    """Scores of the best evaluation of the student, under its name."""
    scores = logged_scores(read_metrics(session.training.config.run.out), session.validation.classes)
    return {BEST: scores[BEST]} if scores else {}


# ---- the best student on the validation images, as the authors' code chooses it


class Selection:
    """The best evaluation of the student so far, and the step of the last improvement or restart.

    Args:
        records: the log up to now, if the run is resumed.
        patience: steps without a better evaluation after which to restart; 0: never.
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
        """Whether the last improvement or restart is too long ago."""
        return 0 < self.patience < step - self.since


def select(session: Session, selection: Selection, student: Scores) -> dict[str, float]:
    """Save the student if it is the best so far; restart from the best one if that was long ago; renew it at the end.

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


def restart(session: Session) -> None:
    """Give student and teacher the student's best weights; memory, momentum and learning rate stay as they are.

    The teacher gets the student's BatchNorm statistics too. That of the authors' code starts again from 0 and 1, which
    only an evaluation of the teacher would show.
    """
    state = without_memory(read_checkpoint(session.best_checkpoint)["training"]["learner"])
    session.training.learner.load_state_dict(state, strict=False)
    session.training.teacher.load_state_dict(state)


@torch.no_grad()
def renew(session: Session, batches: int) -> Scores:
    """Renew the BatchNorm statistics of the best student by ``batches`` forwards on plain unlabelled crops.

    It is written to ``renewed.pt``; the training itself does not change.

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
    return evaluate({"renewed": learner}, session.validation, session.device, training.config.data.workers)["renewed"]
