"""Options that make a training faster: what they switch, and that results stay those of the options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn
from train_helpers import in_folder

from train.config import FitConfig, OptimConfig
from train.config_file import differing_fields, to_plain
from train.data import batches
from train.data.batches import Batches
from train.distributed import set_arithmetic
from train.session import open_session
from train.step import training_step


@pytest.fixture(autouse=True)
def flags() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]


def test_arithmetic_is_switched_and_the_default_is_that_of_pytorch():
    def state() -> tuple[bool, bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark

    usual = state()
    for optim, expected in (
        (OptimConfig(tf32="everything"), (True, True, False)),
        (OptimConfig(tf32="nothing", cudnn_benchmark=True), (False, False, True)),
        (OptimConfig(), (False, True, False)),
    ):
        set_arithmetic(optim)
        assert state() == expected
    assert state() == usual


def test_batches_are_pinned_for_a_gpu_only(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch):
    config = replace(tiny, data=replace(tiny.data, pin_memory=True))
    assert differing_fields(to_plain(config), to_plain(tiny)) == []  # a run may be resumed with and without
    session, given = open_session(config), []
    loader = batches.DataLoader
    monkeypatch.setattr(batches, "DataLoader", lambda *a, **k: given.append(k.pop("pin_memory")) or loader(*a, **k))
    next(iter(Batches(session.train, [0, 1], 2, 8, 0, "name", pin_memory=True)))
    assert given == [True]
    monkeypatch.setattr("train.session.Batches", lambda *a: given.append(a[-1]) or ())
    for device in ("cpu", "cuda"):
        list(replace(session, device=torch.device(device)).unlabelled_batches())
    assert given == [True, False, True]


def test_compiled_networks_train_as_they_are(tiny: FitConfig, monkeypatch: pytest.MonkeyPatch):
    """With the backend that compiles no code, so that the test is fast: graphs are traced and differentiated."""
    compiled: list[nn.Module] = []

    def compile_quickly(self: nn.Module) -> None:
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    tiny = replace(tiny, model=replace(tiny.model, aspp_dropout=0.0, decoder_dropout=0.0))  # it would draw otherwise
    results = []
    for name, on in (("plain", False), ("compiled", True)):
        config = in_folder(replace(tiny, optim=replace(tiny.optim, compile=on)), tiny.run.out / name)
        session = open_session(config)
        stream = session.batches()
        results.append([training_step(session.training, *next(stream)) for _ in range(4)])
        state = session.training.state_dict()
        open_session(replace(config, optim=replace(config.optim, compile=False))).training.load_state_dict(state)
    assert len(compiled) == 2  # of student and teacher
    for plain, fast in zip(*results, strict=True):
        assert plain.keys() == fast.keys()
        for name, loss in plain.items():
            torch.testing.assert_close(fast[name], loss, rtol=1e-3, atol=1e-4)
