"""The loss that other trainers drop in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .checks import check_features, check_int64, check_label_map, check_like, check_predict
from .functional import BACKENDS
from .loss_infonce import InfoNCELoss, Queue
from .loss_positive import PositiveLoss
from .memory import ClassMemory
from .select import labels_at
from .stats import ContrastStats, InfoNCEStats

OBJECTIVES = ("infonce", "positive")
VARIANTS = ("paper", "released")


class PixelContrastLoss(nn.Module):
    """Pixel contrast with a queue, or among the pixels of a batch.

    ``objective="infonce"``: the pixel contrast of Wang et al. (ICCV 2021), with the call of their code. Anchors are
    drawn from every class of every image, half of them where ``predict`` is wrong, and contrasted with the queue, or
    with each other::

        criterion = PixelContrastLoss(temperature=0.1, max_samples=1024, max_views=100, ignore_index=255)
        loss = criterion(normalize(embedding), labels, predict)

    ``objective="positive"``: each pixel is drawn towards the queue's rows of its class (Alonso et al., ICCV 2021)::

        criterion = PixelContrastLoss(objective="positive", ignore_index=255)
        loss = criterion(embedding, labels, queue=memory)

    Args:
        temperature: divides the similarities (infonce).
        base_temperature: the loss is multiplied by ``temperature / base_temperature`` (infonce).
        max_samples: anchors of a batch, at most (infonce); ``None``, with ``max_views=None``: every valid pixel.
        max_views: anchors of a class of an image, at most; smaller classes are left out (infonce).
        ignore_index: label of pixels that are not valid; neither are those with a negative label.
        variant: ``"paper"``, or ``"released"`` to repeat what the code of Wang et al. computes with a queue: see
            ``skip_class0`` and ``diagonal``. Where that code stops or gives NaN, both variants go on.
        skip_class0: with a queue, do not use the rows of class 0, and put as many zero rows in their place; ``None``:
            as the variant says.
        diagonal: with a queue, key number r is no positive of anchor number r, keys counted from class 1 on and class 0
            last; ``None``: as the variant says.
        objective: ``"infonce"`` or ``"positive"``.
        loss_weight: factor of the loss. Setting it here instead of multiplying the result saves one pass over the
            gradient: the kernel writes the gradient with the factor already in it.
        on_empty: ``"zero"`` gives a zero that is connected to the graph when nothing takes part; ``"raise"`` raises
            ``ValueError`` (and waits for the device to know).
        backend: ``"auto"`` takes the compiled kernels where there are some for the device, else plain PyTorch;
            ``"extension"`` and ``"reference"`` insist.
        across_ranks: with several processes, the mean of a class runs over the pixels of all of them, so that the loss
            and the averaged gradients are those of one process with the whole batch (positive; the queue must be one
            that all ranks share, with ``sync="gather"`` or ``"reduce"``, and all must call equally often). Otherwise
            each rank has the loss of its own pixels, as with the usual losses.

    Raises:
        ValueError: an unknown option, or numbers out of range.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        base_temperature: float = 0.07,
        max_samples: int | None = 1024,
        max_views: int | None = 100,
        ignore_index: int = 255,
        variant: str = "paper",
        *,
        skip_class0: bool | None = None,
        diagonal: bool | None = None,
        objective: str = "infonce",
        loss_weight: float = 1.0,
        on_empty: str = "zero",
        backend: str = "auto",
        across_ranks: bool = False,
    ) -> None:
        super().__init__()
        options: dict[str, tuple[str, tuple[str, ...]]] = {"objective": (objective, OBJECTIVES)}
        options |= {"variant": (variant, VARIANTS)}
        options |= {"on_empty": (on_empty, ("zero", "raise")), "backend": (backend, BACKENDS)}
        for name, (given, known) in options.items():
            if given not in known:
                raise ValueError(f"PixelContrastLoss: {name} must be one of {known}, got {given!r}")
        if not math.isfinite(loss_weight):
            raise ValueError(f"PixelContrastLoss: loss_weight must be finite, got {loss_weight}")
        if across_ranks and objective != "positive":
            raise ValueError('PixelContrastLoss: across_ranks is for objective="positive" alone')
        self.objective, self.variant = objective, variant
        self.loss: InfoNCELoss | PositiveLoss
        if objective == "positive":
            self.loss = PositiveLoss(
                ignore_index, loss_weight=loss_weight, on_empty=on_empty, backend=backend, across_ranks=across_ranks
            )
        else:
            self.loss = InfoNCELoss(
                temperature,
                base_temperature,
                max_samples,
                max_views,
                ignore_index,
                skip_class0=variant == "released" if skip_class0 is None else skip_class0,
                diagonal=variant == "released" if diagonal is None else diagonal,
                loss_weight=loss_weight,
                on_empty=on_empty,
                backend=backend,
            )

    @property
    def ignore_index(self) -> int:
        return self.loss.ignore_index

    def extra_repr(self) -> str:
        return f"objective={self.objective!r}, variant={self.variant!r}"

    def forward(
        self,
        feats: Tensor,
        labels: Tensor,
        predict: Tensor | None = None,
        queue: Queue | Sequence[Queue] | None = None,
        *,
        weight_logits: Tensor | None = None,
        queue_weight_logits: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_stats: bool = False,
    ) -> Tensor | tuple[Tensor, InfoNCEStats] | tuple[Tensor, ContrastStats]:
        """Contrast ``feats``.

        Args:
            feats: ``[B, D, h, w]`` or rows ``[P, D]``. For infonce used as they are: normalise them before. For
                positive of any norm: normalised here.
            labels: ``[B, H, W]`` at any resolution (brought to ``h, w`` by the nearest rule), or ``[P]``; int64. Each
                is a class of the queue (without a queue: in ``[0, 2^15)``) or ``ignore_index``; checked on CPUs.
            predict: predicted classes like ``labels``, at any resolution (infonce; ``None``: all count as right).
            queue: a :class:`ClassMemory` or rows ``[C, N, D]``; for infonce also several of them (a pixel and a region
                queue, say), which are never copied into one, or ``None`` to contrast the anchors with each other.
            weight_logits: ``[P]`` or ``[B, h, w]`` logits of the pixels' attention weights (positive).
            queue_weight_logits: ``[C, N]`` logits of the rows' attention weights (positive).
            generator: of the device of the labels, to repeat the choice of anchors (infonce).
            return_stats: also return statistics.

        Returns:
            A scalar in float32 (float64 for float64 features), with :class:`InfoNCEStats` or :class:`ContrastStats`.

        Raises:
            ValueError, TypeError: arguments that do not fit, named, with what was given and what is expected.
        """
        check_features(feats)
        check_label_map("labels", labels, feats)
        check_predict(predict)
        if feats.dim() == 4 and labels.dim() == 3:
            labels = labels_at(labels, (feats.shape[2], feats.shape[3]))
        check_like("labels", labels, (feats.shape[0], *feats.shape[2:]), feats.device)
        check_int64("labels", labels)
        if isinstance(self.loss, InfoNCELoss):
            if weight_logits is not None or queue_weight_logits is not None:
                raise ValueError('weight_logits and queue_weight_logits are for objective="positive" alone')
            return self.loss(feats, labels, predict, queue, generator=generator, return_stats=return_stats)
        if queue is None or not isinstance(queue, ClassMemory | Tensor):
            raise ValueError(f'objective="positive" needs queue, a ClassMemory or a tensor, got {type(queue).__name__}')
        logits = {"weight_logits": weight_logits, "queue_weight_logits": queue_weight_logits}
        return self.loss(feats, labels, queue, **logits, return_stats=return_stats)
