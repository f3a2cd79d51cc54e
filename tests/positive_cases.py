"""Random inputs of the positive objective, shared by its tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from oracle import positive_pairs
from torch import Tensor

from pixcontrast.functional import PositiveOutput, positive_contrast
from pixcontrast.reference import accumulation_dtype, as_rows

IGNORE = 255
RESULTS = ("loss", "features", "weight_logits", "queue_weight_logits")


@dataclass
class Case:
    features: Tensor
    labels: Tensor
    queue: Tensor
    counts: Tensor
    weight_logits: Tensor | None
    queue_weight_logits: Tensor | None
    loss_weight: float = 1.0

    def to(self, dtype: torch.dtype) -> Case:
        """The case with rounded inputs; logits in the accumulation dtype."""
        logits = accumulation_dtype(dtype)
        return Case(
            self.features.to(dtype),
            self.labels,
            self.queue.to(dtype),
            self.counts,
            None if self.weight_logits is None else self.weight_logits.to(logits),
            None if self.queue_weight_logits is None else self.queue_weight_logits.to(logits),
            self.loss_weight,
        )

    def leaves(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Features and logits, detached, in their own memory format, with gradients switched on."""

        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_()

        return leaf(self.features), leaf(self.weight_logits), leaf(self.queue_weight_logits)  # type: ignore[return-value]

    def run(self, backend: str, incoming: float = 1.0) -> tuple[PositiveOutput, dict[str, Tensor]]:
        """Output, and loss with all gradients by name."""
        features, weight_logits, queue_weight_logits = self.leaves()
        output = positive_contrast(
            features,
            self.labels,
            self.queue,
            queue_counts=self.counts,
            weight_logits=weight_logits,
            queue_weight_logits=queue_weight_logits,
            ignore_index=IGNORE,
            loss_weight=self.loss_weight,
            backend=backend,
        )
        output.loss.backward(torch.full_like(output.loss, incoming))
        return output, _collect(output.loss, features, weight_logits, queue_weight_logits)

    def truth(self) -> dict[str, Tensor]:
        """The same from the pair loops, on these (rounded) inputs in float64."""
        features, weight_logits, queue_weight_logits = (None if t is None else t.double() for t in self.leaves())
        inputs = [t for t in (features, weight_logits, queue_weight_logits) if t is not None]
        for t in inputs:
            t.detach_().requires_grad_()
        flat = None if weight_logits is None else weight_logits.reshape(-1)
        clean = torch.where((self.labels != IGNORE).reshape(-1, 1), as_rows(features), 0)
        loss = positive_pairs(
            clean,
            self.labels.reshape(-1),
            self.queue.double(),
            self.counts,
            flat,
            queue_weight_logits,
            self.loss_weight,
        )
        if loss.requires_grad:
            loss.backward()
        return _collect(loss, features, weight_logits, queue_weight_logits)


def _collect(loss: Tensor, *leaves: Tensor | None) -> dict[str, Tensor]:
    found = {"loss": loss.detach()}
    for name, leaf in zip(RESULTS[1:], leaves, strict=True):
        if leaf is not None:
            found[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


def relative_errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Largest deviation of each result, as a share of the largest number of the truth."""
    return {
        name: float((results[name].double() - value).abs().max() / value.abs().max().clamp_min(1e-300))
        for name, value in truth.items()
        if value.numel()
    }


def full_case() -> Case:
    """Two classes, both with pixels and memory, and every weight."""
    case = next(c for c in map(random_case, range(80)) if len(c.counts) == 2 and c.weight_logits is not None
                and c.queue_weight_logits is not None and c.features.dim() == 2 and c.counts.min() >= 2)  # fmt: skip
    assert case.run("reference")[0].loss > 0
    return case


def random_case(seed: int) -> Case:
    """A small case that may have absent classes, classes of one row, ignored pixels, empty and half-full memory.

    At least two channels: with one, all gradients of the features are exactly zero (see the test of its own).
    """
    g = torch.Generator().manual_seed(seed)

    def pick(*options):
        return options[int(torch.randint(len(options), (), generator=g))]

    classes, dim, rows = pick(1, 2, 5, 19, 150), pick(2, 3, 7, 8, 20, 37), pick(2, 3, 6, 6)
    shape = pick((23,), (64,), (1, 5, 7), (2, 3, 4), (3, 1, 17))
    features = torch.randn(shape[0], dim, *shape[1:], generator=g, dtype=torch.float64)
    features = features * torch.empty(shape[0], *[1] * (features.dim() - 1)).uniform_(0.01, 30, generator=g)
    if features.dim() == 4 and pick(True, False):
        features = features.to(memory_format=torch.channels_last)
    used = pick(classes, min(3, classes), min(7, classes))  # the other classes are absent
    labels = torch.randint(0, used, shape, generator=g)
    labels = torch.where(torch.rand(shape, generator=g) < pick(0.0, 0.2), IGNORE, labels)
    counts = torch.full((classes,), rows)
    counts = torch.where(torch.rand(classes, generator=g) < 0.3, torch.randint(0, 3, (classes,), generator=g), counts)
    spread = pick(1.0, 8.0)
    weight_logits = torch.randn(shape, generator=g, dtype=torch.float64) * spread
    queue_weight_logits = torch.randn(classes, rows, generator=g, dtype=torch.float64) * spread
    queue = torch.randn(classes, rows, dim, generator=g, dtype=torch.float64) * pick(1.0, 50.0)
    return Case(
        features,
        labels,
        queue,
        counts,
        pick(weight_logits, weight_logits, None),
        pick(queue_weight_logits, queue_weight_logits, None),
        pick(1.0, 0.1),
    )
