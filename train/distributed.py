"""Several processes that train one network, started by torchrun; alone, everything here does nothing.

Each process works on its part of every batch, and after every step all have the same networks: gradients are averaged
before the optimiser takes them, and running statistics of BatchNorm afterwards.

Gradients are averaged in one piece after the backward, and the learner is not wrapped in ``DistributedDataParallel``,
which needs every call to go through one forward of one module. A step calls the network twice and the branch three
times, and the branch has no gradient in the first steps, for which DDP would search the graph in each of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixcontrast.distributed import world_size


def join() -> None:
    """Join the process group that torchrun prepared, if it did: NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    cuda, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    if cuda and local < torch.cuda.device_count():  # otherwise the choice of the device will complain
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")


@contextmanager
def processes() -> Iterator[None]:
    """Context of a program that torchrun may have started: in a process group, where only rank 0 prints."""
    join()
    with nullcontext() if rank() == 0 else redirect_stdout(None):
        yield
    if world_size() > 1:  # after an error the other ranks may still be waiting; torchrun ends them
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0; 0 if it is alone. Only rank 0 writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def launcher() -> list[str]:
    """How this program was started: the command line up to ``-m``."""
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    return ["torchrun", "--nproc-per-node", processes] if processes else ["python"]


def seed_rank(seed: int) -> None:
    """Give the ranks other than 0 random numbers of their own; rank 0 goes on with those of a single process."""
    if rank() > 0:
        key = np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, rank()])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0]))


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of ``value`` over all ranks; no gradient goes through it."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of ``value`` over all ranks; no gradient goes through it. As it is, of any dtype, if there is only one."""
    return value if world_size() == 1 else sum_over_ranks(value.float()) / world_size()


def any_rank(flag: bool) -> bool:
    """Whether ``flag`` holds on any rank. Processes wait for each other, but not for their GPUs."""
    if world_size() == 1:
        return flag
    flags = torch.tensor(flag, dtype=torch.int64)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def gather(value: Any) -> list[Any]:
    """``value`` of every rank, on rank 0; on the others a list of nothing."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.gather_object(value, values if rank() == 0 else None)
    return values


def wait() -> None:
    """Until every rank is here, with all files that rank 0 wrote before."""
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
    """Average in one message: many small ones would each wait for the slowest rank."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
