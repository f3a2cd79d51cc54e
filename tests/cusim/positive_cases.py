"""Cases of the positive objective for its kernels, and its formulas."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cusim.kernels import WAYS, Kernels, Way, grad_dtype

TYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORE = 255
GRADIENTS = ("features", "weight_logits", "mean")
PLAIN = WAYS[0]


@dataclass
class Case:
    """``features [P, D]`` or ``[B, D, H*W]``, ``labels [P]``, logits ``weights [P]``, ``mean [C, D]``,
    memory ``counts [C]`` and what to differentiate by."""

    features: Tensor
    labels: Tensor
    weight_logits: Tensor | None
    mean: Tensor
    counts: Tensor
    gradients: tuple[str, ...] = GRADIENTS
    loss_weight: float = 0.7
    multiprocessors: int = 1

    @property
    def rows(self) -> Tensor:
        """``[P, D]``"""
        return self.features if self.features.dim() == 2 else self.features.transpose(1, 2).flatten(0, 1)


def make_case(
    dim: int, classes: int, dtype: torch.dtype, maps: tuple[int, int] | None = None, pixels: int = 75, seed: int = 0
) -> Case:
    """With an absent class, one of one pixel, one of one memory row, where there are classes enough; with ignored
    pixels that hold NaN, unknown labels, a zero row, and logits of any size. ``maps``: images and pixels of each."""
    g = torch.Generator().manual_seed(seed)
    pixels = pixels if maps is None else maps[0] * maps[1]
    labels = torch.randint(0, classes, (pixels,), generator=g)
    labels = torch.where(torch.rand(pixels, generator=g) < 0.6, labels[0], labels)
    counts = torch.full((classes,), 6)
    if classes > 4:
        absent, single, forgotten = (labels[0] + torch.tensor([1, 2, 3])) % classes
        labels[(labels == absent) | (labels == single)] = labels[0]
        labels[pixels // 2] = single
        counts[forgotten] = 1
    labels[torch.rand(pixels, generator=g) < 0.15] = IGNORE
    labels[3:pixels:29] = -1
    labels[4:pixels:31] = classes
    rows = torch.randn(pixels, dim, generator=g) * 3
    rows[5] = 0
    rows[labels == IGNORE] = torch.nan
    if classes > 4:
        rows[(labels == single) | (labels == forgotten)] = torch.nan  # they take no part
    weight_logits = torch.randn(pixels, generator=g) * 2  # of more spread, one pixel rules a class and S - cos cancels
    weight_logits[1:pixels:17] = 1e4
    weight_logits[2:pixels:17] = -1e4
    largest = labels == labels[labels != IGNORE].mode().values
    weight_logits[largest] = (
        weight_logits[largest].clamp(max=0) - 200
    )  # sigmoids of a class that are all zero in float32
    mean = torch.nn.functional.normalize(torch.randn(classes, dim, generator=g), dim=1)
    return Case(as_maps(rows.to(dtype), maps), labels, weight_logits, mean, counts)


def as_maps(rows: Tensor, maps: tuple[int, int] | None) -> Tensor:
    return rows if maps is None else rows.view(*maps, -1).transpose(1, 2).contiguous()


def formula(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything computed in ``dtype``, class by class; gradients of the features as rows ``[P, D]``."""
    rows, mean, classes = case.rows.to(dtype), case.mean.to(dtype), len(case.mean)
    scale = case.loss_weight / classes
    logits = torch.zeros(len(rows)) if case.weight_logits is None else case.weight_logits
    logits = logits.to(dtype)
    losses = torch.zeros(classes, dtype=dtype)
    found = {
        "features": torch.zeros_like(rows),
        "weight_logits": torch.zeros_like(logits),
        "mean": torch.zeros_like(mean),
    }
    pixels = torch.zeros(classes, dtype=torch.int64)
    for c in range(classes):
        members = torch.nonzero((case.labels == c) & (case.labels != IGNORE))[:, 0]
        pixels[c] = len(members)
        if len(members) < 2 or case.counts[c] < 2:
            continue
        norms = torch.linalg.vector_norm(rows[members], dim=1, keepdim=True)
        inverse = torch.where(norms < 1e-12, 0, 1 / norms)
        unit = rows[members] * inverse
        w = torch.softmax(torch.nn.functional.logsigmoid(logits[members]), 0)[:, None]
        cosine = unit @ mean[c][:, None]
        similarity = (w * cosine).sum()
        losses[c] = 1 - similarity
        found["features"][members] = -scale * w * (mean[c] - cosine * unit) * inverse
        found["weight_logits"][members] = (scale * w * torch.sigmoid(-logits[members, None]) * (similarity - cosine))[
            :, 0
        ]
        found["mean"][c] = -scale * (w * unit).sum(0)
    known = (case.labels >= 0) & (case.labels < classes)
    found |= {"class_loss": losses, "loss": losses.sum() * scale, "pixels": pixels}
    return found | {"unknown": (~known & (case.labels != IGNORE)).sum()}


def run(kernels: Kernels, way: Way, case: Case) -> dict[str, Tensor]:
    """The kernels' results, each from memory full of garbage."""

    def garbage(like: Tensor, wanted: bool = True) -> Tensor | None:
        return torch.full_like(like, torch.nan if like.is_floating_point() else -7) if wanted else None

    classes, dim = case.mean.shape
    logits = torch.zeros(len(case.labels))
    results = {
        "loss": garbage(torch.zeros(())),
        "class_loss": garbage(torch.zeros(classes)),
        "pixels": garbage(case.counts),
        "unknown": garbage(case.counts.sum()),
        "features": garbage(case.features.to(grad_dtype(case.features)), "features" in case.gradients),
        "weight_logits": garbage(logits, "weight_logits" in case.gradients and case.weight_logits is not None),
        "mean": garbage(case.mean, "mean" in case.gradients),
    }
    room = torch.zeros(1, dtype=torch.int64)

    def call(workspace: np.ndarray | None) -> None:
        map_pixels = 0 if case.features.dim() == 2 else case.features.shape[2]
        kernels.run(
            way, "run_positive", TYPES.index(case.features.dtype), case.multiprocessors, len(case.labels), dim,
            map_pixels, classes, IGNORE, case.loss_weight, case.features, case.labels, case.weight_logits, case.mean,
            case.counts, *results.values(), workspace, room,
        )  # fmt: skip

    call(None)
    call(np.full(int(room), 0xA5, np.uint8))
    found = {name: result for name, result in results.items() if result is not None}
    if "features" in found:
        found["features"] = replace(case, features=found["features"]).rows
    return found


def close_enough(result: Tensor, truth: Tensor, plain: Tensor) -> None:
    """The result errs at most 4 times as much as the formula in float32, rounding of the result added to that."""
    error = (result.double() - truth).abs().max()
    rounding = torch.finfo(result.dtype).eps / 2 * truth.abs().max()
    usual = (plain.to(result.dtype).double() - truth).abs().max() + rounding
    assert error <= 4 * usual, f"off by {error:.3g}, the formula in float32 by {usual:.3g}"


def check(results: dict[str, Tensor], case: Case) -> None:
    truth, plain = formula(case, torch.float64), formula(case, torch.float32)
    assert "features" not in results or not results["features"][case.labels == IGNORE].any()
    for name, result in results.items():
        if name == "features":  # as backward gives it for grad_output = 1
            result = result.to(case.features.dtype)
        if result.is_floating_point():
            close_enough(result, truth[name], plain[name])
        else:
            assert torch.equal(result, truth[name]), name
