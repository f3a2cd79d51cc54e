"""The pixel and region queues of Wang et al. (ICCV 2021) and how a batch fills them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .checks import check_maps
from .loss import VARIANTS
from .memory import ClassMemory
from .reference import accumulation_dtype, unit_rows
from .select import labels_at


class PixelQueues(nn.Module):
    """A region queue and a pixel queue for each class, filled from the embedding of each batch.

    ::

        queues = PixelQueues(num_classes=19, size=5000, dim=256)
        loss = criterion(embedding, labels, predict, queue=queues.parts())
        queues.update(embedding, labels)

    Each image adds one row to the region queue of each of its classes, the mean of the pixels of that class, and a few
    random pixels to the pixel queue. Everything is a buffer; the paper variant never waits for the device.

    ``DistributedDataParallel`` overwrites buffers with those of rank 0: keep the queues outside the wrapped model or
    pass ``broadcast_buffers=False``.

    Args:
        num_classes: C.
        size: rows of each class in each of the two queues.
        dim: D.
        pixels_per_class: pixels that an image adds to the pixel queue of a class, at most.
        variant: ``"paper"``, or ``"released"`` to repeat the code of Wang et al.: see :meth:`update`. Their queues also
            start full of random unit rows, where those of the paper variant start empty.
        stride: the released variant takes every ``stride``-th label; the paper variant brings labels to the map by the
            nearest rule.
        sync: of both queues, see :class:`ClassMemory`; the released code knows ``"local"`` only.
        dtype: storage of the rows.

    Attributes:
        regions, pixels: :class:`ClassMemory` each, ``rows [C, size, D]``.

    Raises:
        ValueError: an unknown option, or sizes below one.
    """

    def __init__(
        self,
        num_classes: int,
        size: int,
        dim: int,
        pixels_per_class: int = 10,
        variant: str = "paper",
        stride: int = 8,
        *,
        sync: str = "local",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"PixelQueues: variant must be one of {VARIANTS}, got {variant!r}")
        for name, number in (("pixels_per_class", pixels_per_class), ("stride", stride)):
            if number < 1:
                raise ValueError(f"PixelQueues: {name} must be at least 1, got {number}")
        if variant == "released" and sync != "local":
            raise ValueError(f'PixelQueues: variant="released" needs sync="local", got {sync!r}')
        self.pixels_per_class, self.variant, self.stride = pixels_per_class, variant, stride
        self.regions = ClassMemory(num_classes, size, dim, sync, dtype)
        self.pixels = ClassMemory(num_classes, size, dim, sync, dtype)
        if variant == "released":
            for queue in self.parts():
                queue.rows.copy_(unit_rows(torch.randn(queue.rows.shape)))
                queue.counts.fill_(size)

    def parts(self) -> list[ClassMemory]:
        """Both queues in the order of the released code, for ``queue=`` of :class:`PixelContrastLoss`."""
        return [self.regions, self.pixels]

    def extra_repr(self) -> str:
        return f"pixels_per_class={self.pixels_per_class}, variant={self.variant!r}"

    @torch.no_grad()
    def update(self, embedding: Tensor, labels: Tensor, generator: torch.Generator | None = None) -> None:
        """Add the regions and some pixels of a batch.

        The released variant differs so: labels are the ``stride``-th ones, whatever the resolution of the map; class 0
        is left out; the pixels are random ones among the first n of the map, with n the pixels of the class, of
        whichever class they are; the pixel queue moves on by one row however many it wrote; and rows that would reach
        the end take the last places, after which writing starts over. It waits for the device.

        Args:
            embedding: ``[B, D, h, w]``; gradients stop here.
            labels: ``[B, H, W]`` int64; pixels with a label outside ``[0, C)`` are left out (they may be NaN).
            generator: repeats the choice of pixels; of the device of the labels (released: of the CPU).

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, named.
        """
        check_maps("PixelQueues.update", "embedding", embedding, labels, self.pixels.dim)
        if self.variant == "released":
            self._update_released(embedding, labels, generator)
            return
        label = labels_at(labels, (embedding.shape[2], embedding.shape[3]))
        batch = label.shape[0]
        rows, classes = region_rows(embedding, label, self.regions.num_classes)
        # push makes the first row of a class the newest one, so the last image comes first
        self.regions.push(rows.flip(0), classes.flip(0), quota=batch)
        images = torch.arange(batch, device=label.device)[:, None, None].expand_as(label)
        chance = torch.rand(label.shape, device=label.device, generator=generator)
        self.pixels.push(embedding, label, chance, self.pixels_per_class, images, batch)

    def _update_released(self, embedding: Tensor, labels: Tensor, generator: torch.Generator | None) -> None:
        label_rows = labels[:, :: self.stride, :: self.stride].flatten(1)
        maps = embedding.flatten(2)
        if label_rows.shape[1] > maps.shape[2]:
            raise ValueError(
                f"PixelQueues.update: labels at stride {self.stride} make {label_rows.shape[1]} cells, more than the "
                f"{maps.shape[2]} of the embedding; raise stride"
            )
        most = min(self.pixels_per_class, self.pixels.capacity)
        for features, label in zip(maps, label_rows, strict=True):
            for c in label.unique().tolist():
                if not 0 < c < self.pixels.num_classes:
                    continue
                members = features[:, (label == c).nonzero()[:, 0]]  # there may be fewer labels than pixels
                _write_released(self.regions, c, members.mean(1)[None])
                chosen = torch.randperm(members.shape[1], generator=generator)[:most].to(features.device)
                _write_released(self.pixels, c, features[:, chosen].t())


def region_rows(embedding: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sums of the pixels of each class of each image; they point where the means point.

    Args:
        embedding: ``[B, D, h, w]``; NaN where the label is no class does no harm.
        labels: ``[B, h, w]`` int64; outside ``[0, C)``: no class.
        num_classes: C.

    Returns:
        ``[B * C, D]`` in the accumulation dtype, image by image, and their classes ``[B * C]``: -1 where the image has
        no pixel of the class.
    """
    classes = torch.arange(num_classes, device=labels.device)
    member = labels.flatten(1)[..., None] == classes
    pixels = torch.where(member.any(2)[:, None], embedding.flatten(2), 0)
    dtype = accumulation_dtype(embedding.dtype)
    with torch.autocast(embedding.device.type, enabled=False):
        sums = pixels.to(dtype) @ member.to(dtype)
    return sums.transpose(1, 2).flatten(0, 1), torch.where(member.any(1), classes, -1).flatten()


def _write_released(queue: ClassMemory, c: int, rows: Tensor) -> None:
    """Write ``rows [K, D]`` into class c and move on by one, or take the last K places and start over.

    Where the norm of a row is not finite, the place keeps what it has, and ``rejected`` counts it.
    """
    count, start = rows.shape[0], int(queue.cursors[c])
    over = start + count >= queue.capacity
    if over:
        start = queue.capacity - count
    rows, place = rows.to(accumulation_dtype(rows.dtype)), queue.rows[c, start : start + count]
    finite = torch.linalg.vector_norm(rows, dim=1).isfinite()
    place.copy_(torch.where(finite[:, None], unit_rows(rows).to(place.dtype), place))
    queue.rejected.add_((~finite).sum())
    queue.cursors[c] = 0 if over else start + 1
