"""Device nodes of one training step of the whole contrast branch, counted without a GPU.

``python -m benchmarks.nodes`` prints the table by part: how many kernels, copies and memory fills a CUDA graph of the
step would hold. The step runs on meta tensors, which have shapes and no memory; PyTorch's operators count as one node
each but for views, and ours as many as they launch (a test of the emulated kernels checks these numbers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pixcontrast import ContrastBranch, ops

# Launches of our operators; dense products of the library inside them count as one.
LAUNCHES = {
    "class_mean": 2,
    "class_mean_backward": 2,
    "class_order": 3,
    "gather_pixels": 1,
    "grouped_linear": 1,
    "grouped_outer": 2,
    "labels_at": 1,
    "memory_write": 1,
    "norm_dot": 1,
    "norm_dot_backward": 3,
    "norm_linear": 2,  # activations, product
    "norm_linear_backward": 7,  # activations, two products, sum of the bias, three of norm_dot_backward
    "norm_stats": 2,
    "positive": 4,
    "scale_": 1,
    "segment_topk": 1,
    "unit_rows": 1,
}
# PyTorch's operators that launch another number than one: nothing, or a copy more.
NODES = {
    "_local_scalar_dense": 0,
    "_unsafe_view": 0,
    "empty": 0,
    "empty_like": 0,
    "empty_strided": 0,
    "lift_fresh": 0,
    "new_empty": 0,
    "new_empty_strided": 0,
    "scatter": 2,
    "scatter_add": 2,
    "index_put": 2,
    "sort": 8,
    "cumsum": 2,
}


class NodeCounter(TorchDispatchMode):
    """Counts device nodes of what runs under it, in total and by part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = "other"
        self.nodes: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "pixcontrast":
            count = LAUNCHES[name]
        else:
            count = 0 if func.is_view or "Symbolic" in name else NODES.get(name, 1)
            if name in ("_to_copy", "to") and not isinstance(result, Tensor):
                count = 0
            if isinstance(result, Tensor) and result.numel() == 0:  # nothing to launch
                count = 0
        if count:
            self.nodes[self.part, name] += count
        return result

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """What runs inside counts as this part."""
        before, self.part = self.part, part
        yield
        self.part = before

    def by_part(self) -> dict[str, int]:
        parts: Counter[str] = Counter()
        for (part, _), count in self.nodes.items():
            parts[part] += count
        return dict(parts)

    @property
    def total(self) -> int:
        return sum(self.nodes.values())


@contextmanager
def on_meta() -> Iterator[None]:
    """Meta tensors as if they were on a GPU: the operators, and autocast, take them."""

    def in_autocast(rows: Tensor) -> Tensor:  # meta tensors have no autocast of their own
        return rows.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else rows

    with (
        patch.object(ops, "missing_kernel", lambda device, dtype: None),
        patch("pixcontrast.heads.in_autocast", in_autocast),
        torch.device("meta"),
    ):
        yield


def count_step(variant: str = "paper", autocast: bool = False) -> NodeCounter:
    """The branch's part of a Cityscapes step with DeepLabV2: remember, two losses, and their backward.

    Features ``[5, 2048, 65, 65]`` of labelled and unlabelled images and of the teacher, labels ``[5, 512, 512]``,
    19 classes, a memory of 256 rows a class.
    """
    with on_meta():
        branch, teacher = (ContrastBranch(2048, 19, variant=variant, quota=1, loss_weight=0.1) for _ in range(2))
        maps = [torch.randn(5, 2048, 65, 65) for _ in range(3)]
        labels = [torch.zeros(5, 512, 512, dtype=torch.int64) for _ in range(2)]
        logits = torch.randn(5, 19, 65, 65)
        student = [features.requires_grad_() for features in maps[:2]]
        for parameter in branch.parameters():  # a step after the first: gradients are added
            parameter.grad = None
        with NodeCounter() as counter:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                with counter.of("remember"):
                    branch.remember(maps[2], logits, labels[0], teacher=teacher)
                losses = []
                for name, features, label in zip(("labelled", "unlabelled"), student, labels, strict=True):
                    with counter.of(f"loss, {name}"):
                        losses.append(branch(features, label))
            with counter.of("backward of both"):
                torch.autograd.backward(losses)
        return counter


def table(counters: dict[str, NodeCounter]) -> str:
    """Parts as rows, one column for each counter."""
    parts = list(dict.fromkeys(part for counter in counters.values() for part in counter.by_part()))
    lines = [["part", *counters], ["---", *["---"] * len(counters)]]
    lines += [[part, *(str(counter.by_part().get(part, 0)) for counter in counters.values())] for part in parts]
    lines.append(["**all**", *(f"**{counter.total}**" for counter in counters.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    kinds: dict[str, dict[str, Any]] = {
        "float32": {},
        "bfloat16 autocast": {"autocast": True},
        "released, float32": {"variant": "released"},
    }
    counted = {name: count_step(**options) for name, options in kinds.items()}
    print(table(counted))
