"""The class-wise memory bank: a ring buffer of unit rows for each class."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .checks import check_float, check_int64, check_label_map, check_like, check_range
from .distributed import mean_over_ranks, world_size
from .functional import gather_pixels, memory_mean
from .ops.class_order import Segments, class_order
from .ops.memory_push import best_rows, memory_write
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
        rejected: scalar int64, not part of ``state_dict``: rows that were not stored because their score or their norm
            is not finite, since the module was made or cleared. With ``sync="gather"``, a score is counted by the rank
            that pushed it, and a norm by every rank.
    """

    rows: Tensor
    counts: Tensor
    cursors: Tensor
    rejected: Tensor

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
        self.register_buffer("rejected", torch.zeros((), dtype=torch.int64), persistent=False)

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
        for buffer in (self.rows, self.counts, self.cursors, self.rejected):
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
        *,
        backend: str = "auto",
    ) -> None:
        """Write the best rows of each class into its ring.

        A row whose score is not finite is never chosen, and a chosen row whose norm is not finite is not stored; both
        count in ``rejected``. Of equal scores, the first row is the best.

        Args:
            rows: ``[P, D]``, or a map ``[B, D, h, w]``; normalised here.
            labels: ``[P]``, or ``[B, H, W]`` at any resolution (brought to ``h, w`` by the nearest rule); int64; rows
                with a label outside ``[0, C)`` are left out.
            scores: ``[P]`` or ``[B, h, w]``: rows with the highest score are kept. ``None`` keeps the first ones.
            quota: rows kept of each class (of each image, if ``images`` is given); ``None`` keeps up to ``capacity``.
            images: ``[P]`` or ``[B, h, w]`` int64 in ``[0, num_images)``, the image of each row. On CUDA, a row of
                another image is left out.
            num_images: how many images ``images`` counts.
            backend: ``"auto"``, ``"extension"`` or ``"reference"``.

        Raises:
            ValueError, TypeError: shapes, dtypes, devices or (on CPU) images that do not fit, named.
        """
        self._check_rows("push", rows, quota, num_images)
        check_label_map("ClassMemory.push: labels", labels, rows)
        if rows.dim() == 4 and labels.dim() == 3:
            labels = labels_at(labels, (rows.shape[2], rows.shape[3]))
        shape = (rows.shape[0], *rows.shape[2:])
        for name, tensor in (("labels", labels), ("images", images), ("scores", scores)):
            if tensor is not None:
                check_like(f"ClassMemory.push: {name}", tensor, shape, self.rows.device)
                (check_float if name == "scores" else check_int64)(f"ClassMemory.push: {name}", tensor)
        if images is not None:
            check_range("ClassMemory.push: images", images, 0, num_images - 1)
        if labels.numel() == 0 and not self._gathers():
            return
        self.write(rows, self._choose(labels, scores, quota, images, num_images, backend), backend=backend)

    @torch.no_grad()
    def push_sorted(
        self,
        rows: Tensor,
        segments: Segments,
        scores: Tensor | None = None,
        quota: int | None = None,
        num_images: int = 1,
        *,
        backend: str = "auto",
    ) -> None:
        """:meth:`push` of rows whose class order is known.

        Args:
            rows: ``[P, D]``, normalised here. They stand in class order if ``segments.order`` is ``None``; else it says
                which row stands where.
            segments: of classes and images: segment ``c * num_images + b`` is class c of image b.
            scores: ``[P]`` like the rows: those with the highest score are kept. ``None`` keeps the first ones.
            quota: rows kept of each segment; ``None`` keeps up to ``capacity`` of each class.
            num_images: how many images there are.
            backend: ``"auto"``, ``"extension"`` or ``"reference"``.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit, named.
        """
        self._check_rows("push_sorted", rows, quota, num_images)
        if rows.dim() != 2:
            raise ValueError(f"ClassMemory.push_sorted: rows must be [P, {self.dim}], got {tuple(rows.shape)}")
        for name, tensor in (("start", segments.start), ("count", segments.count)):
            shape = (self.num_classes * num_images,)
            check_like(f"ClassMemory.push_sorted: segments.{name}", tensor, shape, self.rows.device)
        if scores is not None:
            check_float("ClassMemory.push_sorted: scores", scores)
            check_like("ClassMemory.push_sorted: scores", scores, (rows.shape[0],), self.rows.device)
        if rows.shape[0] == 0 and not self._gathers():
            return
        width = self._width(quota, num_images, rows.shape[0])
        index = best_rows(scores, segments, quota, num_images, width, self.rejected, backend)
        self.write(rows, index, backend=backend)

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

    @torch.no_grad()
    def choose(
        self,
        labels: Tensor,
        scores: Tensor | None,
        quota: int | None,
        images: Tensor | None,
        num_images: int,
        *,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Which of the rows with ``labels`` (flattened, ``[P]``) :meth:`push` keeps, best first; arguments as there.

        Returns:
            row index ``[C, K]`` (-1 where there are fewer) and how many ``[C]``.
        """
        index = self._choose(labels, scores, quota, images, num_images, backend)
        return index, (index >= 0).sum(1)

    @torch.no_grad()
    def write(self, rows: Tensor, index: Tensor, *, backend: str = "auto") -> None:
        """Write rows that were chosen before into the rings, the best last, so that it stays longest.

        With ``sync="gather"``, every rank must call it with an ``index`` of the same shape.

        Args:
            rows: ``[P, D]`` or ``[B, D, h, w]``; normalised here. Rows whose norm is not finite are left out and count
                in ``rejected``.
            index: ``[C, K]`` int64, rows (or pixels) for each class, best first; -1 for none.
            backend: ``"auto"``, ``"extension"`` or ``"reference"``.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices that do not fit, named.
        """
        self._check_rows("write", rows)
        check_int64("ClassMemory.write: index", index)
        check_like("ClassMemory.write: index", index, (self.num_classes, index.shape[-1]), self.rows.device)
        memory = self.rows, self.counts, self.cursors, self.rejected
        if not self._gathers():
            memory_write(*memory, rows, index, backend=backend)
            return
        chosen = gather_pixels(rows, index.reshape(-1), backend)
        own = torch.arange(index.numel(), device=index.device).view_as(index)  # where the chosen rows stand
        own = torch.where(index >= 0, own, -1)
        world = dist.get_world_size()
        all_chosen = [torch.empty_like(chosen) for _ in range(world)]
        all_own = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(all_chosen, chosen)
        dist.all_gather(all_own, own)
        for chosen, own in zip(all_chosen, all_own, strict=True):
            memory_write(*memory, chosen, own, backend=backend)

    def _choose(
        self,
        labels: Tensor,
        scores: Tensor | None,
        quota: int | None,
        images: Tensor | None,
        num_images: int,
        backend: str,
    ) -> Tensor:
        """Rows ``[C, K]`` of :meth:`choose`."""
        if quota is None or images is None:
            num_images, group = 1, labels
        else:  # class-major; out of range where the label is none, -1 where the image is none
            group = torch.add(images, labels.clamp(-1, self.num_classes), alpha=num_images)
            group.masked_fill_(images != images.clamp(0, num_images - 1), -1)
        segments = class_order(group, self.num_classes * num_images, backend)
        width = self._width(quota, num_images, labels.numel())
        scores = None if scores is None else scores.reshape(-1)
        return best_rows(scores, segments, quota, num_images, width, self.rejected, backend)

    def _width(self, quota: int | None, num_images: int, total: int) -> int:
        """Rows of a class that one push can keep."""
        width = self.capacity if quota is None else min(self.capacity, quota * num_images)
        return width if self._gathers() else min(width, total)  # other ranks may have more rows

    def _check_rows(self, where: str, rows: Tensor, quota: int | None = None, num_images: int = 1) -> None:
        check_float(f"ClassMemory.{where}: rows", rows)
        if rows.dim() not in (2, 4) or rows.shape[1] != self.dim:
            raise ValueError(
                f"ClassMemory.{where}: rows must be [P, {self.dim}] or [B, {self.dim}, h, w], got {tuple(rows.shape)}"
            )
        check_like(f"ClassMemory.{where}: rows", rows, tuple(rows.shape), self.rows.device)
        if quota is not None and quota < 1:
            raise ValueError(f"ClassMemory.{where}: quota must be at least 1 or None, got {quota}")
        if num_images < 1:
            raise ValueError(f"ClassMemory.{where}: num_images must be at least 1, got {num_images}")
