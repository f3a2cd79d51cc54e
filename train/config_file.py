"""config.json of a run: writing a configuration, reading it back, comparing it with another."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from train.config import FitConfig
from train.errors import UserError
from train.run_folder import replacing

CONFIG = "config.json"


def to_plain(config: FitConfig) -> dict[str, Any]:
    """The configuration as nested dicts of numbers, strings, lists and None."""
    return json.loads(json.dumps(asdict(config), default=str))


def from_plain(plain: dict[str, Any]) -> FitConfig:
    """The inverse of :func:`to_plain` for :class:`FitConfig`.

    Raises:
        UserError: a part or a field that this version does not know, or one that is missing.
    """
    paths = {"root", "out", "split_file", "source_root", "init"}
    try:
        built: dict[str, Any] = {}
        for name, part in get_type_hints(FitConfig).items():
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain[name].items()}
            for path in paths & values.keys():
                values[path] = None if values[path] is None else Path(values[path])
            built[name] = part(**values)
        return FitConfig(**built)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"configuration of another version ({error}): train again with this version") from error


def differing_fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences (``"optim.lr 0.01 -> 0.02"``) of two plain configurations that would train different weights."""
    free = {"run", "data.workers", "data.pin_memory", "data.root", "data.source_root"}
    flat_old, flat_new = _flatten(old), _flatten(new)
    return [
        f"{name} {flat_old.get(name)} -> {flat_new.get(name)}"
        for name in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(name) != flat_new.get(name) and name not in free and name.split(".")[0] not in free
    ]


def write_config(config: FitConfig) -> None:
    """Write ``config.json`` into the folder of the run."""
    with replacing(config.run.out / CONFIG) as file:
        file.write(json.dumps(to_plain(config), indent=2) + "\n")


def same_as_written(config: FitConfig) -> bool:
    """Whether the run in the folder of ``config``, if there is one, trains the same weights."""
    path = config.run.out / CONFIG
    try:  # through FitConfig, so that options newer than the file have their defaults
        written = from_plain(json.loads(path.read_text())) if path.is_file() else None
    except (ValueError, UserError):  # not JSON, or other JSON
        return False
    return written is not None and not differing_fields(to_plain(written), to_plain(config))


def _flatten(plain: dict[str, Any]) -> dict[str, Any]:
    return {f"{part}.{name}": value for part, values in plain.items() for name, value in values.items()}
