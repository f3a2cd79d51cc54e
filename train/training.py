"""The state of a training run: built from a configuration, saved to and restored from plain dictionaries."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pixcontrast import ContrastBranch
from pixcontrast.branch import rows_per_image
from train.config import FitConfig, MethodConfig
from train.models import Learner, SegmentationModel
from train.schedules import ClassWeights, poly_schedule


@dataclass
class Training:
    """All that a step reads and changes.

    Attributes:
        learner: student network with contrast branch; the branch holds the memory.
        teacher: moving average of the learner's parameters, with buffers of its own.
        step: steps taken so far.
    """

    config: FitConfig
    num_classes: int
    ignore_index: int
    learner: Learner
    teacher: Learner
    optimizer: Optimizer
    schedule: LRScheduler
    class_weights: ClassWeights
    step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, with the state of torch's global random generators."""
        return {
            "step": self.step,
            "learner": self.learner.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "class_weights": self.class_weights.state_dict(),
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, a result of :meth:`state_dict` with tensors on the CPU."""
        self.learner.load_state_dict(state["learner"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.class_weights.load_state_dict(state["class_weights"])
        self.step = state["step"]
        torch.set_rng_state(state["rng_cpu"])
        if torch.cuda.is_available() and len(state["rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng_cuda"])


def build_training(
    config: FitConfig,
    num_classes: int,
    ignore_index: int,
    num_labelled: int,
    num_unlabelled: int,
    device: torch.device | str = "cpu",
) -> Training:
    """Networks, optimiser and schedules at step 0, seeded by ``config.optim.seed``.

    Args:
        config: the whole configuration.
        num_classes: C.
        ignore_index: label of pixels that do not count.
        num_labelled: labelled images, which decide how many rows each may add to the memory.
        num_unlabelled: unlabelled images; with the batch sizes they decide the windows of the class weights.
        device: where to train.

    Raises:
        UserError: an unusable encoder or its weights.
    """
    torch.manual_seed(config.optim.seed)
    learner = build_learner(config, num_classes, ignore_index, num_labelled).to(device)
    to_channels_last(learner)
    teacher = copy.deepcopy(learner).requires_grad_(False)
    optimizer = build_optimizer(learner, config)
    semi_supervised = config.method.method != "supervised"
    class_weights = ClassWeights(
        num_classes,
        label_batches=max(1, num_labelled // config.data.labelled_batch),
        pseudo_batches=max(1, num_unlabelled // config.data.unlabelled_batch) if semi_supervised else 0,
        device=device,
    )
    schedule = poly_schedule(optimizer, config.optim.steps)
    return Training(config, num_classes, ignore_index, learner, teacher, optimizer, schedule, class_weights)


def build_learner(config: FitConfig, num_classes: int, ignore_index: int, num_labelled: int) -> Learner:
    """The network and, for the method ``contrast``, its branch. Arguments as in :func:`build_training`."""
    network = SegmentationModel(num_classes, config.model)
    if config.method.method != "contrast":
        return Learner(network)
    branch = build_branch(config.method, network.feature_channels, num_classes, ignore_index, num_labelled)
    return Learner(network, branch)


def to_channels_last(module: nn.Module) -> None:
    """Store the kernels of all convolutions channels last: their results follow, and CPU and GPU are faster so."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def build_branch(
    method: MethodConfig, in_channels: int, num_classes: int, ignore_index: int, num_labelled: int
) -> ContrastBranch:
    """The contrast branch on features of ``in_channels`` channels."""
    return ContrastBranch(
        in_channels,
        num_classes,
        dim=method.contrast_dim,
        capacity=method.memory_rows,
        variant=method.variant,
        ignore_index=ignore_index,
        threshold=method.confidence,
        quota=rows_per_image(num_labelled, method.memory_rows),
        loss_weight=method.contrast_weight,
    )


def build_optimizer(learner: nn.Module, config: FitConfig) -> Optimizer:
    """SGD with momentum or AdamW over every trainable tensor, in one group, all with weight decay, as in the paper."""
    parameters = [p for p in learner.parameters() if p.requires_grad]
    optim = config.optim
    if optim.optimizer == "adamw":
        return AdamW(parameters, lr=optim.lr, weight_decay=optim.weight_decay)
    return SGD(parameters, lr=optim.lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
