"""Command line: ``python -m train fit | evaluate | demo | rows | make-data | reproduce | ablation | figures``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from train.ablation import AblationConfig, ablation
from train.command_line import STYLE, parse_row
from train.config import FitConfig
from train.data.scenes import make_scenes
from train.demo import DemoConfig, run_demo
from train.distributed import processes, rank, world_size
from train.errors import UserError
from train.evaluate import evaluate_checkpoint, scores_table
from train.figures import FiguresConfig, figures
from train.interrupt import Interrupted
from train.loop import fit
from train.reproduce import ReproduceConfig, reproduce
from train.rows import rows_list
from train.session import choose_device


@dataclass(frozen=True)
class EvaluateConfig:
    """Per-class IoU of a checkpoint on a data set."""

    checkpoint: tyro.conf.Positional[Path]
    """File last.pt of a run folder."""
    split: Literal["train", "val", "test"] = "val"
    """Images to evaluate on; of the published data sets, camvid has test."""
    root: Path | None = None
    """Folder of the data, if it is not where it was during the training."""
    device: str = "auto"
    """auto takes CUDA, then Apple's MPS, then the CPU; or a torch device such as cuda:1."""


@dataclass(frozen=True)
class RowsConfig:
    """List the rows of the paper's tables, one a line."""


@dataclass(frozen=True)
class MakeDataConfig:
    """Generate a small data set in the layout of a published one, to try everything without a download."""

    kind: tyro.conf.Positional[Literal["cityscapes", "voc", "gta5"]]
    """cityscapes: streets. voc: objects. gta5: streets that look like a game's."""
    data: tyro.conf.Positional[Path]
    """Folder of data sets, as for --data; the new one becomes a folder in it."""
    train: int = 24
    """Training images."""
    val: int = 6
    """Validation images."""
    seed: int = 0
    """Seed of the scenes."""


FIT_HELP = (
    "Train a network, or continue a run found in --out. "
    "With --row NAME --data DIR, train a row of the paper: see fit --row NAME --help."
)

Command = (
    Annotated[FitConfig, tyro.conf.subcommand("fit", description=FIT_HELP)]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate", description="Per-class IoU of a checkpoint.")]
    | Annotated[
        DemoConfig, tyro.conf.subcommand("demo", description="Train with and without the contrast, and write a report.")
    ]
    | Annotated[RowsConfig, tyro.conf.subcommand("rows")]
    | Annotated[MakeDataConfig, tyro.conf.subcommand("make-data")]
    | Annotated[ReproduceConfig, tyro.conf.subcommand("reproduce")]
    | Annotated[FiguresConfig, tyro.conf.subcommand("figures")]
    | Annotated[AblationConfig, tyro.conf.subcommand("ablation")]
)


def parse(arguments: list[str]) -> tuple[Any, list[str]]:
    """The command, and arguments that go on to `fit`."""
    takes_options_of_fit = {"reproduce": ReproduceConfig, "ablation": AblationConfig}
    if (name := next(iter(arguments), "")) in takes_options_of_fit:
        prog = f"python -m train {name}"
        return tyro.cli(takes_options_of_fit[name], prog=prog, args=arguments[1:], return_unknown_args=True)
    if arguments[:1] == ["fit"] and any(argument.split("=")[0] == "--row" for argument in arguments):
        return parse_row(arguments[1:]), []
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="python -m train",
        description="Pixel-level contrastive learning with a class-wise memory.",
        args=arguments,
        config=STYLE,
    )
    return command, []


def run(command: Any, overrides: list[str]) -> None:
    """Run what :func:`parse` returned, and print what came of it."""
    match command:
        case FitConfig():
            print(scores_table(fit(command)))
            print(f"checkpoints, metrics.jsonl and tensorboard events are in {command.run.out}")
        case EvaluateConfig():
            device = choose_device(command.device)
            print(scores_table(evaluate_checkpoint(command.checkpoint, command.split, command.root, device)))
        case RowsConfig():
            print(rows_list())
        case MakeDataConfig():
            root = command.data / command.kind
            print(f"generated {make_scenes(command.kind, root, command.train, command.val, seed=command.seed)}")
        case ReproduceConfig():
            report = reproduce(command, overrides)
            if not command.print_commands:
                print(f"comparison: {report}")
        case AblationConfig():
            print(f"table: {ablation(command, overrides)}")
        case FiguresConfig():
            print("\n".join(f"picture: {file}" for file in figures(command)))
        case DemoConfig():
            print(f"report: {run_demo(command)}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; those of the process unless given.

    Returns:
        exit status: 0, 2 for bad input, 130 after an interrupt.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with processes():
            command, overrides = parse(arguments)
            if world_size() > 1 and not isinstance(command, FitConfig | EvaluateConfig | ReproduceConfig):
                raise UserError("torchrun is for fit, evaluate and reproduce: start this with python -m train")
            run(command, overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if rank() == 0:
            print(stop, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted before the training began, or twice: nothing more was saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
