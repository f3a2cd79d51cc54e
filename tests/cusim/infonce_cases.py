"""Cases for the kernels of InfoNCE, the formulas they must agree with, and how closely."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cusim.kernels import WAYS, Kernels, Way, grad_dtype

FLOAT, BF16, HALF = TYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = WAYS[0]
BASE_TEMPERATURE = 0.07


@dataclass
class Case:
    """``features [P, D]`` or ``[B, D, H*W]``, anchors ``index``, ``labels`` and ``excluded [R]``, queues
    ``[C, N, D]`` with ``counts [C]``. On a device of compute capability 9.0 unless told otherwise."""

    features: Tensor
    index: Tensor
    labels: Tensor
    classes: int
    queues: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    excluded: Tensor | None = None
    temperature: float = 0.1
    loss_weight: float = 0.7
    tf32: bool = False
    capability: int = 90
    multiprocessors: int = 2
    gradient: bool = True

    @property
    def rows(self) -> Tensor:
        """``[P, D]``"""
        return self.features if self.features.dim() == 2 else self.features.transpose(1, 2).flatten(0, 1)


def make_case(
    dim: int,
    dtype: torch.dtype,
    *,
    queue_dtype: torch.dtype | None = None,
    classes: int = 5,
    capacities: tuple[int, ...] = (70, 9),
    anchors: int = 90,
    maps: bool = False,
    tf32: bool = False,
    seed: int = 0,
) -> Case:
    """With empty places, pixels and classes that do not exist, pixels that are anchors several times, a class without
    anchors, one of a single anchor and a full, an empty and a ragged queue; whatever takes no part holds NaN."""
    g = torch.Generator().manual_seed(seed)
    pixels = 2 * (anchors // 2 + 8)
    index = torch.randperm(pixels, generator=g)[:anchors]
    labels = torch.randint(0, classes, (anchors,), generator=g)
    if classes > 4:
        labels[(labels == 1) | (labels == 2)] = 3
        labels[anchors // 2] = 2
    index[5::7] = index[2]
    index[6::8] = index[4]
    index[7::13], index[8::17], labels[9::19], labels[10::23] = -1, pixels, -1, 1 << 40
    features = torch.nn.functional.normalize(torch.randn(pixels, dim, generator=g), dim=1)
    unused = torch.ones(pixels, dtype=torch.bool)
    unused[index[(index >= 0) & (index < pixels)]] = False
    features[unused] = torch.nan
    if maps:
        features = features.view(2, pixels // 2, dim).transpose(1, 2).contiguous()
    case = Case(features.to(dtype), index, labels, classes, tf32=tf32)
    for capacity in capacities:
        counts = torch.randint(1, capacity + 1, (classes,), generator=g)
        counts[0] = capacity
        if classes > 4:
            counts[len(case.queues) + 1 :: 7] = 0
        rows = torch.nn.functional.normalize(torch.randn(classes, capacity, dim, generator=g), dim=2)
        rows[torch.arange(capacity) >= counts[:, None]] = torch.nan
        case.queues.append(rows.to(queue_dtype or dtype))
        case.counts.append(counts)
    if capacities:
        own = torch.stack(case.counts).sum(0)[labels.clamp(0, classes - 1)]
        case.excluded = (torch.rand(anchors, generator=g) * (own + 2)).long() - 1  # sometimes behind the last key
    else:
        case.labels[case.labels == 1 << 40] = -1
        case.classes = 1 << 50
    return case


@dataclass
class Result:
    loss: Tensor
    anchor_loss: Tensor  # [R]
    positives: Tensor  # [R]
    grad: Tensor  # [P, D] (like the features while kernels run)
    terms: Tensor | None = None  # [P, D] the absolute values of what adds up to grad
    similarity: float = 0.0  # the largest sum of absolute terms of an inner product, divided by the temperature


def formula(case: Case, dtype: torch.dtype) -> Result:
    """All pairs at once, in ``dtype``."""
    used = (case.index >= 0) & (case.index < len(case.rows)) & (case.labels >= 0) & (case.labels < case.classes)
    places = torch.nonzero(used)[:, 0]
    anchors, labels = case.rows[case.index[places]].to(dtype), case.labels[places]
    if case.queues:
        parts = [
            (queue[c, : int(count[c])], torch.full((int(count[c]),), c))
            for c in range(case.classes)
            for queue, count in zip(case.queues, case.counts, strict=True)
        ]
        keys = torch.cat([rows for rows, _ in parts]).to(dtype)
        key_labels = torch.cat([label for _, label in parts])
        own = labels[:, None] == key_labels
        assert case.excluded is not None
        positive = own & (own.cumsum(1) - 1 != case.excluded[places, None])
    else:
        keys, own = anchors, labels[:, None] == labels
        positive = own & ~torch.eye(len(labels), dtype=torch.bool)
    z = anchors @ keys.t() / case.temperature
    away = torch.logsumexp(z.masked_fill(own, -torch.inf), 1, keepdim=True)
    sigma = torch.where(positive, torch.sigmoid(away - z), 0)
    share = torch.where(~own, torch.exp(z - away), 0)
    positives = positive.sum(1)
    each = torch.where(positive, torch.nn.functional.softplus(away - z), 0).sum(1) / positives.clamp_min(1)
    contributing = (positives > 0).sum().clamp_min(1)
    factor = case.loss_weight / BASE_TEMPERATURE / contributing / positives.clamp_min(1)
    slope = factor.to(dtype)[:, None] * (sigma.sum(1, keepdim=True) * share - sigma)
    if not case.queues:
        slope = slope + slope.t()
    zero = torch.zeros(case.rows.shape, dtype=dtype)
    pixel = case.index[places]
    return Result(
        loss=case.loss_weight * case.temperature / BASE_TEMPERATURE * each.sum() / contributing,
        anchor_loss=torch.zeros(len(used), dtype=dtype).index_put((places,), each),
        positives=torch.zeros(len(used), dtype=torch.int64).index_put((places,), positives),
        grad=zero.index_add(0, pixel, slope @ keys),
        terms=zero.index_add(0, pixel, slope.abs() @ keys.abs()),
        similarity=float((anchors.abs() @ keys.abs().t()).max()) / case.temperature if z.numel() else 0.0,
    )


def call(kernels: Kernels, way: Way, case: Case, results: Result | None = None, workspace: Tensor | None = None) -> int:
    """The bytes of workspace that are needed."""
    needed = torch.zeros(1, dtype=torch.int64)
    queues: list[Tensor | int | None] = []
    for queue, counts in zip(case.queues, case.counts, strict=True):
        queues += [queue, queue.shape[1], counts]
    queues += [None, 0, None] * (2 - len(case.queues))
    kernels.run(
        way, "run_infonce", TYPES.index(case.features.dtype),
        TYPES.index(case.queues[0].dtype) if case.queues else 0, int(case.tf32), case.capability, 227 << 10,
        case.multiprocessors, len(case.rows), case.rows.shape[1],
        case.features.shape[2] if case.features.dim() == 3 else 0, len(case.index), case.classes, len(case.queues),
        *queues, case.temperature, BASE_TEMPERATURE, case.loss_weight, case.features, case.index, case.labels,
        case.excluded, *((results.loss, results.anchor_loss, results.positives) if results else (None, None, None)),
        results.grad if results and case.gradient else None, workspace, needed,
    )  # fmt: skip
    return int(needed)


def run(kernels: Kernels, way: Way, case: Case) -> Result:
    """The kernels' results, each from memory full of garbage."""
    results = Result(
        loss=torch.full((), torch.nan),
        anchor_loss=torch.full((len(case.index),), torch.nan),
        positives=torch.full((len(case.index),), -7),
        grad=torch.full_like(case.features, torch.nan, dtype=grad_dtype(case.features)),
    )
    workspace = torch.full((max(1, call(kernels, way, case, results)),), 0xFF, dtype=torch.uint8)
    call(kernels, way, case, results, workspace)
    return replace(results, grad=replace(case, features=results.grad).rows)


def check(case: Case, result: Result) -> None:
    """Errors of at most four times those of the formula in float32, and those of rounding to the formats in use."""
    truth, plain = formula(case, torch.float64), formula(case, torch.float32)
    on_tensor_cores = (
        case.capability >= 80
        and case.rows.shape[1] % 16 == 0
        and case.rows.shape[1] <= 256
        and all(queue.dtype == case.features.dtype for queue in case.queues)
        and (case.features.dtype != FLOAT or case.tf32)
    )
    # z is exact to float32, but for tf32, whose keys lose 13 bits and whose anchors are rounded to 11;
    # weights of keys are rounded to the features' type, in tf32 as the anchors
    lost = 1.5 * 2**-10 if on_tensor_cores and case.features.dtype == FLOAT else 0.0
    weight = max(lost, torch.finfo(case.features.dtype).eps / 2 if case.features.dtype != FLOAT else 0.0)
    of_z = lost * truth.similarity
    float32 = torch.finfo(FLOAT).eps

    assert truth.terms is not None and torch.equal(result.positives, truth.positives)
    allowed = 4 * (plain.anchor_loss - truth.anchor_loss).abs().max() + 2 * of_z + 4 * float32 * truth.anchor_loss
    assert ((result.anchor_loss - truth.anchor_loss).abs() <= allowed).all()
    factor = case.loss_weight * case.temperature / BASE_TEMPERATURE
    allowed = 4 * (plain.loss - truth.loss).abs() + 4 * float32 * truth.loss + 2 * factor * of_z
    assert (result.loss - truth.loss).abs() <= allowed
    if case.gradient:
        allowed = 4 * (plain.grad - truth.grad).abs().max() + torch.finfo(result.grad.dtype).eps * truth.grad.abs()
        allowed = allowed + 4 * float32 * truth.terms.max()
        if on_tensor_cores:
            allowed = allowed + (weight + lost + 4 * of_z) * truth.terms
        assert ((result.grad - truth.grad).abs() <= allowed).all()
