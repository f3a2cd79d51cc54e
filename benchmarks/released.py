"""The functions that the authors of the papers published, imported from checkouts of their repositories.

``git clone https://github.com/Shathe/SemiSeg-Contrastive`` and ``https://github.com/tfzhou/ContrastiveSeg``, then
``python -m benchmarks --semiseg SemiSeg-Contrastive --contrastiveseg ContrastiveSeg``.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import infonce, sampling
from .infonce import InfoNCE
from .positive import Positive
from .problem import Contender, Problem, Step, differentiate
from .sampling import Sampling
from .selectors import Selectors, class_selectors

NAME = "released code"


@dataclass(frozen=True)
class Checkouts:
    """Folders of the released repositories, where there are any."""

    semiseg: Path | None = None
    contrastiveseg: Path | None = None

    def contender(self, problem: Problem) -> Contender | None:
        """The released function for this problem; ``None`` without a checkout, or if it computes something else."""
        if isinstance(problem, Positive) and self.semiseg and problem.queue_weight_logits is None:
            return _released_on(self.semiseg, positive_step)
        if isinstance(problem, Selectors) and self.semiseg and problem.released and not problem.autocast:
            return _released_on(self.semiseg, selectors_step)
        if isinstance(problem, InfoNCE) and self.contrastiveseg and problem.dtype == torch.float32:
            return _released_on(self.contrastiveseg, infonce_step)
        if isinstance(problem, Sampling) and self.contrastiveseg:
            return _released_on(self.contrastiveseg, sampling_step)
        return None


def _released_on(folder: Path, loss_of: Callable[[Path, Any], Callable[[Any], Tensor]]) -> Contender:
    def contender(problem: Problem) -> Step:
        loss = loss_of(folder, problem)

        def step() -> dict[str, Tensor]:
            with cuda_calls_stay(problem):
                return differentiate(loss, problem)

        return step

    return contender


@contextlib.contextmanager
def cuda_calls_stay(problem: Problem) -> Iterator[None]:
    """Lets ``.cuda()``, which the released functions call throughout, do nothing for problems on the CPU."""
    if next(iter(problem.leaves.values())).is_cuda:
        yield
        return
    with mock.patch.object(Tensor, "cuda", lambda self, *_, **__: self):
        yield


def _import(folder: Path, name: str) -> ModuleType:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; pass a checkout of the released repository")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    with warnings.catch_warnings(action="ignore"):
        return importlib.import_module(name)


class _Model:
    """Stands for the segmentation network, of which the released function wants the selectors by name."""

    def __init__(self, rows: Callable[[Tensor, int], Tensor], memory: Callable[[Tensor, int], Tensor]) -> None:
        self.selectors = {"contrastive_class_selector_": rows, "contrastive_class_selector_memory": memory}

    def __getattr__(self, name: str) -> Callable[[Tensor], Tensor]:
        prefix = name.rstrip("0123456789")
        selector, c = self.selectors[prefix], int(name.removeprefix(prefix))
        return lambda rows: selector(rows, c)[:, None]


def positive_step(folder: Path, problem: Positive) -> Callable[[Positive], Tensor]:
    function = _import(folder, "contrastive_losses").contrastive_class_to_class_learned_memory
    memory = list(problem.queue.cpu().numpy())  # the released memory is kept in NumPy

    def given(rows: Tensor, c: int) -> Tensor:
        return problem.weight_logits[problem.labels == c]

    model = _Model(given, lambda rows, c: rows.new_zeros(len(rows)))
    return lambda p: function(model, p.rows, p.labels, len(memory), memory)


def selectors_step(folder: Path, problem: Selectors) -> Callable[[Selectors], Tensor]:
    function = _import(folder, "contrastive_losses").contrastive_class_to_class_learned_memory
    memory = list(problem.memory.cpu().numpy())

    def loss(p: Selectors) -> Tensor:
        model = _Model(class_selectors(p.branch.select_features), class_selectors(p.branch.select_memory))
        return function(model, p.rows, p.labels, len(memory), memory)

    return loss


class _Configer:
    """Answers what the released loss asks its configuration."""

    def __init__(self, temperature: float, base_temperature: float, max_samples: int, max_views: int) -> None:
        self.contrast = {"temperature": temperature, "base_temperature": base_temperature}
        self.contrast |= {"max_samples": max_samples, "max_views": max_views}

    def get(self, _: str, key: str) -> float:
        return self.contrast[key]

    def exists(self, *_: str) -> bool:
        return False


def _criterion(folder: Path, module: str, configer: _Configer) -> Any:
    return _import(folder, f"lib.loss.{module}").PixelContrastLoss(configer)


def infonce_step(folder: Path, problem: InfoNCE) -> Callable[[InfoNCE], Tensor]:
    """Their loss of given anchors and a queue; one view of each, which is one "class" of theirs."""
    configer = _Configer(infonce.TEMPERATURE, infonce.BASE_TEMPERATURE, len(problem.anchors), 1)
    criterion = _criterion(folder, "loss_contrast_mem", configer)
    return lambda p: criterion._contrastive(p.anchors[:, None], p.labels.float(), p.queue)


def sampling_step(folder: Path, problem: Sampling) -> Callable[[Sampling], Tensor]:
    configer = _Configer(sampling.TEMPERATURE, sampling.BASE_TEMPERATURE, problem.max_samples, problem.max_views)
    criterion = _criterion(folder, "loss_contrast", configer)
    if problem.contrast:
        return lambda p: criterion(p.features, p.labels, p.predict)

    def loss(p: Sampling) -> Tensor:
        rows = p.features.permute(0, 2, 3, 1).contiguous().flatten(1, 2)
        anchors, labels = criterion._hard_anchor_sampling(rows, p.cells.flatten(1), p.predict.flatten(1))
        return p.loss_of(anchors.flatten(0, 1), labels.long().repeat_interleave(anchors.shape[1]))

    return loss
