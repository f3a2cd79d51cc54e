"""The contrastive loss and the memory of SemiSeg-Contrastive, the code of Alonso et al. (ICCV 2021), under its names.

Change ``from contrastive_losses import ...`` and ``from utils.feature_memory import ...`` to this module. The attention
networks stay those of the model: ``contrastive_class_selector_<c>`` and ``contrastive_class_selector_memory<c>``. They
run class by class, so this waits for the device; :class:`pixcontrast.ContrastBranch` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..branch import rows_per_image
from ..functional import positive_contrast
from ..loss import VARIANTS
from ..memory import ClassMemory
from ..reference import MIN_ROWS, accumulation_dtype, unit_rows


class MemoryRows(Sequence):
    """``FeatureMemory.memory``: item c reads as in the released code, ``None`` or a numpy array ``[N_c, D]``.

    The array is a copy, newest rows first. The loss takes the tensors of ``bank`` instead of reading items.
    """

    def __init__(self, bank: ClassMemory) -> None:
        self.bank = bank

    def __len__(self) -> int:
        return self.bank.num_classes

    def __getitem__(self, c: Any) -> Any:
        if isinstance(c, slice):
            return [self[k] for k in range(*c.indices(len(self)))]
        count, cursor = int(self.bank.counts[c]), int(self.bank.cursors[c])
        if count == 0:
            return None
        newest_first = (cursor - 1 - np.arange(count)) % self.bank.capacity
        return self.bank.rows[c].cpu().numpy()[newest_first]


class FeatureMemory:
    """Their memory bank: the newest ``memory_per_class`` rows of each class.

    It differs from theirs in that rows are stored normalised (the loss normalises anyway) and on the device of the
    features, and in that not even the first batch may exceed ``memory_per_class``.

    Args:
        num_samples: labelled images.
        dataset: ``"cityscapes"`` or ``"pascal_voc"``.
        memory_per_class: rows of each class.
        feature_size: D.
        n_classes: C.
        variant: ``"released"`` keeps, of a batch with too many rows of a class, the lowest scored ones, takes scores of
            rows of any norm, and allows a third of ``n_classes`` times as many rows for VOC; ``"paper"`` keeps the
            highest, scores unit rows, and has no such factor.

    Raises:
        ValueError: an unknown dataset or variant, or sizes below one.
    """

    def __init__(
        self,
        num_samples: int,
        dataset: str,
        memory_per_class: int = 2048,
        feature_size: int = 256,
        n_classes: int = 19,
        *,
        variant: str = "released",
    ) -> None:
        if dataset not in ("cityscapes", "pascal_voc"):
            raise ValueError(f'FeatureMemory: dataset must be "cityscapes" or "pascal_voc", got {dataset!r}')
        _check_variant("FeatureMemory", variant)
        self.num_samples, self.memory_per_class = num_samples, memory_per_class
        self.feature_size, self.n_classes, self.variant = feature_size, n_classes, variant
        voc_classes = n_classes if dataset == "pascal_voc" and variant == "released" else None
        self.per_class_samples_per_image = rows_per_image(num_samples, memory_per_class, voc_classes)
        self.bank = ClassMemory(n_classes, memory_per_class, feature_size)

    @property
    def memory(self) -> MemoryRows:
        return MemoryRows(self.bank)

    @torch.no_grad()
    def add_features_from_sample_learned(
        self, model: nn.Module, features: Tensor, class_labels: Tensor, batch_size: int
    ) -> None:
        """Add rows of a batch; of a class with more than ``batch_size * per_class_samples_per_image``, the ranked ones.

        Args:
            model: has ``contrastive_class_selector_<c>``, which scores rows ``[M, D]`` to ``[M, 1]``; it is called for
                the classes that have too many.
            features: ``[P, D]``.
            class_labels: ``[P]`` of any integer or float dtype; rows of no class are left out.
            batch_size: images that the rows come from.
        """
        features = features.detach()
        labels = class_labels.detach().long().to(features.device)
        quota = batch_size * self.per_class_samples_per_image
        scores = features.new_zeros(labels.shape, dtype=torch.float32)
        for c, members in enumerate(_by_class(labels, self.n_classes)):
            if len(members) > quota:
                score = _logits(model, f"contrastive_class_selector_{c}", self._scored(features[members])).float()
                scores[members] = score if self.variant == "paper" else -score
        self.bank.to(features.device)
        self.bank.push(features, labels, scores, quota)

    def _scored(self, rows: Tensor) -> Tensor:
        return unit_rows(rows) if self.variant == "paper" else rows


def contrastive_class_to_class_learned_memory(
    model: nn.Module,
    features: Tensor,
    class_labels: Tensor,
    num_classes: int,
    memory: Sequence[np.ndarray | None] | FeatureMemory | ClassMemory,
    *,
    variant: str = "released",
    backend: str = "auto",
) -> Tensor:
    """Class-wise contrast of features with the memory, both weighted by the model's attention networks.

    It differs from theirs in that the result is always a tensor and connected to the graph, and in that the networks of
    the memory are not run in the released variant, where their output cancels: they get no gradient at all, so no
    weight decay either.

    Args:
        model: has ``contrastive_class_selector_<c>`` and, for ``variant="paper"``,
            ``contrastive_class_selector_memory<c>``, each from rows ``[M, D]`` to logits ``[M, 1]``.
        features: ``[P, D]``, after projection and prediction head.
        class_labels: ``[P]`` of any integer or float dtype; rows of no class are left out.
        num_classes: C, which the sum over the classes is divided by.
        memory: for each class rows ``[N_c, D]`` or ``None``, as ``FeatureMemory.memory`` has it, or a memory itself.
            Classes with fewer than two features or two rows add nothing.
        variant: ``"released"``: all memory rows weigh the same, and the selectors of the features see rows of any norm;
            ``"paper"``: memory rows are weighted too, and both see unit rows.
        backend: see :class:`pixcontrast.PixelContrastLoss`.

    Returns:
        A scalar in float32 (float64 for float64 features). The gradient reaches ``features``, which the selectors do
        not push, and the selectors.

    Raises:
        ValueError, TypeError: arguments that do not fit, named.
    """
    _check_variant("contrastive_class_to_class_learned_memory", variant)
    labels = class_labels.long()
    labels = torch.where((labels >= 0) & (labels < num_classes), labels, -1)
    queue, counts = _queue_and_counts(memory, num_classes, features)
    weight_logits = torch.zeros(labels.shape, dtype=accumulation_dtype(features.dtype), device=features.device)
    queue_weight_logits = torch.zeros_like(queue[..., 0]) if variant == "paper" else None
    constant = features.detach()
    for c, (members, stored) in enumerate(zip(_by_class(labels, num_classes), counts.tolist(), strict=True)):
        if len(members) < MIN_ROWS or stored < MIN_ROWS:
            continue
        rows = constant[members] if variant == "released" else unit_rows(constant[members])
        weight_logits[members] = _logits(model, f"contrastive_class_selector_{c}", rows).to(weight_logits.dtype)
        if queue_weight_logits is not None:
            rows = unit_rows(queue[c, :stored]).to(features.dtype)
            logits = _logits(model, f"contrastive_class_selector_memory{c}", rows)
            queue_weight_logits[c, :stored] = logits.to(queue_weight_logits.dtype)
    return positive_contrast(
        features,
        labels,
        queue,
        queue_counts=counts,
        weight_logits=weight_logits,
        queue_weight_logits=queue_weight_logits,
        ignore_index=-1,
        backend=backend,
    ).loss


def _queue_and_counts(memory: Any, num_classes: int, features: Tensor) -> tuple[Tensor, Tensor]:
    """The memory as ``[C, N, D]`` and ``[C]``, on the device of the features."""
    if isinstance(memory, FeatureMemory | MemoryRows):
        memory = memory.bank
    if isinstance(memory, ClassMemory):
        return memory.rows[:num_classes].to(features.device), memory.counts[:num_classes].to(features.device)
    options: dict[str, Any] = {"dtype": accumulation_dtype(features.dtype), "device": features.device}
    nothing = torch.zeros(0, features.shape[1], **options)
    rows = [nothing if memory[c] is None else torch.as_tensor(memory[c], **options) for c in range(num_classes)]
    return pad_sequence(rows, batch_first=True), torch.tensor([len(r) for r in rows], device=features.device)


def _by_class(labels: Tensor, num_classes: int) -> list[Tensor]:
    """Positions of each class in ``labels [P]``; waits for the device, once."""
    group = torch.where((labels >= 0) & (labels < num_classes), labels, num_classes)
    sizes = torch.bincount(group, minlength=num_classes + 1).tolist()
    return list(torch.argsort(group, stable=True).split(sizes))[:num_classes]


def _logits(model: nn.Module, name: str, rows: Tensor) -> Tensor:
    return getattr(model, name)(rows)[:, 0]


def _check_variant(where: str, variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"{where}: variant must be one of {VARIANTS}, got {variant!r}")
