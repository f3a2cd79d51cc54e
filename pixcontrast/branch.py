"""The contrastive module of the paper for any segmentation network: heads, selectors, memory and loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import check_label_values
from .heads import ClassSelectors, MLPHead
from .loss import PixelContrastLoss
from .memory import ClassMemory
from .reference import as_rows, unit_rows
from .select import confident, labels_at, logits_at
from .stats import ContrastStats

VARIANTS = ("paper", "released")


def rows_per_image(num_labelled: int, capacity: int = 256, voc_classes: int | None = None) -> int:
    """Rows that one image may add to one class of the memory.

    ``max(1, round(capacity / num_labelled))`` as the paper has it, so that the memory spans the labelled set. The
    released VOC script multiplies by a third of the classes: pass ``voc_classes=21`` for that.
    """
    rows = round(capacity / num_labelled)
    if voc_classes is not None:
        rows = int(voc_classes / 3 * rows)
    return max(1, rows)


class ContrastBranch(nn.Module):
    """Projects pixels, remembers good ones of each class, and pulls the others of that class towards them.

    ::

        branch = ContrastBranch(in_channels=2048, num_classes=19)
        branch.remember(teacher_features, teacher_logits, labels, teacher=teacher_branch)
        loss = branch(student_features, labels)

    Args:
        in_channels: channels of the feature maps.
        num_classes: C.
        dim: width of projection, prediction and memory.
        capacity: memory rows of each class.
        variant: ``"paper"``, or ``"released"`` to repeat the authors' code: the memory rows all weigh the same, the
            *lowest* scored rows are remembered, scores come from projections instead of predictions, feature selectors
            see rows of any norm, and ``quota`` counts for the whole batch instead of for each image.
        ignore_index: label of pixels that take no part.
        threshold: a pixel is remembered only if the teacher gives its label a probability above this.
        quota: rows that one image may add to one class of the memory, see :func:`rows_per_image`; ``None`` for no limit
            but the capacity.
        loss_weight: factor of the loss; set here rather than outside it saves one pass over the gradient.
        sync: of the memory, see :class:`ClassMemory`.
        backend: see :class:`PixelContrastLoss`.

    Raises:
        ValueError: an unknown variant, sizes below one, a threshold outside [0, 1).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        dim: int = 256,
        capacity: int = 256,
        variant: str = "paper",
        ignore_index: int = 255,
        threshold: float = 0.95,
        quota: int | None = None,
        loss_weight: float = 1.0,
        sync: str = "local",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"ContrastBranch: variant must be one of {VARIANTS}, got {variant!r}")
        if in_channels < 1:
            raise ValueError(f"ContrastBranch: in_channels must be at least 1, got {in_channels}")
        if not 0 <= threshold < 1:
            raise ValueError(f"ContrastBranch: threshold must be in [0, 1), got {threshold}")
        if quota is not None and quota < 1:
            raise ValueError(f"ContrastBranch: quota must be at least 1 or None, got {quota}")
        self.variant, self.ignore_index = variant, ignore_index
        self.threshold, self.quota = threshold, quota
        self.project = MLPHead(in_channels, dim)
        self.predict = MLPHead(dim, dim)
        self.select_features = ClassSelectors(num_classes, dim)
        self.select_memory = ClassSelectors(num_classes, dim)
        self.memory = ClassMemory(num_classes, capacity, dim, sync=sync)
        self.criterion = PixelContrastLoss(
            objective="positive", ignore_index=ignore_index, loss_weight=loss_weight, backend=backend
        )

    @torch.no_grad()
    def remember(self, features: Tensor, logits: Tensor, labels: Tensor, teacher: ContrastBranch | None = None) -> None:
        """Push the pixels that the teacher classifies rightly and surely into the memory.

        Args:
            features: ``[B, in_channels, h, w]`` of the teacher.
            logits: ``[B, C, h', w']`` of the teacher, at feature, label, or any other resolution.
            labels: ``[B, H, W]`` int64.
            teacher: the moving average of this branch, whose heads project and rank the pixels; ``None``: this one's.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, named.
        """
        self._check(features, labels, "remember")
        if logits.dim() != 4 or logits.shape[:2] != (labels.shape[0], self.memory.num_classes):
            raise ValueError(
                f"ContrastBranch.remember: logits must be [B={labels.shape[0]}, C={self.memory.num_classes}, h', w'], "
                f"got {tuple(logits.shape)}"
            )
        heads = self if teacher is None else teacher
        size = (features.shape[2], features.shape[3])
        label = labels_at(labels, size)
        check_label_values(label, self.memory.num_classes, self.ignore_index, "ContrastBranch.remember")
        sure = confident(logits_at(logits, size, (labels.shape[1], labels.shape[2])), label, self.threshold)
        label = torch.where(sure & (label != self.ignore_index), label, -1)
        flat = label.reshape(-1)
        valid = flat >= 0
        projected = heads.project(self._rows(features, valid), valid)
        ranked = projected if self.variant == "released" else heads.predict(projected, valid)
        scores = heads.select_features(heads.selector_input(ranked), flat)
        batch = label.shape[0]
        if self.variant == "released":
            self.memory.push(projected, flat, -scores, None if self.quota is None else self.quota * batch)
            return
        images = torch.arange(batch, device=label.device)[:, None, None].expand_as(label).reshape(-1)
        self.memory.push(projected, flat, scores, self.quota, images, batch)

    def forward(
        self, features: Tensor, labels: Tensor, return_stats: bool = False
    ) -> Tensor | tuple[Tensor, ContrastStats]:
        """Class-wise contrast of all labelled pixels with the memory.

        Args:
            features: ``[B, in_channels, h, w]`` of the student.
            labels: ``[B, H, W]`` int64, true or pseudo-labels.
            return_stats: also return :class:`ContrastStats`.

        Returns:
            A scalar, connected to the graph also where nothing takes part.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, named.
        """
        self._check(features, labels, "forward")
        label = labels_at(labels, (features.shape[2], features.shape[3])).reshape(-1)
        valid = (label >= 0) & (label < self.memory.num_classes) & (label != self.ignore_index)
        rows = self.predict(self.project(self._rows(features, valid), valid), valid)
        # selectors learn what to weigh; they do not push the features (their input is detached)
        weights = self.select_features(self.selector_input(rows.detach()), torch.where(valid, label, -1))
        queue_weights = None if self.variant == "released" else self._memory_weights()
        return self.criterion(
            rows, label, queue=self.memory, weights=weights, queue_weights=queue_weights, return_stats=return_stats
        )

    def selector_input(self, rows: Tensor) -> Tensor:
        """What the feature selectors see: unit rows; rows of any norm in the released variant."""
        return rows if self.variant == "released" else unit_rows(rows)

    def _memory_weights(self) -> Tensor:
        """Weight logits ``[C, N]`` of the memory rows."""
        memory = self.memory
        classes = torch.arange(memory.num_classes, device=memory.rows.device)[:, None]
        filled = torch.arange(memory.capacity, device=memory.rows.device) < memory.counts[:, None]
        labels = torch.where(filled, classes, -1)
        return self.select_memory(memory.rows.flatten(0, 1), labels.reshape(-1)).view_as(labels)

    def _rows(self, features: Tensor, valid: Tensor) -> Tensor:
        """Pixels as rows ``[P, in_channels]``, zero where they take no part (there they may be anything, NaN too)."""
        return torch.where(valid[:, None], as_rows(features), 0)

    def _check(self, features: Tensor, labels: Tensor, where: str) -> None:
        width = self.project.first.in_features
        if features.dim() != 4 or features.shape[1] != width:
            raise ValueError(
                f"ContrastBranch.{where}: features must be [B, {width}, h, w], got {tuple(features.shape)}"
            )
        if labels.dim() != 3 or labels.shape[0] != features.shape[0]:
            raise ValueError(
                f"ContrastBranch.{where}: labels must be [B={features.shape[0]}, H, W], got {tuple(labels.shape)}"
            )
        if labels.dtype != torch.int64:
            raise TypeError(f"ContrastBranch.{where}: labels must be int64, got {labels.dtype}")
        if labels.device != features.device:
            raise ValueError(
                f"ContrastBranch.{where}: labels are on {labels.device}, features on {features.device}; move one"
            )
