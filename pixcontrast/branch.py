"""The contrastive module of the paper for any segmentation network: heads, selectors, memory and loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from .checks import check_float, check_label_values, check_maps, check_predict, readable
from .functional import gather_pixels, unit_rows
from .heads import ClassSelectors, MLPHead
from .loss import PixelContrastLoss
from .loss_infonce import InfoNCELoss
from .memory import ClassMemory
from .ops.class_order import Segments, class_order, valid_labels_at
from .reference import MIN_ROWS
from .select import Anchors, all_anchors, confident, labels_at, logits_at
from .stats import ContrastStats, InfoNCEStats


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
    """Projects pixels, remembers good ones of each class, and contrasts the others with them.

    ``objective="positive"`` (Alonso et al., ICCV 2021): every labelled pixel is projected, predicted, weighed and drawn
    towards the memory of its class::

        branch = ContrastBranch(in_channels=2048, num_classes=19)
        branch.remember(teacher_features, teacher_logits, labels, teacher=teacher_branch)
        loss = branch(student_features, labels)

    ``objective="infonce"`` (Wang et al., ICCV 2021): hard and easy anchors are drawn first, and only they are
    projected, normalised and contrasted, with each other or, with ``capacity``, with the memory::

        branch = ContrastBranch(in_channels=720, num_classes=19, objective="infonce", max_samples=1024)
        loss = branch(features, labels, predict=logits.argmax(1))

    Args:
        in_channels: channels of the feature maps.
        num_classes: C.
        objective: ``"positive"`` or ``"infonce"``.
        dim: width of projection, prediction and memory.
        capacity: memory rows of each class; ``None``: 256 for positive, 0 (anchors against each other) for infonce.
        memory_dtype: storage of the memory rows. InfoNCE multiplies in this dtype: with ``torch.bfloat16``, or with
            ``torch.float16``, on tensor cores.
        variant: ``"paper"``, or ``"released"`` to repeat the authors' code. For positive: the memory rows all weigh the
            same, the *lowest* scored rows are remembered, scores come from projections instead of predictions, feature
            selectors see rows of any norm, and ``quota`` counts for the whole batch instead of for each image. For
            infonce: see :class:`PixelContrastLoss`.
        ignore_index: label of pixels that take no part.
        threshold: a pixel is remembered only if the logits give its label a probability above this.
        quota: rows that one image may add to one class of the memory, see :func:`rows_per_image`; ``None`` for no limit
            but the capacity.
        loss_weight: factor of the loss; set here rather than outside it saves one pass over the gradient.
        sync: of the memory, see :class:`ClassMemory`. For positive, unless it is ``"local"``, the class means run over
            the pixels of all ranks too, see ``across_ranks`` of :class:`PixelContrastLoss`: every rank must call the
            branch equally often. For infonce, ``"reduce"`` contrasts each rank's anchors with the rows of all ranks.
            The heads' BatchNorm keeps to the rows of its own rank.
        backend: see :class:`PixelContrastLoss`.
        temperature, base_temperature, max_samples, max_views: see :class:`PixelContrastLoss` (infonce).
        dense: project every valid pixel, as Wang et al. do, instead of the anchors alone (infonce). The same anchors
            are drawn; the head's BatchNorm then has the statistics of all pixels instead of those of the anchors,
            among which rare classes have a larger share.

    Raises:
        ValueError: an unknown option, sizes below one, a threshold outside [0, 1).
    """

    memory: ClassMemory  # infonce without capacity has none

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        objective: str = "positive",
        dim: int = 256,
        capacity: int | None = None,
        memory_dtype: torch.dtype = torch.float32,
        variant: str = "paper",
        ignore_index: int = 255,
        threshold: float = 0.95,
        quota: int | None = None,
        loss_weight: float = 1.0,
        sync: str = "local",
        backend: str = "auto",
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        max_samples: int = 1024,
        max_views: int = 100,
        dense: bool = False,
    ) -> None:
        super().__init__()
        if in_channels < 1 or num_classes < 1:
            raise ValueError(
                f"ContrastBranch: in_channels and num_classes must be at least 1, got {in_channels} and {num_classes}"
            )
        if not 0 <= threshold < 1:
            raise ValueError(f"ContrastBranch: threshold must be in [0, 1), got {threshold}")
        if quota is not None and quota < 1:
            raise ValueError(f"ContrastBranch: quota must be at least 1 or None, got {quota}")
        self.criterion = PixelContrastLoss(
            temperature,
            base_temperature,
            max_samples,
            max_views,
            ignore_index,
            variant,
            objective=objective,
            loss_weight=loss_weight,
            backend=backend,
            across_ranks=objective == "positive" and sync != "local",
        )
        self.objective, self.variant, self.ignore_index, self.backend = objective, variant, ignore_index, backend
        self.num_classes, self.threshold, self.quota, self.dense = num_classes, threshold, quota, dense
        self.project = MLPHead(in_channels, dim, backend)
        if objective == "positive":
            self.predict = MLPHead(dim, dim, backend)
            self.select_features = ClassSelectors(num_classes, dim, backend=backend)
            self.select_memory = ClassSelectors(num_classes, dim, backend=backend)
        self.capacity = (256 if objective == "positive" else 0) if capacity is None else capacity
        if self.capacity > 0 or objective == "positive":
            self.memory = ClassMemory(num_classes, self.capacity, dim, sync=sync, dtype=memory_dtype)

    @torch.no_grad()
    def remember(
        self,
        features: Tensor,
        logits: Tensor | None,
        labels: Tensor,
        teacher: ContrastBranch | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Push pixels into the memory: those that the teacher classifies rightly and surely.

        For positive, the best ``quota`` of a class by the selector's score; for infonce, ``quota`` random ones, and
        only these are projected.

        Args:
            features: ``[B, in_channels, h, w]`` of the teacher.
            logits: ``[B, C, h', w']`` of the teacher, at feature, label, or any other resolution; ``None``: every
                labelled pixel is good enough.
            labels: ``[B, H, W]`` int64.
            teacher: the moving average of this branch, whose heads project and rank the pixels; ``None``: this one's.
            generator: of the device of the labels, to repeat the random choice (infonce).

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, named; a branch without memory.
        """
        if self.capacity == 0:
            raise ValueError("ContrastBranch.remember: this branch has no memory; give it a capacity")
        heads = self if teacher is None else teacher
        label = self._good(features, logits, labels)
        batch = label.shape[0]
        images = torch.arange(batch, device=label.device)[:, None, None]
        if self.objective == "infonce":
            flat, chance = label.reshape(-1), torch.rand(label.numel(), device=label.device, generator=generator)
            image = images.expand_as(label).reshape(-1)
            picked = self.memory.choose(flat, chance, self.quota, image, batch, backend=self.backend)[0]
            class_of = torch.arange(self.num_classes, device=label.device)[:, None]
            rows, segments = heads._project_some(features, picked, torch.where(picked >= 0, class_of, -1))
            self.memory.push_sorted(rows, segments, backend=self.backend)
            return
        if self.variant == "released":
            segments = classes = class_order(label, self.num_classes, self.backend)
            scored = classes.count
            rows = ranked = heads.project(features, segments)
            quota, images_of_class = None if self.quota is None else self.quota * batch, 1
            if quota is not None:  # their code scores only the classes with more rows than the quota
                scored = torch.where(classes.count > quota, classes.count, 0)
        else:
            by_image = torch.where(label >= 0, label * batch + images, -1)
            segments = class_order(by_image, self.num_classes * batch, self.backend)
            count = segments.count.view(-1, batch).sum(1)
            classes = segments._replace(order=None, start=segments.start[::batch].contiguous(), count=count)
            scored = classes.count
            rows = heads.project(features, segments)
            ranked = heads.predict(rows, classes)
            quota, images_of_class = self.quota, batch
        scores = heads.select_features(heads.selector_input(ranked), classes.start, scored)
        scores = -scores if self.variant == "released" else scores
        self.memory.push_sorted(
            rows, segments._replace(order=None), scores, quota, images_of_class, backend=self.backend
        )

    def _good(self, features: Tensor, logits: Tensor | None, labels: Tensor) -> Tensor:
        """Labels ``[B, h, w]`` of the pixels that are good enough to be remembered, -1 elsewhere."""
        label = self._labels(features, labels, "remember")
        if logits is None:
            return label
        check_float("logits", logits)
        if logits.dim() != 4 or logits.shape[:2] != (labels.shape[0], self.num_classes):
            raise ValueError(
                f"ContrastBranch.remember: logits must be [B={labels.shape[0]}, C={self.num_classes}, h', w'], "
                f"got {tuple(logits.shape)}"
            )
        at_features = logits_at(logits, (features.shape[2], features.shape[3]), (labels.shape[1], labels.shape[2]))
        return torch.where(confident(at_features, label, self.threshold), label, -1)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        predict: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, ContrastStats] | tuple[Tensor, InfoNCEStats]:
        """Contrast of labelled pixels with the memory, or with each other.

        Args:
            features: ``[B, in_channels, h, w]`` of the student.
            labels: ``[B, H, W]`` int64, true or pseudo-labels.
            predict: predicted classes at any resolution (infonce; ``None``: no pixel counts as hard).
            generator: of the device of the labels, to repeat the choice of anchors (infonce).
            return_stats: also return :class:`ContrastStats` or :class:`InfoNCEStats`.

        Returns:
            A scalar, connected to the graph also where nothing takes part.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, named.
        """
        label = self._labels(features, labels, "forward")
        check_predict(predict)
        if isinstance(infonce := self.criterion.loss, InfoNCELoss):
            anchors = infonce.anchors(label, predict, generator)
            queue = self.memory if self.capacity > 0 else None
            infonce.explain_zero(label, anchors, queue)
            rows, anchors = self._anchor_rows(features, label, anchors)
            # normalize() of autocast gives float32, and products of mixed dtypes would run in float32
            dtype = rows.dtype if queue is None else queue.rows.dtype
            unit = normalize(rows, dim=1).to(dtype)
            return infonce.contrast(unit, anchors, queue, return_stats=return_stats)
        segments = class_order(label, self.num_classes, self.backend)
        rows = self.predict(self.project(features, segments), segments._replace(order=None))
        # selectors learn what to weigh; they do not push the features
        weighed = segments.count
        if self.variant == "released" and self.memory.sync != "reduce":  # their code skips these
            weighed = torch.where(self.memory.counts >= MIN_ROWS, weighed, 0)
        weight_logits = self.select_features(self.selector_input(rows), segments.start, weighed)
        return self.criterion(
            rows,
            segments.labels,
            queue=self.memory,
            weight_logits=weight_logits,
            queue_weight_logits=None if self.variant == "released" else self.memory_weight_logits(),
            return_stats=return_stats,
        )

    def _anchor_rows(self, features: Tensor, label: Tensor, anchors: Anchors) -> tuple[Tensor, Anchors]:
        """Projections of the anchors ``[R, dim]``, and the anchors as indices of these rows."""
        if not self.dense:
            rows, segments = self._project_some(features, anchors.indices, anchors.labels)
            return rows, all_anchors(segments.labels, -1)
        segments = class_order(label, self.num_classes, self.backend)
        assert segments.order is not None
        row_of_pixel = torch.empty_like(segments.order).scatter_(
            0, segments.order, torch.arange(len(segments.order), device=label.device)
        )
        if len(row_of_pixel) == 0:  # no pixel, but index 0 must exist
            row_of_pixel = row_of_pixel.new_zeros(1)
        used = anchors.indices >= 0
        rows = torch.where(used, row_of_pixel[anchors.indices.clamp_min(0)], -1)
        return self.project(features, segments), Anchors(rows, anchors.labels)

    def _project_some(self, features: Tensor, index: Tensor, labels: Tensor) -> tuple[Tensor, Segments]:
        """Projections of pixels ``index`` (-1: none) with ``labels`` alike, in class order, and their segments."""
        segments = class_order(labels, self.num_classes, self.backend)
        assert segments.order is not None
        pixels = gather_pixels(features, index.reshape(-1)[segments.order], self.backend)
        segments = segments._replace(order=None)
        return self.project(pixels, segments), segments

    def selector_input(self, rows: Tensor) -> Tensor:
        """What the feature selectors see, detached: unit rows; rows of any norm in the released variant."""
        return rows.detach() if self.variant == "released" else unit_rows(rows, self.backend)

    def memory_weight_logits(self) -> Tensor:
        """Logits ``[C, N]`` of the attention weights of the memory rows; 0 where there is none."""
        memory = self.memory
        return self.select_memory(memory.rows.flatten(0, 1), None, memory.counts).view(memory.rows.shape[:2])

    def _labels(self, features: Tensor, labels: Tensor, where: str) -> Tensor:
        """Labels at feature resolution ``[B, h, w]``, -1 where they are ignored; complains about what does not fit."""
        where = f"ContrastBranch.{where}"
        check_maps(where, "features", features, labels, self.project.first.in_features)
        size = (features.shape[2], features.shape[3])
        if readable(labels):
            check_label_values(labels_at(labels, size), self.num_classes, self.ignore_index, where)
        return valid_labels_at(labels, size, self.num_classes, self.ignore_index, self.backend)
