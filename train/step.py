"""One training step of Alonso et al., ICCV 2021, on one page."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from train.augment import augment
from train.contrast import QueueBranch, adaptive_labels, watched
from train.data.batches import Batch
from train.distributed import average_gradients, average_statistics, rank
from train.losses import entropy_loss, pseudo_label_loss, supervised_loss
from train.models import Learner
from train.networks.base import resize
from train.schedules import ema_decay, pseudo_ramp
from train.session import Training
from train.streams import seed_for


def training_step(
    t: Training, labelled: Batch, unlabelled: Batch | None, watch: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Take one step: pseudo-labels, student forwards, losses, memory, contrast, optimiser, teacher.

    Args:
        t: the training, changed in place; ``t.step`` is incremented.
        labelled: images and labels.
        unlabelled: images, whose labels are not read; None for a method without.
        watch: gets numbers about the contrast, see :func:`train.contrast.watched`; the step itself stays the same.

    Returns:
        the weighted losses and their sum ``total`` as detached scalars, without synchronisation. With several
        processes, each takes its part of the batch, and the mean over the ranks is the loss of the whole batch.
    """
    m, o, i, branch = t.config.method, t.config.optim, t.step, t.learner.branch
    late = i > m.contrast_start
    target = not t.from_source(i)  # only the target domain is counted for the class weights and stored in the memory
    t.learner.train()
    t.teacher.train(m.teacher_mode == "train")
    losses: dict[str, Tensor] = {}

    # Labelled images: weak augmentation. Classes are counted before it.
    images, labels = to_float(labelled[0]), labelled[1]
    if target:
        t.class_weights.count_labels(labels)
    draw(t, "labelled views")
    images, labels, _ = augment(images, labels, None, t.weak, **mixing(t, True))
    if target:
        t.target_labels = labels

    # Unlabelled images: the teacher labels the plain crop, the student will see two strong views of it.
    if unlabelled is not None:
        plain = to_float(unlabelled[0])
        draw(t, "teacher of unlabelled")
        pseudo, confidence = pseudo_labels(t.teacher, plain)
        if target or m.variant == "paper":
            t.class_weights.count_pseudo(pseudo)
        draw(t, "unlabelled views")
        views = [augment(plain, pseudo, confidence, t.strong, **mixing(t, late)) for _ in range(2)]
        strong, pseudo, confidence = (torch.cat(parts) for parts in zip(*views, strict=True))

    balance = m.class_weights and late
    alpha = t.class_weights.weights() if balance else torch.ones(t.num_classes, device=images.device)

    # Student: unlabelled views, then labelled images; two forwards, so that BatchNorm does not mix them.
    if unlabelled is not None:
        draw(t, "student of unlabelled")
        strong_logits, strong_features = t.learner.in_parts(strong, o.accumulate)
        strong_logits = resize(strong_logits, strong.shape[-2:])
        error = pseudo_label_loss(strong_logits, pseudo, confidence, alpha, t.ignore_index, m.confidence_power)
        losses["pseudo"] = m.pseudo_weight * pseudo_ramp(i, m.ramp, m.ramp_shape) * error
        losses["entropy"] = m.entropy_weight * entropy_loss(strong_logits, pseudo, t.ignore_index)
    draw(t, "student of labelled")
    logits, features = t.learner.in_parts(images, o.accumulate)
    error = supervised_loss(resize(logits, images.shape[-2:]), labels, alpha, t.ignore_index)
    losses["supervised"] = m.supervised_weight * error

    # The memory stores labelled pixels that the teacher classifies correctly; the contrast compares all pixels with it.
    with t.learner.autocast():
        draw(t, "anchors")
        if branch is not None and i > m.memory_start and target and branch.capacity > 0:
            draw(t, "teacher of labelled")
            with torch.no_grad():
                scores, teacher_features = t.teacher(images)
            if m.remember == "adaptive":
                good = adaptive_labels(teacher_features, scores, labels, m.confidence, t.ignore_index)
                branch.remember(teacher_features, None, good, teacher=t.teacher.branch)
            else:
                branch.remember(teacher_features, scores, labels, teacher=t.teacher.branch)
        if branch is not None and late:
            stale = m.source_steps == "last" and t.target_labels is not None  # as their last version has it
            # For infonce, anchors are hard where the student is wrong; the positive objective takes all pixels.
            infonce = m.objective == "infonce"
            given = t.target_labels if stale else labels
            losses["contrast_labelled"] = branch(features, given, logits.argmax(1) if infonce else None)
            if unlabelled is not None:
                predicted = strong_logits.argmax(1) if infonce else None
                losses["contrast_unlabelled"] = branch(strong_features, pseudo, predicted)
        if isinstance(branch, QueueBranch) and i > m.memory_start and target:
            branch.fill(features, labels)  # after the loss, in which its own rows would be the nearest

    if watch is not None:
        watch |= watched(t.learner.network, losses, features, labels)
        if unlabelled is not None:
            known = pseudo != t.ignore_index
            watch["agreement"] = ((strong_logits.argmax(1) == pseudo) & known).sum() / known.sum()
    total = torch.stack(list(losses.values())).sum()
    t.optimizer.zero_grad()
    total.backward()
    average_gradients(t.learner)
    t.optimizer.step()
    t.schedule.step()
    update_teacher(t.teacher, t.learner, ema_decay(i, o.steps, o.ema, o.ema_warmup, o.ema_schedule), m.teacher_mode)
    average_statistics(t.learner, t.teacher)
    t.step += 1
    return {name: loss.detach() for name, loss in losses.items()} | {"total": total.detach()}


def draw(t: Training, purpose: str) -> None:
    """Start the random numbers of one purpose in this step."""
    seed_for(t.config.optim.seed, purpose, t.step, rank())


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in 0..1; cached features as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def mixing(t: Training, classmix: bool) -> dict[str, Any]:
    """Options of the augmentation that depend on the classes, and whether ClassMix is on."""
    return {
        "ignore_index": t.ignore_index,
        "num_classes": t.num_classes,
        "classmix": classmix,
        "background": t.config.method.mix_background,
    }


@torch.no_grad()
def pseudo_labels(teacher: Learner, images: Tensor) -> tuple[Tensor, Tensor]:
    """Most probable class [B, H, W] int64 of every pixel of ``images`` [B, 3, H, W] and its probability [B, H, W]."""
    probabilities = resize(teacher(images)[0], images.shape[-2:]).softmax(1)
    confidence, classes = probabilities.max(1)
    return classes, confidence


@torch.no_grad()
def update_teacher(teacher: Learner, learner: Learner, decay: float, mode: str = "train") -> None:
    """``teacher = decay * teacher + (1 - decay) * learner`` for the parameters; buffers stay the teacher's own.

    In mode ``"eval"`` the teacher has no statistics of its own, and takes those of the learner's BatchNorm layers.
    Only the averaging function of ``swa_utils`` is used: its ``AveragedModel`` would change the buffers too.
    """
    get_ema_multi_avg_fn(decay)(list(teacher.parameters()), list(learner.parameters()), 0)
    if mode == "eval":
        statistics = dict(learner.named_buffers())
        for name, own in teacher.named_buffers():
            own.copy_(statistics[name])
