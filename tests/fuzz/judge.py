"""A call of a function that can be made by either backend and in float64, and what must hold of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .draw import Draw

Tensors = dict[str, Tensor]
Function = Callable[[str, Tensors], Tensors]  # backend and inputs to results, the differentiable one first


@dataclass
class Call:
    """``inputs`` by name; ``leaves`` of them get gradients.

    ``terms`` bounds the terms whose sum each result is, where they may cancel; ``length`` is how many there are.
    """

    function: Function
    inputs: Tensors
    leaves: tuple[str, ...] = ()
    terms: Callable[[Tensors], dict[str, float]] = lambda inputs: {}
    length: int = 1
    grad_output: float = 1.0
    valid: Tensors = field(default_factory=dict)  # of inputs, which rows are valid
    matters: Tensors = field(default_factory=dict)  # and which must reach the result if they are not finite
    products: torch.dtype | None = None  # what weights are rounded to before they are multiplied for gradients
    any_threads: bool = True  # the same bits with any number of threads
    normalised: tuple[str, ...] = ()  # inputs whose rows are divided by their norm

    def inputs_in_double(self) -> Tensors:
        return {name: t.double() if t.is_floating_point() else t for name, t in self.inputs.items()}

    def epsilon(self) -> float:
        """Of the sums: float64 only where all is float64."""
        floats = [t for t in self.inputs.values() if t.is_floating_point()]
        return max((torch.finfo(torch.promote_types(t.dtype, torch.float32)).eps for t in floats), default=0.0)

    def overflows(self) -> bool:
        """Whether squared norms end beyond float32, where rows count as zero: only crashes and bits are checked."""
        squares = [t.double().square().sum(1 if t.dim() in (2, 4) else 2) for name, t in self.inputs.items()
                   if name in self.normalised and t.dtype != torch.float64]  # fmt: skip
        return any(bool((square > torch.finfo(torch.float32).max / 2).any()) for square in squares)

    def run(self, backend: str, double: bool = False) -> Tensors:
        """Results, and gradients as ``grad NAME``."""
        inputs = self.inputs_in_double() if double else self.inputs
        leaves = {name: inputs[name].detach().requires_grad_() for name in self.leaves if name in inputs}
        results = self.function(backend, inputs | leaves)
        if leaves:
            main = next(iter(results.values()))
            if not main.requires_grad:
                raise AssertionError("the result is not connected to the graph")
            pull = torch.full_like(main, self.grad_output) if main.dim() == 0 else _pull(main) * self.grad_output
            grads = torch.autograd.grad(main, list(leaves.values()), pull, allow_unused=True)
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
                if grad is None:
                    raise AssertionError(f"{name} gets no gradient")
                results[f"grad {name}"] = grad
                if backend == "extension" and not double:
                    _check_like(name, grad, leaf)
        return {name: t.detach() for name, t in results.items()}


def _pull(main: Tensor) -> Tensor:
    """A ``grad_output`` of small whole numbers, which every dtype holds."""
    return (torch.arange(main.numel()).reshape(main.shape) % 7 - 3).to(main.dtype)


def _check_like(name: str, grad: Tensor, leaf: Tensor) -> None:
    if grad.dtype != leaf.dtype or grad.shape != leaf.shape:
        raise AssertionError(f"gradient of {name} is {grad.dtype} {tuple(grad.shape)}, not like its input")
    for layout in (torch.contiguous_format, torch.channels_last) if leaf.dim() == 4 else (torch.contiguous_format,):
        if leaf.is_contiguous(memory_format=layout) and not grad.is_contiguous(memory_format=layout):
            raise AssertionError(f"gradient of {name} has strides {grad.stride()}, its input {leaf.stride()}")


def judge(call: Call, draw: Draw) -> list[str]:
    """What is wrong with the call, in words; empty if nothing is."""
    truth, expected = call.run("reference", double=True), call.run("reference")
    torch.set_num_threads(draw.threads)
    results = call.run("extension")
    if call.any_threads:
        torch.set_num_threads(1)
    again = call.run("extension")
    torch.set_num_threads(draw.threads)
    problems = [f"{name}: other bits the second time" for name in results if not same_bits(results[name], again[name])]
    if not call.overflows():
        problems += disagreements(call, truth, expected, results, call.terms(call.inputs_in_double()))
    if not problems and call.valid and draw.chance(0.5):
        problems = poisoned(call, draw, results)
    return problems


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.isnan(), other.isnan()) and \
        torch.equal(one.nan_to_num(), other.nan_to_num())  # fmt: skip


def disagreements(
    call: Call, truth: Tensors, expected: Tensors, results: Tensors, terms: dict[str, float]
) -> list[str]:
    """Results further from the truth than three times those of the reference of the same dtype.

    Beyond that, one rounding of the result is never an error, nor what sums of ``length`` terms in another order give.
    """
    problems = []
    for name, value in truth.items():
        result, reference = results[name], expected[name]
        if not value.is_floating_point():
            if not torch.equal(result, value) or not torch.equal(reference, value):
                problems.append(f"{name}: other integers than the truth")
            continue
        if result.dtype != reference.dtype:
            problems.append(f"{name}: {result.dtype}, expected {reference.dtype}")
        if value.numel() == 0:
            continue
        info, slack = torch.finfo(result.dtype), 8 * math.sqrt(call.length) * call.epsilon() * terms.get(name, 0.0)
        if call.products is not None and name.startswith("grad"):
            slack += torch.finfo(call.products).eps * terms.get(name, 0.0)
        seen = reference.isfinite() & (value.abs() + slack <= info.max)  # beyond, the dtype ends
        if bool((seen & ~result.isfinite()).any()):
            problems.append(f"{name}: not finite, where truth and reference are")
            continue
        seen &= result.isfinite()
        if not seen.any():
            continue
        error, allowed = (float((t.double() - value)[seen].abs().max()) for t in (result, reference))
        most = 3 * allowed + info.eps * float(value[seen].abs().max()) + slack
        # the least that the result, and float32 sums before grad_output, can tell from zero
        most += info.smallest_normal * (info.eps if result.dtype == torch.float16 else 1) * max(1.0, call.grad_output)
        if not error <= most:
            problems.append(f"{name}: off by {error:.3g}, allowed {most:.3g} (reference {allowed:.3g})")
    return problems


def poisoned(call: Call, draw: Draw, clean: Tensors) -> list[str]:
    """What is not finite reaches the result from valid places, and changes no bit from others."""
    kept = {name: t.clone() for name, t in call.inputs.items()}
    if draw.chance(0.5):
        for name, valid in call.valid.items():
            _fill(call.inputs[name], ~valid, draw.bad())
        results = call.run("extension")
        different = [name for name, t in results.items() if not same_bits(t, clean[name])]
        problems = [f"{name}: changed by values in places that are not valid" for name in different]
    else:
        places = {name: mask.nonzero() for name, mask in call.matters.items() if mask.any()}
        if not places:
            return []
        name = draw.pick(*sorted(places))
        place = torch.zeros_like(call.matters[name])
        place[tuple(places[name][draw.random.randrange(len(places[name]))])] = True
        value = draw.bad()
        _fill(call.inputs[name], place, value)
        problems = []
        for backend in ("reference", "extension"):
            main = next(iter(call.run(backend).values()))
            if main.isfinite().all():
                problems.append(f"{value} in a valid place of {name} does not reach the result ({backend})")
    for name, t in kept.items():
        call.inputs[name].copy_(t)
    return problems


def _fill(tensor: Tensor, mask: Tensor, value: float) -> None:
    """In place, so that the layout stays; the mask may lack the channels."""
    target = tensor.movedim(1, -1) if tensor.dim() == 4 else tensor
    target[mask] = value
