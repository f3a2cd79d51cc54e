"""The mathematics in plain, differentiable PyTorch: the yardstick of the tests and the fallback on every device.

Notation (Alonso et al., ICCV 2021, Eq. 8, written as inner products of means)::

    f_i  feature row i of class c         a_i  its weight logit          w_i = sigma(a_i) / sum_k sigma(a_k)
    z_j  memory row j of class c          b_j  its weight logit          v_j = sigma(b_j) / sum_k sigma(b_k)
    L_c  = sum_ij w_i v_j (1 - cos(f_i, z_j)) = 1 - <u_c, m_c>,  u_c = sum_i w_i f_i/|f_i|,  m_c = sum_j v_j z_j/|z_j|
    loss = loss_weight / C * sum_c L_c        over classes with at least two feature rows and two memory rows

InfoNCE is described at :func:`infonce`. Sums run in float32 (float64 for float64 inputs). A row whose norm is below
``NORM_FLOOR`` counts as the zero vector in the positive objective; InfoNCE takes rows as they are. A row whose logit is
minus infinity weighs nothing; where all of a class are, there are no weights: 0/0 is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import leaky_relu, linear, logsigmoid, pad

if TYPE_CHECKING:
    from .ops.norm_linear import Norm

NORM_FLOOR = 1e-12
MIN_ROWS = 2  # a class takes part from two feature rows and two memory rows on, as in the released code


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_rows(rows: Tensor) -> Tensor:
    """``rows [..., D]`` scaled to norm one; rows of norm below ``NORM_FLOOR`` become zero and pass no gradient.

    Rows whose norm is beyond the range of the dtype become NaN, as those with NaN.
    """
    norm = torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True)
    safe = torch.where(norm < NORM_FLOOR, 0, rows)
    norm = torch.linalg.vector_norm(safe, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
    return safe / norm.masked_fill(norm.isinf(), torch.nan)


def memory_mean(queue: Tensor, counts: Tensor, weight_logits: Tensor | None = None) -> Tensor:
    """Weighted mean unit row of each class of a memory.

    Args:
        queue: ``[C, N, D]`` rows; only the first ``counts[c]`` rows of class c are valid.
        counts: ``[C]`` int64.
        weight_logits: ``[C, N]`` logits ``b``; ``None`` gives every row the same weight.

    Returns:
        ``[C, D]`` in the accumulation dtype; zero for an empty class.
    """
    dtype = accumulation_dtype(queue.dtype)
    valid = torch.arange(queue.shape[1], device=queue.device) < counts[:, None]
    rows = unit_rows(torch.where(valid[..., None], queue, 0).to(dtype))
    logits = (
        torch.zeros(valid.shape, dtype=dtype, device=queue.device) if weight_logits is None else weight_logits.to(dtype)
    )
    # sigma(b)/sum sigma(b) is the softmax of log sigma(b), which stays finite for logits of any size.
    log_sigma = logsigmoid(torch.where(valid, logits, 0)).masked_fill(~valid, float("-inf"))
    share = torch.where(valid, torch.softmax(log_sigma, dim=1), 0)
    return torch.einsum("cn,cnd->cd", share, rows)


def as_rows(features: Tensor) -> Tensor:
    """``[P, D]`` as it is, ``[B, D, H, W]`` as ``[B*H*W, D]`` (a view for channels_last maps)."""
    return features if features.dim() == 2 else features.permute(0, 2, 3, 1).flatten(0, 2)


def gather_pixels(features: Tensor, index: Tensor) -> Tensor:
    """Some pixels as rows: row r is ``pixel[index[r]]``.

    Args:
        features: ``[P, D]`` or ``[B, D, H, W]``.
        index: ``[R]`` int64, the pixel of each row; outside ``[0, P)`` there is none.

    Returns:
        ``[R, D]``; a row without pixel is zero and passes no gradient.
    """
    pixels = as_rows(features)
    found = (index >= 0) & (index < pixels.shape[0])
    if pixels.shape[0] == 0:
        pixels = pad(pixels, (0, 0, 0, 1))  # so that index 0 exists
    return torch.where(found[:, None], pixels[torch.where(found, index, 0)], 0)


def segment_topk(
    scores: Tensor | None, order: Tensor | None, start: Tensor, count: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of the highest score of each segment, best first, of equal scores the lower row first.

    Args:
        scores: ``[P]``; a row whose score is not finite is not chosen. ``None``: all alike.
        order: ``[L]`` int64, the row at each position, outside ``[0, P)``: none; ``None``: the position itself.
        start, count: ``[S]`` int64, segments of positions, which ascend without overlap.
        k: rows of each segment.

    Returns:
        ``[S, k]`` int64 rows, -1 where a segment has fewer; and how many scores in segments are not finite.
    """
    segments, device = len(start), start.device
    if order is None:
        if scores is None:  # the first rows
            step = torch.arange(k, device=device)
            return torch.where(step < count[:, None], start[:, None] + step, -1), count.new_zeros(())
        order = torch.arange(len(scores), device=device)
    if 0 in (segments, k, len(order)) or (scores is not None and len(scores) == 0):
        return start.new_full((segments, k), -1), count.new_zeros(())
    position = torch.arange(len(order), device=device)
    segment = torch.searchsorted(start + count, position, right=True)  # the first that ends behind the position
    valid = (segment < segments) & (start[segment.clamp_max(segments - 1)] <= position) & (order >= 0)
    score = torch.zeros(len(order), device=device)
    if scores is not None:
        valid = valid & (order < len(scores))
        score = scores[torch.where(valid, order, 0)]
    finite = score.isfinite()
    segment = torch.where(valid & finite, segment, segments)
    by = torch.argsort(order, stable=True)  # stable sorts: by row, then by score, then by segment
    by = by[torch.argsort(score[by], descending=True, stable=True)]
    by = by[torch.argsort(segment[by], stable=True)]
    segment = segment[by]
    rank = position - torch.searchsorted(segment, torch.arange(segments + 1, device=device))[segment]
    # one slot beyond the table takes every row that is not chosen
    slot = torch.where((segment < segments) & (rank < k), segment * k + rank, segments * k)
    table = start.new_full((segments * k + 1,), -1).scatter(0, slot, order[by])
    return table[:-1].view(segments, k), (valid & ~finite).sum()


def memory_write(
    rows: Tensor, counts: Tensor, cursors: Tensor, rejected: Tensor, source: Tensor, index: Tensor
) -> None:
    """Write unit rows into the ring of each class, in place, the best row last, so that it stays longest.

    Entry r of the m entries of class c whose norm is finite goes to slot ``(cursors[c] + m - 1 - r) mod N`` if r < N.

    Args:
        rows, counts, cursors: ``[C, N, D]``, ``[C]`` and ``[C]`` of the memory.
        rejected: ``[]`` int64, increased by the entries whose norm is not finite; the ring has no holes for them.
        source: ``[Q, D]`` or ``[B, D, H, W]``.
        index: ``[C, K]`` int64, rows or pixels of the source, best first; outside ``[0, Q)``: none.
    """
    source = as_rows(source)
    if len(source) == 0:
        return
    classes, capacity, dim = rows.shape
    found = (index >= 0) & (index < len(source))
    new = source[torch.where(found, index, 0)].to(accumulation_dtype(source.dtype))
    stored = found & torch.linalg.vector_norm(new, dim=2).isfinite()
    total, rank = stored.sum(1), stored.cumsum(1) - 1
    slot = (cursors[:, None] + total[:, None] - 1 - rank) % capacity
    # one slot beyond the ring takes every row that is not stored
    slot = torch.where(stored & (rank < capacity), slot, capacity)[..., None].expand(-1, -1, dim)
    ring = torch.cat([rows, rows.new_zeros(classes, 1, dim)], 1).scatter(1, slot, unit_rows(new).to(rows.dtype))
    rows.copy_(ring[:, :-1])
    counts.copy_((counts + total).clamp_max(capacity))
    cursors.copy_((cursors + total) % capacity)
    rejected.add_((found & ~stored).sum())


def members(rows: int, start: Tensor | None, count: Tensor) -> Tensor:
    """``[P, C]`` bool: which of ``rows`` = P rows are of which segment; ``start`` and ``count`` ``[C]`` int64."""
    classes = count.shape[0]
    if start is None:
        start = torch.arange(classes, device=count.device) * (rows // classes)
    row = torch.arange(rows, device=count.device)[:, None]
    return (row >= start) & (row < start + count)


def grouped_linear(rows: Tensor, weight: Tensor, start: Tensor | None, count: Tensor) -> Tensor:
    """``rows [P, D]`` of segment c times the transpose of ``weight[c]``, ``weight [C, E, D]``: ``[P, E]``."""
    classes, total = len(count), len(rows)
    if torch.compiler.is_compiling() or count.is_meta or isinstance(count, FakeTensor):
        # no size can be read: every row by every matrix
        member = members(total, start, count)
        products = (torch.where(member[:, c, None], rows @ weight[c].t(), 0) for c in range(classes))
        return sum(products, rows.new_zeros(total, weight.shape[1]))
    begin = [c * (total // classes) for c in range(classes)] if start is None else start.tolist()
    parts, end = [], 0
    for c, (first, size) in enumerate(zip(begin, count.tolist(), strict=True)):
        gap = rows.new_zeros(first - end, weight.shape[1])
        parts += [gap, rows[first : first + size] @ weight[c].t()]
        end = first + size
    return torch.cat([*parts, rows.new_zeros(total - end, weight.shape[1])])


def norm_linear(
    hidden: Tensor,
    hidden_bias: Tensor,
    norm: Norm,
    weight: Tensor,
    bias: Tensor,
    rows: tuple[Tensor | None, Tensor | None, Tensor],
    slope: float,
    dense: bool,
) -> Tensor:
    """BatchNorm over the rows of each segment, leaky ReLU and a linear layer; see :mod:`pixcontrast.ops.norm_linear`.

    ``rows`` are order, start and count. A bias added to all rows would cancel where their own mean is subtracted, so
    ``hidden_bias`` only enters beside the running mean.
    """
    order, start, count = rows
    dtype = accumulation_dtype(hidden.dtype)
    member = members(len(hidden), start, count)
    valid, index = member.any(1), member.long().argmax(1)  # 0 for rows outside of segments
    x = torch.where(valid[:, None], hidden if order is None else hidden[order], 0).to(dtype)
    n = count.to(dtype)[:, None]
    shape = (len(count), hidden.shape[1])
    norm_weight, norm_bias, hidden_bias = (t.view(shape) for t in (norm.weight, norm.bias, hidden_bias))
    running_mean, running_var = norm.running_mean.view(shape), norm.running_var.view(shape)
    device = "cpu" if hidden.is_meta else hidden.device.type  # autocast does not know meta tensors
    with torch.autocast(device, enabled=False):
        zeros = x.new_zeros(shape)
        mean = zeros.index_add(0, index, x) / n.clamp_min(1)
        centred = torch.where(valid[:, None], x - mean[index], 0)
        variance = zeros.index_add(0, index, centred.square()) / n.clamp_min(1)
        own = (n >= 2) & torch.tensor(norm.training, device=n.device)
        centre = torch.where(own, mean, running_mean - hidden_bias)
        scale = torch.rsqrt(torch.where(own, variance, running_var.clone()) + norm.eps) * norm_weight
        y = (x - centre[index]) * scale[index] + norm_bias[index]
        activations = torch.where(valid[:, None], leaky_relu(y, slope), 0).to(hidden.dtype)
        if dense:
            out = linear(activations, weight, bias)
        else:
            out = torch.where(valid, (activations.to(dtype) * weight[index]).sum(1) + bias[index], 0)
    with torch.no_grad():
        rate = norm.momentum * own.to(dtype)
        running_mean.add_(rate * (mean + hidden_bias - running_mean))
        running_var.add_(rate * (variance * n / (n - 1).clamp_min(1) - running_var))
        if norm.batches is not None:
            norm.batches.add_(own[0, 0].long())
    return out


def positive(
    features: Tensor,
    labels: Tensor,
    weight_logits: Tensor | None,
    mean: Tensor,
    memory_counts: Tensor,
    loss_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Class-wise memory contrast of ``features`` with the memory means of their classes.

    Args:
        features: ``[P, D]`` or ``[B, D, H, W]``.
        labels: ``[P]`` or ``[B, H, W]`` int64; anything outside ``[0, C)`` is left out.
        weight_logits: logits ``a`` in the shape of ``labels``; ``None`` weighs all rows of a class alike.
        mean: ``[C, D]`` from :func:`memory_mean`.
        memory_counts: ``[C]`` int64, valid memory rows of each class.
        loss_weight: factor of the loss.

    Returns:
        The scalar loss, ``L_c [C]`` (0 for classes that do not take part), the valid rows of each class ``[C]`` int64.
    """
    num_classes = mean.shape[0]
    dtype = accumulation_dtype(features.dtype)
    label = labels.reshape(-1)
    valid = (label >= 0) & (label < num_classes)
    index = torch.where(valid, label, 0)
    rows = unit_rows(torch.where(valid[:, None], as_rows(features), 0).to(dtype))

    pixels = torch.zeros(num_classes, dtype=torch.int64, device=label.device).index_add(0, index, valid.long())
    active = (pixels >= MIN_ROWS) & (memory_counts >= MIN_ROWS)
    share = _class_share(weight_logits, index, valid & active[index], num_classes, dtype)
    means = torch.zeros(num_classes, rows.shape[1], dtype=dtype, device=rows.device).index_add(
        0, index, share[:, None] * rows
    )
    class_loss = torch.where(active, 1 - (means * mean.to(dtype)).sum(1), 0)
    return class_loss.sum() * (loss_weight / num_classes), class_loss.detach(), pixels


def _class_share(
    weight_logits: Tensor | None, index: Tensor, valid: Tensor, num_classes: int, dtype: torch.dtype
) -> Tensor:
    """``w_i [P]``: sigma(a_i) over the sum of its class, computed from log sigma with the class maximum subtracted."""
    if weight_logits is None:
        score = valid.to(dtype)
    else:
        log_sigma = logsigmoid(torch.where(valid, weight_logits.reshape(-1).to(dtype), 0))
        lowest = torch.full((num_classes,), float("-inf"), dtype=dtype, device=index.device)
        masked = torch.where(valid, log_sigma, float("-inf"))
        top = lowest.scatter_reduce(0, index, masked.detach(), "amax")
        score = torch.where(valid, torch.exp(torch.where(valid, log_sigma - top[index], 0)), 0)
    total = torch.zeros(num_classes, dtype=dtype, device=index.device).index_add(0, index, score)
    return score / total[index].clamp_min(torch.finfo(dtype).tiny)


def infonce(
    features: Tensor,
    index: Tensor,
    labels: Tensor,
    queues: Sequence[Tensor] = (),
    counts: Sequence[Tensor] = (),
    excluded: Tensor | None = None,
    temperature: float = 0.1,
    base_temperature: float = 0.07,
    loss_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE with one denominator for each positive (Wang et al., ICCV 2021, as their code computes it)::

        z_ij   = <x_i, k_j> / temperature                       rows are not normalised here
        loss_i = 1/P_i sum_pos ( log(e^z_ij + sum_neg e^z_in) - z_ij )
        loss   = loss_weight * temperature / base_temperature * mean_i loss_i      over anchors with a positive

    Keys are the valid rows of the queues (constants), or, without a queue, the other anchors, with gradient on both
    sides.

    Args:
        features: ``[P, D]`` or ``[B, D, H, W]``.
        index: ``[R]`` int64, the pixel of each anchor, below 0 for none.
        labels: ``[R]`` int64, the class of each anchor; outside ``[0, C)`` it takes no part.
        queues, counts: ``[C, N_q, D]`` and ``[C]`` each; the first ``counts[c]`` rows of class c are valid.
        excluded: ``[R]`` int64: a key of the anchor's own class that is no positive, counted over the queues one after
            the other; -1 for none.
        temperature, base_temperature, loss_weight: see above.

    Returns:
        The scalar loss, ``loss_i [R]`` (0 for anchors that take no part and for those without negatives) and
        ``P_i [R]`` int64. Anchors, keys or similarities that are not finite give NaN.
    """
    dtype = accumulation_dtype(features.dtype)
    used = (index >= 0) & (labels >= 0)
    if index.shape[0] == 0 or features.numel() == 0:
        return features.sum().to(dtype) * 0, labels.new_zeros(index.shape, dtype=dtype), torch.zeros_like(index)
    anchors = torch.where(used[:, None], as_rows(features)[index.clamp_min(0)], 0).to(dtype)
    if queues:
        keys, key_labels, places = _queue_keys(queues, counts, dtype)
        used = used & (labels < queues[0].shape[0])
    else:
        keys, key_labels, places = (
            anchors,
            torch.where(used, labels, -1),
            torch.arange(len(labels), device=index.device),
        )
        excluded = places
    known = used[:, None] & (key_labels >= 0)
    same = known & (labels[:, None] == key_labels)
    positive = same if excluded is None else same & (places != excluded[:, None])
    z = anchors @ keys.t() / temperature
    z = z + 0 * z  # an infinite similarity becomes NaN, which reaches the loss
    lowest = torch.finfo(dtype).min / 4
    negative = known & ~same
    away = torch.logsumexp(torch.where(negative, z, lowest), dim=1, keepdim=True)
    # log(e^z + e^away) - z; without negatives the loss is 0
    pairs = -logsigmoid(torch.where(positive & negative.any(1, keepdim=True), z - away, -lowest))
    positives = positive.sum(1)
    anchor_loss = torch.where(positive, pairs, 0).sum(1) / positives.clamp_min(1)
    mean = anchor_loss.sum() / (positives > 0).sum().clamp_min(1)
    return mean * (loss_weight * temperature / base_temperature), anchor_loss.detach(), positives


def _queue_keys(
    queues: Sequence[Tensor], counts: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """All rows ``[K, D]`` of the queues, their classes (-1: not valid), their places among the keys of the class."""
    keys, labels, places = [], [], []
    before = torch.zeros_like(counts[0])
    for queue, count in zip(queues, counts, strict=True):
        step = torch.arange(queue.shape[1], device=queue.device)
        valid = step < count[:, None]
        keys.append(torch.where(valid[..., None], queue.detach(), 0).to(dtype).flatten(0, 1))
        labels.append(torch.where(valid, torch.arange(len(count), device=queue.device)[:, None], -1).reshape(-1))
        places.append((before[:, None] + step).reshape(-1))
        before = before + count
    return torch.cat(keys), torch.cat(labels), torch.cat(places)
