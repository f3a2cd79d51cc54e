"""Training with two processes: steps as of one process, equal networks, interrupts, exact resume, torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import ROOT, TINY_OPTIONS, assert_same_state, in_folder, quietly

import train.loop
from train.augment import AugmentConfig
from train.checkpoint import read_checkpoint
from train.command_line import main
from train.config import FitConfig
from train.data.folder import open_folder
from train.distributed import any_rank, choose_device, mean_over_ranks, rank
from train.errors import Interrupted, UserError
from train.evaluate import evaluate, evaluate_checkpoint, load_learners
from train.logs import read_metrics
from train.loop import fit
from train.losses import entropy_loss, pseudo_label_loss, supervised_loss
from train.models import synchronise_batchnorm
from train.session import build_training, open_session
from train.step import training_step

WORLD, SYNCS = 2, ("gather", "reduce")
Results = dict[str, Any]


@pytest.fixture(scope="module")
def shared(tiny_session: FitConfig) -> FitConfig:
    """``tiny`` with batches that two processes can share."""
    return replace(tiny_session, data=replace(tiny_session.data, labelled_batch=4, unlabelled_batch=4))


def with_sync(config: FitConfig, sync: Any) -> FitConfig:
    return replace(config, method=replace(config.method, memory_sync=sync, memory_rows=64))


def plain_steps(config: FitConfig, reverse: bool = False) -> Results:
    """Losses, averaged over the ranks, and trained weights of six steps without random numbers and batch statistics.

    In the last but one, the second half of the labelled images has no labels: all that rank 1 has.

    Args:
        config: of the method ``contrast``.
        reverse: take the images of each batch in the opposite order, which changes nothing but rounding.
    """
    session = open_session(config)
    t = session.training
    t.weak = t.strong = AugmentConfig(flip=0.0)
    assert t.learner.branch is not None
    t.learner.branch.quota = 2  # no row is ever replaced: which one would depend on the order
    for learner in (t.learner, t.teacher):
        learner.eval()
        learner.train = lambda mode=True, learner=learner: learner
    losses: list[Results] = []
    for (images, labels), unlabelled in session.batches():
        assert unlabelled is not None
        if t.step == 4:
            labels = labels.clone()
            labels[2:] = 255
            labels[:] = 255 if rank() == 1 else labels
        batches = (images, labels), unlabelled
        if reverse:
            batches = tuple((some.flip(0), others.flip(0)) for some, others in batches)
        losses.append({name: mean_over_ranks(loss) for name, loss in training_step(t, *batches).items()})
        if t.step == 6:
            break
    weights = [p.detach() for learner in (t.learner, t.teacher) for p in learner.parameters()]
    return {"losses": losses, "weights": weights, "memory": t.learner.branch.memory.counts}


def three_losses(number: int | None) -> Results:
    """The losses of a rank's half of a batch, or of the whole batch; the halves have labels for different shares."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=generator)
    labels, confidence = torch.randint(3, (4, 6, 6), generator=generator), torch.rand(4, 6, 6, generator=generator)
    labels[:2, 1:] = 255
    labels[2:, 5:] = 255
    weights = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    mine = slice(None) if number is None else slice(2 * number, 2 * number + 2)
    logits, labels = logits[mine].requires_grad_(), labels[mine]
    losses = [
        supervised_loss(logits, labels, weights, 255),
        pseudo_label_loss(logits, labels, confidence[mine].double(), weights, 255),
        entropy_loss(logits, labels, 255),
        entropy_loss(logits, torch.full_like(labels, 255) if number != 1 else labels, 255),  # rank 0 without any
    ]
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    return {"losses": torch.stack(losses).detach(), "gradients": torch.stack(gradients)}


def random_steps(config: FitConfig) -> Results:
    """Networks after four steps with everything, and the next random number."""
    session = open_session(config)
    for _, batches in zip(range(4), session.batches(), strict=False):
        training_step(session.training, *batches)
    states = session.training.learner.state_dict(), session.training.teacher.state_dict()
    networks = [t for state in states for name, t in state.items() if "num_batches" not in name]
    return {"networks": networks, "random": torch.rand(())}


def interrupted_fit(config: FitConfig, step: int) -> int:
    """Train while rank 1 gets a SIGTERM in ``step``, then go on to the end; after how many steps it was interrupted.

    It comes twice, from the scheduler and from torchrun.
    """
    original = train.loop.training_step

    def with_signal(t: Any, *batches: Any) -> Any:
        if t.step == step and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(t, *batches)

    train.loop.training_step = with_signal
    try:
        fit(config)
    except Interrupted:
        saved = read_checkpoint(config.run.out / "last.pt")["training"]["step"]
    train.loop.training_step = original
    fit(config)
    return saved


def _rank(number: int, folder: str, config: FitConfig) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=number, world_size=WORLD)
    results: Results = {f"plain {sync}": plain_steps(with_sync(config, sync)) for sync in SYNCS}
    results["losses"] = three_losses(number)
    results["random"] = random_steps(config)
    results["any"] = [any_rank(flag) for flag in (False, number == 1, True)]
    reduce = with_sync(config, "reduce")
    fit(in_folder(reduce, Path(folder) / "whole"))
    evaluate_checkpoint(Path(folder) / "whole" / "last.pt", per_image=Path(folder) / "images.csv")
    results["interrupted after"] = interrupted_fit(in_folder(reduce, Path(folder) / "broken"), 4)
    torch.save(results, f"{folder}/{number}.pt")
    torch.distributed.destroy_process_group()


def run_all(processes: BaseContext, target: Callable[..., None], arguments: list[tuple[Any, ...]]) -> None:
    """Run ``target`` in one process for each tuple of arguments; all must succeed."""
    started = [processes.Process(target=quietly, args=(target, *args)) for args in arguments]
    for process in started:
        process.start()
    for process in started:
        process.join(600)
    assert [process.exitcode for process in started] == [0] * len(arguments)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ranks(shared: FitConfig, work: Path, processes: BaseContext) -> list[Results]:
    """Results of :func:`_rank` on each rank."""
    run_all(processes, _rank, [(number, str(work), shared) for number in range(WORLD)])
    return [torch.load(work / f"{number}.pt", weights_only=True) for number in range(WORLD)]


def distance(some: Results, others: Results) -> float:
    """Largest difference of two trained weights, relative to the largest weight of the tensor."""
    pairs = zip(some["weights"], others["weights"], strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs)


@pytest.mark.parametrize("sync", SYNCS)
def test_two_processes_take_the_steps_of_one(shared: FitConfig, ranks: list[Results], sync: str):
    config = with_sync(shared, sync)
    one, other_order = plain_steps(config), plain_steps(config, reverse=True)
    results = [result[f"plain {sync}"] for result in ranks]
    assert "contrast_labelled" in one["losses"][-1] and 0 < one["memory"].max() < 64
    seen = [result["memory"] for result in results]
    assert torch.equal(sum(seen) if sync == "reduce" else seen[1], one["memory"])
    for result in results:
        for step, expected in zip(result["losses"], one["losses"], strict=True):
            torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)
        assert distance(result, one) < 4 * distance(other_order, one) < 1e-3


def test_mean_of_the_losses_over_the_ranks_is_the_loss_of_the_whole_batch(ranks: list[Results]):
    whole = three_losses(None)
    mean = sum(result["losses"]["losses"] for result in ranks) / WORLD
    torch.testing.assert_close(mean[:3], whole["losses"][:3], rtol=1e-12, atol=0)
    gradients = torch.cat([result["losses"]["gradients"] for result in ranks], dim=1) / WORLD
    torch.testing.assert_close(gradients[:3], whole["gradients"][:3], rtol=1e-11, atol=1e-16)
    assert ranks[0]["losses"]["losses"][3] == 0 and (gradients[3, :2] == 0).all()


def test_ranks_have_the_same_networks_and_their_own_random_numbers(ranks: list[Results]):
    first, second = (result["random"] for result in ranks)
    assert len(first["networks"]) > 250
    assert all(torch.equal(*pair) for pair in zip(first["networks"], second["networks"], strict=True))
    assert first["random"] != second["random"]


def test_any_rank(ranks: list[Results]):
    assert [result["any"] for result in ranks] == [[False, True, True]] * WORLD


def test_interrupt_of_one_process_stops_all_after_the_same_step_and_resume_is_exact(ranks: list[Results], work: Path):
    assert [result["interrupted after"] for result in ranks] == [5, 5]
    assert_same_state(work / "whole" / "last.pt", work / "broken" / "last.pt")
    state = read_checkpoint(work / "whole" / "last.pt")["training"]
    (other,) = state["other_ranks"]
    assert not torch.equal(other["memory"]["rows"], state["learner"]["branch.memory.rows"])
    steps = [[record["step"] for record in read_metrics(work / name)] for name in ("whole", "broken")]
    assert steps == [list(range(1, 9))] * 2


def test_evaluation_shared_by_two_processes_is_that_of_one(ranks: list[Results], work: Path, folder: Path):
    learners, _ = load_learners(work / "whole" / "last.pt")
    scores = evaluate(learners, open_folder(folder, "val"))["student"]
    record = read_metrics(work / "whole")[-1]
    assert record["miou/student"] == scores.miou and record["iou_student/grass"] == scores.iou["grass"]
    evaluate_checkpoint(work / "whole" / "last.pt", per_image=work / "alone.csv")
    assert (work / "images.csv").read_text() == (work / "alone.csv").read_text()  # with the images of both


def test_checkpoint_of_two_processes_is_refused_by_one(shared: FitConfig, ranks: list[Results], work: Path):
    with pytest.raises(UserError, match="was trained by 2 processes, this is one of 1: start as many, or choose"):
        open_session(in_folder(with_sync(shared, "reduce"), work / "whole"))


@pytest.mark.parametrize(
    ("sizes", "processes", "message"),
    [
        ({"labelled_batch": 5}, 2, "--labelled-batch is 5, which 2 processes cannot share equally: give a multiple"),
        ({"unlabelled_batch": 5}, 2, "--unlabelled-batch is 5, which 2 processes cannot share"),
        ({"labelled_batch": 2}, 2, "--labelled-batch is 2 for 2 processes: BatchNorm needs at least 2 .*of a process"),
    ],
)
def test_batches_that_cannot_be_shared(shared: FitConfig, sizes: dict[str, int], processes: int, message: str):
    config = replace(shared, data=replace(shared.data, **sizes))
    with pytest.raises(UserError, match=message):
        config.check(processes)
    config.check(1)


def test_options_that_do_not_go_with_several_processes(shared: FitConfig, monkeypatch: pytest.MonkeyPatch):
    for module in ("train.session", "train.distributed"):
        monkeypatch.setattr(f"{module}.world_size", lambda: 2)
    with pytest.raises(UserError, match="--device cuda:1 cannot be shared by 2 processes: give cuda, or cpu"):
        choose_device("cuda:1")
    config = replace(shared, model=replace(shared.model, sync_batchnorm=True))
    with pytest.raises(UserError, match="--sync-batchnorm: PyTorch has it for CUDA, not for cpu; leave it out"):
        build_training(config, 3, 255, 6, 6)


def test_synchronised_batchnorm_is_the_same_network(shared: FitConfig):
    network, images = build_training(shared, 3, 255, 6, 6).learner.network.eval(), torch.randn(2, 3, 32, 32)
    expected, names = network(images), list(network.state_dict())
    synchronised = synchronise_batchnorm(network)
    torch.testing.assert_close(synchronised(images), expected)
    assert list(synchronised.state_dict()) == names
    layers = [layer for layer in synchronised.modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(layers) > 10 and all(isinstance(layer, torch.nn.SyncBatchNorm) for layer in layers)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _as_torchrun_starts_it(number: int, port: str, arguments: list[str], output: Path) -> None:
    """Run the command in this process with the environment that torchrun gives to its process ``number``."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    with open(output, "w") as file, redirect_stdout(file):
        sys.exit(main(arguments))


def test_torchrun_trains_stops_and_goes_on(tmp_path: Path, processes: BaseContext):
    """On the built-in tiles. The SIGTERM of a scheduler reaches torchrun, which passes it on, as it does Ctrl-C."""
    out, steps = tmp_path / "run", 24  # enough that the signal arrives before the end on a busy machine
    arguments = ["fit", "--out", str(out), "--crop", "32", "--labelled-batch", "4", *TINY_OPTIONS]
    arguments += ["--memory-start", "0", "--contrast-start", "0", "--steps", str(steps), "--log-every", "1"]
    arguments += ["--memory-sync", "reduce"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "text": True}
    command = [sys.executable, *launcher, "-m", "train", *arguments]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    deadline = time.monotonic() + 600
    while len(read_metrics(out)) < 2:
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=600)
    done = read_checkpoint(out / "last.pt")["training"]["step"]
    assert first.returncode != 0 and 2 <= done < steps
    assert errors.count(f"interrupted after step {done} of {steps}") == 1
    assert "torchrun --nproc-per-node 2 -m train" in errors

    port, outputs = free_port(), [tmp_path / f"{number}.txt" for number in range(WORLD)]
    run_all(processes, _as_torchrun_starts_it, [(number, port, arguments, outputs[number]) for number in range(WORLD)])
    assert [record["step"] for record in read_metrics(out)] == list(range(1, steps + 1))
    assert [output.read_text().count("| **mean** |") for output in outputs] == [1, 0]  # rank 0 alone prints
