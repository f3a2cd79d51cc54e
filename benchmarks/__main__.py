"""Time this project's operators beside other ways to compute the same.

python -m benchmarks                                  the sizes of the papers, about 9 minutes on 2 cores
python -m benchmarks --quick --case city              less rounds, no peak memory
python -m benchmarks --case sweeps                    how cost grows with pixels, rows, classes, channels, anchors
python -m benchmarks --case steps                     the contrast of whole training steps, and what the network takes
python -m benchmarks --compare earlier/results.json
python -m benchmarks --device cuda --one-process      on a GPU: as CUDA graphs and eagerly, with device nodes
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from .cases import CASES, GROUPS, select
from .machine import describe
from .measure import Effort, Outcome, measure
from .plots import draw
from .released import Checkouts
from .report import Report, comparison, markdown

QUICK = Effort(rounds=7, seconds=3.0, memory=False)
LOST = ("CaptureError", "AcceleratorError")  # errors after which this process cannot use the GPU


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--case", nargs="+", metavar="NAME", help=f"cases or groups ({', '.join(GROUPS)}); default: paper"
    )
    made.add_argument("--list", action="store_true", help="show all cases and stop")
    made.add_argument(
        "--quick", action="store_true", help="a short look: few rounds, no peak memory; default case: quick"
    )
    made.add_argument("--skip", nargs="+", default=[], metavar="CONTENDER", help="contenders to leave out")
    made.add_argument("--one-process", action="store_true", help="measure peak memory in this process, which is quick")
    made.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="time torch.compile too (default: on the CPU)"
    )
    made.add_argument("--no-graphs", action="store_true", help="on a GPU: no CUDA graphs")
    made.add_argument("--rounds", type=int, help=f"turns of each contender, at most (default: {Effort.rounds})")
    made.add_argument("--seconds", type=float, help=f"for all rounds of a case (default: {Effort.seconds:.0f})")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the report (default: runs/bench)")
    made.add_argument("--compare", type=Path, metavar="FILE", help="results.json of an earlier run")
    made.add_argument("--semiseg", type=Path, metavar="DIR", help="checkout of Shathe/SemiSeg-Contrastive to time too")
    made.add_argument(
        "--contrastiveseg", type=Path, metavar="DIR", help="checkout of tfzhou/ContrastiveSeg to time too"
    )
    return made


def effort_of(arguments: argparse.Namespace) -> Effort:
    base = QUICK if arguments.quick else Effort()
    return replace(
        base,
        rounds=arguments.rounds or base.rounds,
        seconds=arguments.seconds or base.seconds,
        one_process=arguments.one_process,
        graphs=not arguments.no_graphs,
    )


def skipped(arguments: argparse.Namespace) -> frozenset[str]:
    """Contenders to leave out: those named, and what takes minutes to compile for a GPU unless it is asked for."""
    compiled = arguments.device == "cpu" if arguments.compile is None else arguments.compile
    return frozenset(arguments.skip) | (frozenset() if compiled else {"torch.compile"})


def main(given: list[str] | None = None) -> None:
    arguments = parser().parse_args(given)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime", into the progress bar
    if arguments.list:
        print("\n".join(f"{case.name:22} {case.about}" for case in CASES.values()))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no GPU")
    try:
        cases = select(arguments.case or ["quick" if arguments.quick else "paper"])
        earlier = Report.load(arguments.compare) if arguments.compare else None
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"benchmarks: {error}")
    checkouts = Checkouts(arguments.semiseg, arguments.contrastiveseg)
    arguments.out.mkdir(parents=True, exist_ok=True)

    report, unusable = Report(describe(arguments.device), []), ""
    with tqdm(cases, unit="case") as bar:
        for case in bar:
            try:
                outcome = measure(
                    case, arguments.device, effort_of(arguments), checkouts, skipped(arguments), bar.set_description
                )
            except Exception as error:  # the other cases can still be measured, unless the GPU is lost
                text = str(error).splitlines()[0] if str(error) else ""
                outcome = Outcome(case.name, case.about, {}, note=f"{type(error).__name__}: {text}")
                unusable = outcome.note
            report.outcomes.append(outcome)
            report.save(arguments.out / "results.json")  # what is done is kept if the run is cut off
            if unusable.startswith(LOST):
                break
    text = markdown(report)
    if earlier:
        text += "\n" + comparison(report, earlier) + "\n"
    pictures = draw(report, arguments.out)
    (arguments.out / "report.md").write_text(text + "".join(f"\n![]({path.name})\n" for path in pictures))
    print(f"\n{text}\nReport: {arguments.out / 'report.md'}, numbers: {arguments.out / 'results.json'}")
    if unusable:
        sys.exit(f"benchmarks: {unusable}")


if __name__ == "__main__":
    main()
