"""The state of a training run: built from a configuration, saved to and restored from plain dictionaries."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pixcontrast import ContrastBranch
from pixcontrast.branch import rows_per_image
from pixcontrast.distributed import world_size
from train.augment import STRONG, WEAK, AugmentConfig
from train.config import FitConfig, MethodConfig
from train.distributed import gather, rank
from train.errors import UserError
from train.models import Learner, SegmentationModel
from train.networks import MEANS, DeepLab, build_network, load_weights
from train.optimizer import build_optimizer
from train.schedules import ClassWeights, from_source, poly_schedule


@dataclass
class Training:
    """All that a step reads and changes; of several processes, each has one, and networks and optimiser are the same.

    Attributes:
        learner: student network with contrast branch; the branch holds the memory.
        teacher: moving average of the learner's parameters, with buffers of its own.
        weak, strong: augmentation of the labelled and of the unlabelled images.
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
    weak: AugmentConfig
    strong: AugmentConfig
    step: int = 0

    def from_source(self, step: int) -> bool:
        """Whether the labelled images of ``step`` (from 0) are of the source domain, if there is one."""
        method, steps = self.config.method, self.config.optim.steps
        adapts = self.config.data.source_root is not None
        return adapts and from_source(step, steps, method.source_steps, method.last_steps)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, with the state of torch's global random generators.

        Of several processes, which must all call it, that of rank 0 is whole: ``other_ranks`` has what differs there.
        """
        own = self._state_of_rank()
        return {
            "step": self.step,
            "learner": self.learner.state_dict(),
            "teacher": self.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "class_weights": self.class_weights.state_dict(),
            "rng_cpu": own["rng_cpu"],
            "rng_cuda": own["rng_cuda"],
            "other_ranks": gather(own)[1:],
        }

    def _state_of_rank(self) -> dict[str, Any]:
        """What another rank has otherwise: random states and, unless it is gathered, the memory."""
        state = {
            "rng_cpu": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        if self.learner.branch is not None and self.learner.branch.memory.sync != "gather":
            state["memory"] = {name: part.cpu() for name, part in self.learner.branch.memory.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state``, a result of :meth:`state_dict` on rank 0 with tensors on the CPU."""
        others = state.get("other_ranks", [])
        if len(others) + 1 != world_size():
            raise UserError(
                f"the run was trained by {len(others) + 1} processes, this is one of {world_size()}: start as many"
            )
        own = state if rank() == 0 else others[rank() - 1]
        self.learner.load_state_dict(state["learner"])
        self.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.class_weights.load_state_dict(state["class_weights"])
        self.step = state["step"]
        if self.learner.branch is not None and "memory" in own:
            self.learner.branch.memory.load_state_dict(own["memory"])
        torch.set_rng_state(own["rng_cpu"])
        if torch.cuda.is_available() and len(own["rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(own["rng_cuda"])


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
    if config.model.sync_batchnorm and world_size() > 1:
        if torch.device(device).type != "cuda":
            raise UserError(f"--sync-batchnorm: PyTorch has it for CUDA, not for {device}; leave it out")
        learner.network = synchronise_batchnorm(learner.network)
    to_channels_last(learner)
    teacher = copy.deepcopy(learner).requires_grad_(False)
    optimizer = build_optimizer(learner, config.optim)
    semi_supervised = config.method.method != "supervised"
    class_weights = ClassWeights(
        num_classes,
        label_batches=max(1, num_labelled // config.data.labelled_batch),
        pseudo_batches=max(1, num_unlabelled // config.data.unlabelled_batch) if semi_supervised else 0,
        device=device,
    )
    schedule = poly_schedule(optimizer, config.optim.steps)
    views = build_augmentation(config.method)
    return Training(config, num_classes, ignore_index, learner, teacher, optimizer, schedule, class_weights, *views)


def build_learner(config: FitConfig, num_classes: int, ignore_index: int, num_labelled: int) -> Learner:
    """The network and, for the method ``contrast``, its branch. Arguments as in :func:`build_training`."""
    network = build_segmentation(config, num_classes)
    if config.method.method != "contrast":
        return Learner(network, precision=config.optim.precision)
    branch = build_branch(config.method, network.feature_channels, num_classes, ignore_index, num_labelled)
    return Learner(network, branch, config.optim.precision)


def build_segmentation(config: FitConfig, num_classes: int) -> SegmentationModel | DeepLab:
    """The network with the weights it starts from; prints which of a paper's network were loaded.

    Raises:
        UserError: an unusable encoder, or weights that are not there or do not fit.
    """
    model = config.model
    if model.network == "timm":
        return SegmentationModel(num_classes, model)
    mean = MEANS.get(config.data.dataset, MEANS["voc"])  # that of VOC is nearly that of ImageNet
    network = build_network(model.network, num_classes, mean, model.branches)
    if model.pretrained:
        print(load_weights(network, model.weights), flush=True)
    return network


def synchronise_batchnorm(network: nn.Module) -> Any:
    """``network`` with the same layers, but statistics over the batches of all ranks in training mode."""
    # torch's own conversion would drop the activation that timm's layers have inside
    return convert_sync_batchnorm(network)


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
        quota=rows_per_image(num_labelled, method.memory_rows, num_classes if method.voc_quota else None),
        loss_weight=method.contrast_weight,
        sync=method.memory_sync,
    )


def build_augmentation(method: MethodConfig) -> tuple[AugmentConfig, AugmentConfig]:
    """Augmentation of the labelled and of the unlabelled images."""
    weak = replace(WEAK, classmix=method.labelled_classmix, jitter_strength=method.labelled_jitter)
    strong = replace(
        STRONG,
        classmix=method.unlabelled_classmix,
        jitter_strength=method.unlabelled_jitter,
        blur_horizontally=method.blur == "horizontal",
    )
    return weak, strong
