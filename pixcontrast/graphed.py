"""The contrast branch as CUDA graphs: for networks so small that the host, not the device, limits a step."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from .branch import ContrastBranch


class GraphedBranch(nn.Module):
    """A :class:`ContrastBranch` that is captured once and then replayed: one launch for :meth:`remember`, one for the
    loss and one for its backward, instead of about a hundred each.

    Every call copies its arguments into static buffers, so all of them must have the shapes and dtypes of the first
    ones. Options that are read when the graph is made (training mode, autocast) stay as they were then. On a CPU the
    same copies are made and the branch runs as it is: the results are those of the branch either way. ::

        graphed = GraphedBranch(branch, features, labels, teacher=teacher_branch, logits=logits)
        graphed.remember(teacher_features, logits, labels)
        loss = graphed(features, labels)

    Args:
        branch: whose parameters are trained and whose memory is filled. Capturing leaves it as it was.
        features: ``[B, in_channels, h, w]``, as later ones; requires a gradient if they will.
        labels: ``[B, H, W]`` int64.
        logits: ``[B, C, h', w']`` for :meth:`remember`; ``None``: every labelled pixel is good enough.
        teacher: as for :meth:`ContrastBranch.remember`. Its parameters may change in place between calls.
        predict: predicted classes (infonce).
        warmup: calls before the capture, in which libraries choose and allocate what they need.

    Raises:
        ValueError, TypeError: what the branch raises; later, arguments of another shape or dtype, named.
    """

    def __init__(
        self,
        branch: ContrastBranch,
        features: Tensor,
        labels: Tensor,
        *,
        logits: Tensor | None = None,
        teacher: ContrastBranch | None = None,
        predict: Tensor | None = None,
        warmup: int = 3,
    ) -> None:
        super().__init__()
        self.branch = branch
        self._teacher = [teacher]  # not a submodule: its parameters are no part of this module
        remembered = _present(features=features.detach(), logits=logits, labels=labels)
        self._static = {name: value.clone() for name, value in remembered.items()}  # they keep their place in memory
        self._graph: torch.cuda.CUDAGraph | None = None
        given = _present(features=features, labels=labels, predict=predict)
        self._expected = {name: torch.empty_like(value, device="meta") for name, value in given.items()}
        self._loss: nn.Module = _Loss(branch)
        if features.device.type != "cuda":
            return
        state = copy.deepcopy(branch.state_dict())
        tensors = tuple(value.clone().detach().requires_grad_(value.requires_grad) for value in given.values())
        self._loss = cast(
            nn.Module,
            torch.cuda.make_graphed_callables(self._loss, tensors, num_warmup_iters=warmup, allow_unused_input=True),
        )
        if branch.capacity > 0:
            self._graph = self._capture(warmup)
        branch.load_state_dict(state)

    def forward(self, features: Tensor, labels: Tensor, predict: Tensor | None = None) -> Tensor:
        """The loss of :class:`ContrastBranch`, a scalar with a gradient for ``features`` and the parameters."""
        tensors = _present(features=features, labels=labels, predict=predict)
        _check(tensors, self._expected)
        return self._loss(*tensors.values())

    @torch.no_grad()
    def remember(self, features: Tensor, logits: Tensor | None, labels: Tensor) -> None:
        """:meth:`ContrastBranch.remember` with the teacher of the capture."""
        given = _present(features=features, logits=logits, labels=labels)
        _check(given, self._static)
        for name, value in given.items():
            self._static[name].copy_(value)
        if self._graph is None:
            self._remember()
        else:
            self._graph.replay()

    def _remember(self) -> None:
        static = self._static
        self.branch.remember(static["features"], static.get("logits"), static["labels"], teacher=self._teacher[0])

    def _capture(self, warmup: int) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                self._remember()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._remember()
        return graph


class _Loss(nn.Module):
    """The branch with positional arguments, as ``make_graphed_callables`` wants it."""

    def __init__(self, branch: ContrastBranch) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, features: Tensor, labels: Tensor, predict: Tensor | None = None) -> Tensor:
        return self.branch(features, labels, predict)


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if value is not None}


def _check(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if given.keys() != expected.keys():
        raise ValueError(f"GraphedBranch was captured with {', '.join(expected)}; got {', '.join(given)}")
    for name, value in given.items():
        shape, dtype = expected[name].shape, expected[name].dtype
        if (value.shape, value.dtype) != (shape, dtype):
            raise ValueError(
                f"GraphedBranch was captured with {name} {tuple(shape)} {dtype}, got {tuple(value.shape)} "
                f"{value.dtype}: make another one for this shape"
            )
