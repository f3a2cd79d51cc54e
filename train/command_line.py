"""Commands that take the options of `fit` on top of a row of the paper."""

from __future__ import annotations

from pathlib import Path

import tyro

from train.config import FitConfig
from train.variants import RowOptions, row_config

STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
"""Options without the name of the part of the configuration before them."""


def parse_row(arguments: list[str]) -> FitConfig:
    """The configuration that ``fit --row ...`` asks for.

    Raises:
        UserError: an unknown row.
        SystemExit: arguments that cannot be parsed, or ``--help``.
    """
    options, overrides = tyro.cli(RowOptions, prog="python -m train fit", args=arguments, return_unknown_args=True)
    return fit_config(options, overrides)


def fit_config(options: RowOptions, overrides: list[str], runs: Path = Path("runs")) -> FitConfig:
    """The configuration of a row, changed by options of `fit`. Errors as in :func:`parse_row`."""
    default = row_config(options, runs)
    return tyro.cli(FitConfig, prog="python -m train fit", args=overrides, default=default, config=STYLE)
