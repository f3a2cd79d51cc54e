"""The whole branch as one CUDA graph. In a file of its own: a capture that fails leaves its process without a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from on_device import needs_gpu
from test_cuda import a_branch, a_branch_batch, step
from test_graphed import check_steps

from benchmarks.graphs import capture


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("objective", ["positive", "infonce"])
def test_the_whole_branch_fits_one_cuda_graph(objective: str) -> None:
    branch, batch = a_branch(objective, "cuda"), a_branch_batch("cuda")
    plain = copy.deepcopy(branch)

    def captured() -> dict[str, torch.Tensor]:
        branch.zero_grad(set_to_none=True)
        return {"loss": step(branch, *batch)}

    replay, nodes = capture(captured)
    assert nodes is None or nodes > 10
    print(f"{objective}: {nodes} nodes")
    before = 5  # steps that were taken to prepare the capture
    losses = [replay()["loss"].cpu().clone() for _ in range(3)]
    expected = [step(plain, *batch).cpu() for _ in range(before + 3)][before:]
    assert all(loss.isfinite() for loss in losses)
    if objective == "positive":  # no random choice: the steps after those
        torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-5)


@needs_gpu
@pytest.mark.cuda
def test_steps_of_a_graphed_branch_are_those_of_the_branch() -> None:
    check_steps("cuda")
