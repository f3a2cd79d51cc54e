"""CUDA graphs of steps that are declared capturable."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .problem import Step

WARM_UP = 3  # calls before a capture, in which libraries load and memory is found


class CaptureError(Exception):
    """A declared step could not be captured. The process must not use the GPU any more."""


class Waits(Exception):
    """A declared step waits for the device after all. It was not captured, and the process is fine."""


def capture(step: Step) -> tuple[Step, int | None]:
    """A step that replays what ``step`` does, and its number of device nodes.

    A call under PyTorch's synchronisation check comes first, because a wait inside a capture would end the process's
    use of the GPU.

    Raises:
        Waits: the check found a wait.
        CaptureError: the capture failed.
    """
    _refuse_waits(step)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    try:
        with torch.cuda.graph(graph):
            results = step()
        nodes = node_count(graph)
        graph.instantiate()
    except RuntimeError as error:
        raise CaptureError(str(error).splitlines()[0]) from error

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return results

    return replay, nodes


def _refuse_waits(step: Step) -> None:
    step()
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        raise Waits(str(error).splitlines()[0]) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def node_count(graph: torch.cuda.CUDAGraph) -> int | None:
    """Kernels, copies and fills of a captured graph, as the driver counts them; ``None`` where it cannot be asked."""
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes
        handle, count = ctypes.c_void_p(graph.raw_cuda_graph()), ctypes.c_size_t()
        status = ask(handle, None, ctypes.byref(count))
    except (OSError, AttributeError, RuntimeError):
        return None
    return count.value if status == 0 else None
