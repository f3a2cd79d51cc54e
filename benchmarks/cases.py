"""The named cases: which problem, at which sizes, computed by whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import branch, infonce, positive, sampling, selectors
from .problem import Contender, Problem
from .released import NAME, Checkouts

CITY = {"pixels": 21125}  # five maps of 65 x 65 pixels
KEPT = "pixcontrast, means kept"


@dataclass(frozen=True)
class Case:
    """One problem and its contenders, the first of which is this project's.

    Attributes:
        make: makes the problem from ``sizes`` and a device.
        about: the sizes in words.
        tf32: whether products of float32 may be rounded to tf32, which a GPU does fast.
        sweep, x: the scaling plot that the case belongs to, if any: what is varied, and its value here.
    """

    name: str
    about: str
    make: Callable[..., Problem]
    sizes: Mapping[str, Any]
    contenders: Mapping[str, Contender] = field(repr=False)
    tf32: bool = False
    sweep: str = ""
    x: int = 0

    def problem(self, device: str) -> Problem:
        problem = self.make(**self.sizes, device=device)
        problem.tf32 = self.tf32
        return problem

    def contenders_of(self, problem: Problem, checkouts: Checkouts) -> dict[str, Contender]:
        """Those of the case, and the released code where it computes the same."""
        released = None if self.sweep else checkouts.contender(problem)
        return dict(self.contenders) | ({NAME: released} if released else {})


def without(contenders: Mapping[str, Contender], *names: str) -> dict[str, Contender]:
    return {name: contender for name, contender in contenders.items() if name not in names}


def _positive(name: str, about: str, **sizes: Any) -> Case:
    contenders = without(positive.CONTENDERS, KEPT) if sizes.get("weighted_rows") else positive.CONTENDERS
    return Case(name, f"{about}, float32", positive.Positive.random, sizes, contenders)


def _selectors(name: str, about: str, **sizes: Any) -> Case:
    return Case(name, about, selectors.Selectors.random, CITY | sizes, selectors.CONTENDERS)


def _infonce(name: str, about: str, **sizes: Any) -> Case:
    slow = ("pixcontrast reference", "formula as it stands") if "dtype" in sizes else ()
    return Case(name, about, infonce.InfoNCE.random, {"rows": 10000} | sizes, without(infonce.CONTENDERS, *slow))


def _sampling(name: str, about: str, contrast: bool, **sizes: Any) -> Case:
    contenders = sampling.contenders(contrast)
    return Case(name, about, sampling.Sampling.random, {"contrast": contrast} | sizes, contenders)


NAMED = [
    _positive("city", "21125 pixels x 256, 19 classes of 256 rows", **CITY),
    _positive("city-maps", "the same as contiguous maps [5, 256, 65, 65]", maps=5, **CITY),
    _positive("city-paper", "the same, memory rows weighted too", weighted_rows=True, **CITY),
    _positive("large", "131072 pixels x 256, 19 classes of 2048 rows", pixels=131072, rows=2048),
    _selectors("selectors", "city from prediction rows on: class selectors, then the loss; float32"),
    _selectors("selectors-paper", "the same, with selectors of the memory rows; float32", variant="paper"),
    _selectors("selectors-bf16", "the first under bfloat16 autocast", autocast=True),
    _sampling(
        "sampling", "anchors of 2 maps of 256 x 128 x 256, gathered and back", False, batch=2, height=128, width=256
    ),
    _sampling("self-contrast", "the same, with InfoNCE among the anchors", True, batch=2, height=128, width=256),
    _infonce("infonce", "1023 anchors, 190000 rows x 256, float32", anchors=1023),
    _infonce("infonce-few", "38 anchors, 190000 rows x 256, float32", anchors=38),
    _infonce("infonce-bf16", "1023 anchors, 190000 rows x 256, bfloat16", anchors=1023, dtype=torch.bfloat16),
    _infonce("infonce-few-bf16", "38 anchors, 190000 rows x 256, bfloat16", anchors=38, dtype=torch.bfloat16),
]

# for trying out the harness and for `make bench BENCH_ARGS=--quick`
SMALL = [
    _positive("small", "4096 pixels x 256, 19 classes of 64 rows", pixels=4096, rows=64),
    _sampling("small-sampling", "anchors of 2 maps of 64 x 64 x 128", False, batch=2, height=64, width=128, dim=64),
    _infonce("small-infonce", "64 anchors, 19 classes of 500 rows x 256, float32", anchors=64, rows=500),
]

STEPS = [
    Case(
        f"step-{name}",
        f"contrast of a training step: {s.labelled} + {2 * s.unlabelled} maps of {s.channels} x {s.size} x {s.size}",
        branch.Branch.random,
        {"setting": s},
        branch.CONTENDERS,
    )
    for name, s in branch.SETTINGS.items()
]

# the same where the products are rounded, which only pays on a GPU
TF32 = [
    replace(case, name=f"{case.name}-tf32", about=case.about.replace("float32", "tf32"), tf32=True)
    for case in NAMED
    if case.name in ("infonce", "infonce-few")
]
TINY = Case(
    "tiny-step",
    "contrast of a small training step, without a network",
    branch.Branch.random,
    {"setting": branch.Setting("", 2, 1, 64, 32, 16, 5, 2), "capacity": 20, "dim": 32},
    branch.CONTENDERS,
)
ROUNDED_STEPS = [
    replace(
        case,
        name=f"{case.name}-{kind}",
        about=f"{case.about}, {kind}",
        sizes=sizes,
        tf32=kind == "tf32",
        contenders={"pixcontrast": branch.CONTENDERS["pixcontrast"]},
    )
    for case in STEPS
    if case.name in ("step-city-v2", "step-city-v3plus")
    for kind, sizes in (("tf32", case.sizes), ("bf16", {**case.sizes, "autocast": True}))
]


def _sweep(what: str, x: str, values: tuple[int, ...], make: Callable, sizes: dict, contenders: dict) -> list[Case]:
    """Cases that differ in size ``x`` alone, with the contenders whose cost is worth a line."""
    return [
        Case(f"{what}-{x}-{value}", f"{value} {x}", make, sizes | {x: value}, contenders, False, f"{what}: {x}", value)
        for value in values
    ]


def _sweeps() -> list[Case]:
    means = without(positive.CONTENDERS, "pixcontrast reference", "torch.compile", "formula as it stands")
    stream = without(infonce.CONTENDERS, "pixcontrast reference", "torch.compile", "formula as it stands")
    of_positive = (positive.Positive.random, CITY, means)
    of_infonce = (infonce.InfoNCE.random, {"anchors": 256, "rows": 1000}, stream)
    return [
        *_sweep("positive", "pixels", (4096, 16384, 65536, 262144), *of_positive),
        *_sweep("positive", "rows", (64, 256, 1024, 4096), *of_positive),
        *_sweep("positive", "classes", (5, 19, 150, 1000), positive.Positive.random, CITY | {"rows": 16}, means),
        *_sweep("positive", "dim", (64, 256, 512, 1024), *of_positive),
        *_sweep("infonce", "anchors", (32, 128, 512, 2048), *of_infonce),
        *_sweep("infonce", "rows", (250, 1000, 4000), *of_infonce),
        *_sweep("infonce", "dim", (64, 128, 256, 512), *of_infonce),
    ]


CASES = {case.name: case for case in [*NAMED, *TF32, *SMALL, TINY, *STEPS, *ROUNDED_STEPS, *_sweeps()]}
GROUPS = {
    "paper": [case.name for case in NAMED],
    "steps": [case.name for case in STEPS],
    "tf32": [case.name for case in TF32],
    "precisions": [case.name for case in ROUNDED_STEPS],
    "quick": [case.name for case in SMALL],
    "sweeps": [case.name for case in CASES.values() if case.sweep],
}


def select(names: list[str]) -> list[Case]:
    """The cases of these names and groups, in the order of ``CASES``.

    Raises:
        ValueError: a name that is neither.
    """
    unknown = [name for name in names if name not in CASES and name not in GROUPS]
    if unknown:
        raise ValueError(f"no case {unknown[0]!r}; `--list` names all of them, and the groups are {', '.join(GROUPS)}")
    wanted = {case for name in names for case in GROUPS.get(name, [name])}
    return [case for name, case in CASES.items() if name in wanted]
