"""One step of the first contender of some cases, which is all that ``ncu --profile-from-start off`` sees.

python -m benchmarks.kernels city infonce-bf16
"""

from __future__ import annotations

import argparse

import torch

from .cases import CASES
from .measure import products_in
from .released import Checkouts


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("cases", nargs="+", choices=list(CASES), metavar="CASE")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    arguments = parser.parse_args(given)
    for case in (CASES[name] for name in arguments.cases):  # in this order, because a profiler may stop after some
        problem = case.problem(arguments.device)
        name, contender = next(iter(case.contenders_of(problem, Checkouts()).items()))
        with products_in(case.tf32):
            step = contender(problem)
            step()  # what only the first call does
            if arguments.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
            step()
            if arguments.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
        print(f"{case.name}: {name}", flush=True)


if __name__ == "__main__":
    main()
