"""Several processes that train one network, started by torchrun; with one process, everything here does nothing.

Each process works on its part of every batch, and after every step all have the same networks: gradients are averaged
before the optimiser takes them, and running statistics of BatchNorm afterwards.

Gradients are averaged in one message after the backward. The learner is not wrapped in ``DistributedDataParallel``
(DDP), which expects one forward of one module in a step: a step calls the network twice and the branch three times. In
the first steps the branch has no gradient, so DDP would have to search the graph for unused parameters in every step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixcontrast.distributed import world_size
from train.config import OptimConfig
from train.errors import UserError, reason


def join() -> None:
    """Join the process group if torchrun started this process: NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    cuda, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if cuda and local < torch.cuda.device_count():  # otherwise choose_device raises the error
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


@contextmanager
def processes() -> Iterator[None]:
    """Context of a program that torchrun may have started: in a process group, where only rank 0 prints."""
    join()
    with nullcontext() if rank() == 0 else redirect_stdout(None):
        yield
    if world_size() > 1:  # not after an error: other ranks may still be waiting, and torchrun ends them
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0; 0 if there is one only. Only rank 0 writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def launcher() -> list[str]:
    """How this program was started: the command line up to ``-m``."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    return ["torchrun", "--nproc-per-node", processes] if processes else ["python"]


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA, else MPS, else the CPU; otherwise the device of that name. Each process takes a GPU of its own.

    Raises:
        UserError: there is no such device, or a single one for several processes.
    """
    alone = world_size() == 1
    if name == "auto":
        mps = alone and torch.backends.mps.is_available()  # its tensors cannot be exchanged
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if not alone and name not in ("cuda", "cpu"):
        raise UserError(f"--device {name} cannot be shared by {world_size()} processes: give cuda, or cpu")
    if not alone and name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise UserError(f"device {name!r} cannot be used ({reason(error)}): try --device auto or cpu") from error
    return device


def set_arithmetic(optim: OptimConfig) -> None:
    """Set what CUDA may do in this process to float32 and to the order of sums."""
    torch.set_float32_matmul_precision("high" if optim.tf32 == "everything" else "highest")
    torch.backends.cudnn.allow_tf32 = optim.tf32 != "nothing"
    torch.backends.cudnn.benchmark = optim.cudnn_benchmark


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of ``value`` over all ranks, without gradient."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of ``value`` over all ranks, in float32, without gradient; with one rank, ``value`` itself."""
    return value if world_size() == 1 else sum_over_ranks(value.float()) / world_size()


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on any rank. Processes wait for each other, without synchronising with their GPUs."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(flag, dtype=torch.int64)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, on rank 0; on the others a list of None."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.gather_object(value, values if rank() == 0 else None)
    return values


def wait() -> None:
    """Wait until every rank is here; then all see the files that rank 0 wrote before."""
    any_rank(False)


def average_gradients(module: nn.Module) -> None:
    """Replace the gradients of ``module``, of the same parameters on every rank, by their means over the ranks."""
    if world_size() > 1:
        _average([p.grad for p in module.parameters() if p.grad is not None])


def average_statistics(*modules: nn.Module) -> None:
    """Replace the running statistics of all BatchNorm layers by their means over the ranks."""
    if world_size() > 1:
        buffers = [entry for module in modules for entry in module.named_buffers()]
        _average([buffer for name, buffer in buffers if name.endswith(("running_mean", "running_var"))])


def _average(tensors: list[Tensor]) -> None:
    """Average in one message; each of many small ones would wait for the slowest rank."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
