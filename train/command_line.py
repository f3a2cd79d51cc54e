"""The commands of ``python -m train``. Each imports only what it needs: ``rows`` and ``--help`` start without torch."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from train.errors import Interrupted, UserError


@dataclass(frozen=True)
class EvaluateConfig:
    """Per-class IoU of a checkpoint on a data set."""

    checkpoint: tyro.conf.Positional[Path]
    """File last.pt or best.pt of a run folder, or best_model.pth of the authors' code."""
    split: Literal["train", "val", "test"] = "val"
    """Images to evaluate on; of the published data sets, camvid has test."""
    root: Path | None = None
    """Folder of the data, if it is not where it was during the training."""
    workers: int = 0
    """Loader processes; 0 reads the images in this one."""
    per_image: Path | None = None
    """Write the IoU of each image to this CSV file, the worst image first."""
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


def fit(arguments: list[str]) -> str:
    """Train a network, or continue a run found in --out.

    With --row NAME --data DIR, train a row of the paper: see fit --row NAME --help. With --show-config, print every
    option as it would be used, and stop.
    """
    show, arguments = "--show-config" in arguments, [a for a in arguments if a != "--show-config"]
    if any(argument.split("=")[0] == "--row" for argument in arguments):
        from train.paper.variants import parse_row

        config = parse_row(arguments)
    else:
        from train.config import parse_fit

        config = parse_fit(arguments, description=inspect.getdoc(fit))
    if show:
        import json

        from train.config_file import to_plain

        return json.dumps(to_plain(config), indent=2)
    from train.loop import fit as train_network
    from train.scores import scores_table

    table = scores_table(train_network(config))
    return f"{table}\ncheckpoints, metrics.jsonl and tensorboard events are in {config.run.out}"


def evaluate(arguments: list[str]) -> str:
    """Per-class IoU of a checkpoint."""
    config = _parse(EvaluateConfig, "evaluate", arguments)
    from train.distributed import choose_device
    from train.evaluate import evaluate_checkpoint
    from train.scores import scores_table

    device = choose_device(config.device)
    scores = evaluate_checkpoint(config.checkpoint, config.split, config.root, device, config.workers, config.per_image)
    return scores_table(scores)


def predict(arguments: list[str]) -> str:
    """Write the class of every pixel of a folder of images."""
    from train import predict as module

    return module.predict_images(_parse(module.PredictConfig, "predict", arguments))


def demo(arguments: list[str]) -> str:
    """Train with and without the contrast, and write a report."""
    from train.studies.demo import DemoConfig, run_demo

    return f"report: {run_demo(_parse(DemoConfig, 'demo', arguments))}"


def rows(arguments: list[str]) -> str:
    """List the rows of the paper's tables, one a line."""
    _parse(RowsConfig, "rows", arguments)
    from train.paper.rows import rows_list

    return rows_list()


def make_data(arguments: list[str]) -> str:
    """Generate a small data set in the layout of a published one, to try everything without a download."""
    config = _parse(MakeDataConfig, "make-data", arguments)
    from train.data.scenes import make_scenes

    root = config.data / config.kind
    return f"generated {make_scenes(config.kind, root, config.train, config.val, seed=config.seed)}"


def check(arguments: list[str]) -> str:
    """Read every image and label of a data set, and print a line for each problem."""
    from train.data import check as module

    return module.check(_parse(module.CheckConfig, "check", arguments))


def reproduce(arguments: list[str]) -> str:
    """Train the rows of a table on each split, and compare with the printed numbers."""
    from train.paper import reproduce as module

    config, overrides = _parse(module.ReproduceConfig, "reproduce", arguments, return_unknown_args=True)
    report = module.reproduce(config, overrides)
    return "" if config.print_commands else f"comparison: {report}"


def compare(arguments: list[str]) -> str:
    """Run the authors' training loop beside ours, and print the largest differences."""
    from train.paper import compare as module

    return module.compare(_parse(module.CompareConfig, "compare", arguments))


def figures(arguments: list[str]) -> str:
    """Draw pictures like those of the paper's supplement."""
    from train.paper import figures as module

    config = _parse(module.FiguresConfig, "figures", arguments)
    return "\n".join(f"picture: {file}" for file in module.figures(config))


def ablation(arguments: list[str]) -> str:
    """Train a short recipe with and without parts of the method, and tabulate."""
    from train.studies import ablation as module

    config, overrides = _parse(module.AblationConfig, "ablation", arguments, return_unknown_args=True)
    return f"table: {module.ablation(config, overrides)}"


def features(arguments: list[str]) -> str:
    """Write the features of a frozen encoder as a data set, on which a head trains in milliseconds a step."""
    from train.data import features as module

    return module.make_features(_parse(module.FeaturesConfig, "features", arguments))


COMMANDS: dict[str, Callable[[list[str]], str]] = {
    "fit": fit,
    "evaluate": evaluate,
    "predict": predict,
    "demo": demo,
    "rows": rows,
    "make-data": make_data,
    "check": check,
    "features": features,
    "reproduce": reproduce,
    "compare": compare,
    "figures": figures,
    "ablation": ablation,
}
"""Each takes its arguments and returns what it prints; its docstring is its line of help."""

ON_SEVERAL_PROCESSES = ("fit", "evaluate", "reproduce")


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: of the command line; those of the process unless given.

    Returns:
        exit status: 0, 2 for bad input, 128 + number of the signal after an interrupt or where nobody reads the output.
    """
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there
        return 128 + signal.SIGPIPE


def _run(arguments: list[str] | None) -> int:
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if name not in COMMANDS:
        asked = name in ("-h", "--help")
        print(
            _usage() if asked else f"{_usage()}\n\nerror: unknown command {name!r}", file=None if asked else sys.stderr
        )
        return 0 if asked else 2
    try:
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if several and name not in ON_SEVERAL_PROCESSES:
            raise UserError(f"torchrun is for {', '.join(ON_SEVERAL_PROCESSES)}: start {name} with python -m train")
        if several:
            from train.distributed import processes
        with processes() if several else nullcontext():
            if text := COMMANDS[name](rest):
                print(text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop, file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        print("interrupted before the training began, or twice: nothing more was saved", file=sys.stderr)
        return 130
    return 0


def _parse(config: type, command: str, arguments: list[str], **options: Any) -> Any:
    return tyro.cli(config, prog=f"python -m train {command}", args=arguments, **options)


def _usage() -> str:
    lines = ["usage: python -m train COMMAND ...", "", "Pixel-level contrastive learning with a class-wise memory.", ""]
    lines += [f"  {name:<10} {(inspect.getdoc(command) or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "Options of each: python -m train COMMAND --help"])
