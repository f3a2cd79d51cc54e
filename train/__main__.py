"""Command line: ``python -m train fit | evaluate | demo``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from train.config import FitConfig
from train.demo import DemoConfig, run_demo
from train.errors import UserError
from train.evaluate import evaluate_checkpoint, scores_table
from train.interrupt import Interrupted
from train.loop import fit
from train.session import choose_device


@dataclass(frozen=True)
class EvaluateConfig:
    """Per-class IoU of a checkpoint on a data set."""

    checkpoint: tyro.conf.Positional[Path]
    """File last.pt of a run folder."""
    split: Literal["train", "val"] = "val"
    """Images to evaluate on."""
    root: Path | None = None
    """Folder of the data, if it is not where it was during the training."""
    device: str = "auto"
    """auto takes CUDA, then Apple's MPS, then the CPU; or a torch device such as cuda:1."""


Command = (
    Annotated[FitConfig, tyro.conf.subcommand("fit", description="Train a network, or continue a run found in --out.")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate", description="Per-class IoU of a checkpoint.")]
    | Annotated[
        DemoConfig, tyro.conf.subcommand("demo", description="Train with and without the contrast, and write a report.")
    ]
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; those of the process unless given.

    Returns:
        exit status: 0, 2 for bad input, 130 after an interrupt.
    """
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="python -m train",
        description="Pixel-level contrastive learning with a class-wise memory.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        if isinstance(command, FitConfig):
            print(scores_table(fit(command)))
            print(f"checkpoint, metrics.jsonl and tensorboard events are in {command.run.out}")
        elif isinstance(command, EvaluateConfig):
            device = choose_device(command.device)
            print(scores_table(evaluate_checkpoint(command.checkpoint, command.split, command.root, device)))
        else:
            print(f"report: {run_demo(command)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted before the training began, or twice: nothing more was saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
