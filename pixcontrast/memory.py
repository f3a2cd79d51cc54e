"""The class-wise memory bank: a ring buffer of unit rows for each class."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import mean_over_ranks, world_size
from .functional import memory_mean
from .reference import unit_rows
from .select import labels_at

SYNCS = ("local", "gather", "reduce")


class ClassMemory(nn.Module):
    """Ring buffers of normalised rows, one for each class; newest rows replace the oldest.

    Everything is a buffer, so ``state_dict``, ``.to(device)`` and an exact resume work. No operation waits for the
    device or has a shape that depends on the data.

    Args:
        num_classes: C.
        capacity: N, rows kept for each class.
        dim: D.
        sync: with several processes. ``"local"``: each keeps what it pushes. ``"gather"``: every rank of the default
            process group pushes the same rows, in rank order (all must push equally often, with the same quota and
            number of images). ``"reduce"``: each rank keeps what it pushes, N rows of its own, and :meth:`mean` runs
            over those of all ranks; for the positive objective, which needs no more than that.
        dtype: storage of the rows (float32, bfloat16, float16 or float64).

    Attributes:
        rows: ``[C, N, D]``; the first ``counts[c]`` rows of class c are valid.
        counts: ``[C]`` int64, valid rows of each class.
        cursors: ``[C]`` int64, where the next row of each class goes.
    """

    rows: Tensor
    counts: Tensor
    cursors: Tensor

    def __init__(
        self, num_classes: int, capacity: int, dim: int, sync: str = "local", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        for name, size in (("num_classes", num_classes), ("capacity", capacity), ("dim", dim)):
            if size < 1:
                raise ValueError(f"ClassMemory: {name} must be at least 1, got {size}")
        if sync not in SYNCS:
            raise ValueError(f"ClassMemory: sync must be one of {SYNCS}, got {sync!r}")
        self.sync = sync
        self.register_buffer("rows", torch.zeros(num_classes, capacity, dim, dtype=dtype))
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("cursors", torch.zeros(num_classes, dtype=torch.int64))

    @property
    def num_classes(self) -> int:
        return self.rows.shape[0]

    @property
    def capacity(self) -> int:
        return self.rows.shape[1]

    @property
    def dim(self) -> int:
        return self.rows.shape[2]

    @property
    def total_capacity(self) -> int:
        """Rows of each class that :meth:`mean` can run over."""
        return self.capacity * (world_size() if self.sync == "reduce" else 1)

    @property
    def fill(self) -> Tensor:
        """``[C]`` float32: share of the capacity that is filled."""
        return self.counts / self.capacity

    def clear(self) -> None:
        """Forget everything."""
        for buffer in (self.rows, self.counts, self.cursors):
            buffer.zero_()

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, capacity={self.capacity}, dim={self.dim}, sync={self.sync!r}"

    @torch.no_grad()
    def push(
        self,
        rows: Tensor,
        labels: Tensor,
        scores: Tensor | None = None,
        quota: int | None = None,
        images: Tensor | None = None,
        num_images: int = 1,
    ) -> None:
        """Write the best rows of each class into its ring.

        Args:
            rows: ``[P, D]``, or a map ``[B, D, h, w]``; normalised here.
            labels: ``[P]``, or ``[B, H, W]`` at any resolution (brought to ``h, w`` by the nearest rule); int64; rows
                with a label outside ``[0, C)`` are left out.
            scores: ``[P]`` or ``[B, h, w]``: rows with the highest score are kept. ``None`` keeps the first ones.
            quota: rows kept of each class (of each image, if ``images`` is given); ``None`` keeps up to ``capacity``.
            images: ``[P]`` or ``[B, h, w]`` int64 in ``[0, num_images)``, the image of each row.
            num_images: how many images ``images`` counts.

        Raises:
            ValueError: shapes that do not fit together.
        """
        if rows.dim() == 4 and labels.dim() == 3:
            labels = labels_at(labels, (rows.shape[2], rows.shape[3]))
        flat_labels = self._checked(rows, labels, scores, quota, images, num_images)
        if flat_labels.shape[0] == 0 and not self._gathers():
            return
        flat_scores = None if scores is None else scores.reshape(-1)
        flat_images = None if images is None else images.reshape(-1)
        picked, kept = self.choose(flat_labels, flat_scores, quota, flat_images, num_images)
        chosen = _take(rows, picked)
        if not self._gathers():
            self._write(chosen, kept)
            return
        world = dist.get_world_size()
        all_chosen = [torch.empty_like(chosen) for _ in range(world)]
        all_kept = [torch.empty_like(kept) for _ in range(world)]
        dist.all_gather(all_chosen, chosen)
        dist.all_gather(all_kept, kept)
        for chosen, kept in zip(all_chosen, all_kept, strict=True):
            self._write(chosen, kept)

    def _gathers(self) -> bool:
        return self.sync == "gather" and world_size() > 1

    def mean(self, weight_logits: Tensor | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """Weighted mean unit row of each class; with ``sync="reduce"``, over the rows of all ranks.

        Then every rank must call it equally often, and the gradient reaches the weights of every rank.

        Args:
            weight_logits: ``[C, N]`` logits of the attention weights of this rank's rows; ``None``: all alike.
            backend: ``"auto"``, ``"extension"`` or ``"reference"``.

        Returns:
            ``[C, D]`` float32 (float64 for float64 rows), zero for an empty class; and how many rows ``[C]`` int64.

        Raises:
            ValueError, TypeError: weight_logits that do not fit, named.
        """
        mean = memory_mean(self.rows, self.counts, weight_logits, backend)
        if self.sync != "reduce" or world_size() == 1:
            return mean, self.counts
        return mean_over_ranks(mean, self.counts, weight_logits)

    def choose(
        self, labels: Tensor, scores: Tensor | None, quota: int | None, images: Tensor | None, num_images: int
    ) -> tuple[Tensor, Tensor]:
        """Which of the rows with ``labels [P]`` :meth:`push` keeps, best first; arguments as there.

        Returns:
            row index ``[C, K]`` (-1 where there are fewer) and how many ``[C]``.
        """
        classes, total, device = self.num_classes, labels.shape[0], labels.device
        most = quota if quota is None or images is None else quota * num_images
        width = self.capacity if most is None else min(self.capacity, most)
        if not self._gathers():  # other ranks may have more rows
            width = min(width, total)
        if total == 0:
            return (
                torch.full((classes, width), -1, dtype=torch.int64, device=device),
                torch.zeros(classes, dtype=torch.int64, device=device),
            )
        valid = (labels >= 0) & (labels < classes)
        position = torch.arange(total, device=device)
        by_score = position if scores is None else torch.argsort(scores, descending=True, stable=True)
        order = by_score
        if images is not None and quota is not None:
            # rank inside (class, image) first; what is over the quota there drops out of the ranking by class
            group = torch.where(valid, labels * num_images + images, classes * num_images)
            order = order[torch.argsort(group[order], stable=True)]
            ordered = group[order]
            first = torch.searchsorted(ordered, torch.arange(classes * num_images + 1, device=device))
            dropped = torch.zeros_like(valid).scatter(0, order, position - first[ordered] >= quota)
            valid = valid & ~dropped
            order = by_score  # among the images' best rows, the overall best come first again
        group = torch.where(valid, labels, classes)
        order = order[torch.argsort(group[order], stable=True)]
        ordered = group[order]
        bounds = torch.searchsorted(ordered, torch.arange(classes + 1, device=device))
        rank = position - bounds[ordered]
        # one slot beyond the table takes every row that is not kept
        slot = torch.where((ordered < classes) & (rank < width), ordered * width + rank, classes * width)
        table = torch.full((classes * width + 1,), -1, dtype=torch.int64, device=device)
        table = table.scatter(0, slot, order)[:-1].view(classes, width)
        return table, (table >= 0).sum(1)

    def _write(self, chosen: Tensor, kept: Tensor) -> None:
        """Write ``chosen [C, K, D]``, of which the first ``kept[c]`` are real, best row last: it stays longest."""
        width = chosen.shape[1]
        step = torch.arange(width, device=chosen.device)
        place = torch.where(step < kept[:, None], kept[:, None] - 1 - step, step)
        slots = (self.cursors[:, None] + place) % self.capacity
        index = slots[..., None].expand(-1, -1, self.dim)
        real = (step < kept[:, None])[..., None]
        # slots of missing rows get back what they hold, so that the shape of the write never depends on the data
        rows = unit_rows(chosen.to(torch.promote_types(chosen.dtype, torch.float32))).to(self.rows.dtype)
        self.rows.scatter_(1, index, torch.where(real, rows, self.rows.gather(1, index)))
        self.counts.copy_((self.counts + kept).clamp_max(self.capacity))
        self.cursors.copy_((self.cursors + kept) % self.capacity)

    def _checked(
        self,
        rows: Tensor,
        labels: Tensor,
        scores: Tensor | None,
        quota: int | None,
        images: Tensor | None,
        num_images: int,
    ) -> Tensor:
        if rows.dim() not in (2, 4) or rows.shape[1] != self.dim:
            raise ValueError(
                f"ClassMemory.push: rows must be [P, {self.dim}] or [B, {self.dim}, h, w], got {tuple(rows.shape)}"
            )
        expected = (rows.shape[0],) if rows.dim() == 2 else (rows.shape[0], *rows.shape[2:])
        for name, tensor in (("labels", labels), ("scores", scores), ("images", images)):
            if tensor is not None and tuple(tensor.shape) != tuple(expected):
                raise ValueError(f"ClassMemory.push: {name} must be {tuple(expected)}, got {tuple(tensor.shape)}")
        if labels.dtype != torch.int64:
            raise TypeError(f"ClassMemory.push: labels must be int64, got {labels.dtype}")
        if quota is not None and quota < 1:
            raise ValueError(f"ClassMemory.push: quota must be at least 1 or None, got {quota}")
        if num_images < 1:
            raise ValueError(f"ClassMemory.push: num_images must be at least 1, got {num_images}")
        return labels.reshape(-1)


def _take(rows: Tensor, picked: Tensor) -> Tensor:
    """Rows ``picked [C, K]`` (-1: a zero row) of ``[P, D]`` or of the pixels of ``[B, D, h, w]``: ``[C, K, D]``."""
    if rows.numel() == 0:
        return rows.new_zeros(*picked.shape, rows.shape[1])
    index = picked.clamp_min(0)
    if rows.dim() == 4:
        pixels = rows.shape[2] * rows.shape[3]
        taken = rows.flatten(2)[index // pixels, :, index % pixels]
    else:
        taken = rows[index]
    return torch.where(picked[..., None] >= 0, taken, 0)
