"""A step in parts: the gradients of the undivided step, less memory, and a resume that is exact."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_helpers import assert_same_state, error_of, in_folder

from train.checkpoint import save_checkpoint
from train.config import FitConfig, parse_fit
from train.loop import fit
from train.paper.small_problem import same_arithmetic
from train.session import open_session
from train.step import training_step


def divided(config: FitConfig, parts: int) -> FitConfig:
    return replace(config, optim=replace(config.optim, accumulate=parts))


def gradients(config: FitConfig, steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses and gradients of the last of some steps in float64, where the network normalises by no batch."""
    with same_arithmetic():
        session = open_session(config)
        t, batches = session.training, session.batches()
        t.learner.double()  # the memory too
        for module in (*t.learner.network.modules(), *t.teacher.network.modules()):
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
        losses: dict[str, Tensor] = {}
        for _ in range(steps):
            losses = training_step(t, *next(batches))
    assert t.learner.branch is not None and t.learner.branch.memory.counts.sum() > 0
    return losses, {name: p.grad for name, p in t.learner.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [2, 3])
def test_losses_and_gradients_are_those_of_the_undivided_step(tiny: FitConfig, parts: int):
    """The losses, the contrast included, are of the whole batch; the first steps fill the memory."""
    model = replace(tiny.model, aspp_dropout=0.0, decoder_dropout=0.0)
    tiny = replace(tiny, data=replace(tiny.data, labelled_batch=6, unlabelled_batch=3), model=model)
    whole, part = (gradients(divided(tiny, n), 5) for n in (1, parts))
    assert {"contrast_labelled", "contrast_unlabelled", "pseudo", "entropy"} < whole[0].keys()
    for name, loss in whole[0].items():
        torch.testing.assert_close(part[0][name], loss, rtol=1e-9, atol=1e-12)
    assert part[1].keys() == whole[1].keys()
    for name, gradient in whole[1].items():
        torch.testing.assert_close(part[1][name], gradient, rtol=1e-7, atol=1e-11)


def test_dropout_is_drawn_once(tiny: FitConfig):
    """The second forward of a part has the masks of the first, or the gradients would be those of another network."""
    learner = open_session(replace(tiny, model=replace(tiny.model, decoder_dropout=0.5))).training.learner
    images = torch.rand(4, 3, 32, 32)
    results = []
    for parts in (1, 2):
        torch.manual_seed(1)
        if parts == 1:
            outputs = [learner(part)[0] for part in images.tensor_split(2)]
            logits = torch.cat(outputs)
        else:
            logits = learner.in_parts(images, 2)[0]
        learner.zero_grad()
        logits.square().sum().backward()
        results.append([p.grad for p in learner.network.parameters() if p.grad is not None])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


def test_each_part_updates_the_running_statistics_once(tiny: FitConfig):
    config = replace(tiny, data=replace(tiny.data, labelled_batch=4))
    session = open_session(divided(replace(config, method=replace(config.method, method="supervised")), 2))
    norms = [m for m in session.training.learner.network.modules() if isinstance(m, nn.BatchNorm2d)]
    training_step(session.training, *next(session.batches()))
    assert {int(norm.num_batches_tracked) for norm in norms if norm.num_batches_tracked is not None} == {2}


class Peak(TorchDispatchMode):
    """Bytes of tensors that operators have made and that are alive, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.most = max(self.most, sum(self.alive.values()))
        return result


def test_activations_take_less_memory(tiny: FitConfig):
    config = replace(
        tiny, data=replace(tiny.data, labelled_batch=12, crop=64), method=replace(tiny.method, method="supervised")
    )
    peaks = []
    for parts in (1, 2, 4):
        session = open_session(divided(config, parts))
        images = torch.randint(256, (12, 3, 64, 64), dtype=torch.uint8)
        batch = images, torch.randint(3, (12, 64, 64))
        training_step(session.training, batch, None)  # the optimiser makes its state
        with Peak() as peak:
            training_step(session.training, batch, None)
        peaks.append(peak.most)
    assert peaks[1] < 0.7 * peaks[0] and peaks[2] < 0.5 * peaks[0], peaks


def test_a_resumed_run_in_parts_is_exact(tiny: FitConfig):
    tiny = divided(replace(tiny, data=replace(tiny.data, labelled_batch=4)), 2)
    whole = in_folder(tiny, tiny.run.out / "whole")
    fit(whole)
    cut = in_folder(tiny, tiny.run.out / "cut")
    session = open_session(cut)
    for _, batch in zip(range(3), session.batches(), strict=False):
        training_step(session.training, *batch)
    cut.run.out.mkdir(parents=True)
    save_checkpoint(session.checkpoint, session.training, session.data)
    fit(cut)
    assert_same_state(whole.run.out / "last.pt", cut.run.out / "last.pt")
    assert "optim.accumulate 2 -> 1" in error_of(lambda: open_session(divided(cut, 1)))


def test_numbers_to_watch_need_the_graph_twice(tiny: FitConfig):
    session = open_session(divided(replace(tiny, data=replace(tiny.data, labelled_batch=4)), 2))
    batches, watch = session.batches(), {}
    for _ in range(5):
        training_step(session.training, *next(batches), watch)
    assert watch["gradient_ratio"].isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--accumulate", "0"], "--accumulate is 0: give a number above 0"),
        (["--accumulate", "5"], r"--accumulate 5 parts of 8 images (--labelled-batch): BatchNorm needs at least 2"),
        (["--accumulate", "4", "--unlabelled-batch", "3"], "4 parts of 6 images (--unlabelled-batch): "),
    ],
)
def test_parts_that_are_too_small_are_refused(options: list[str], message: str):
    assert message in error_of(parse_fit(options).check)
