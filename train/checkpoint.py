"""Checkpoints: one file, written atomically, read only if it is complete, ours, and of the same configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.config import FitConfig
from train.config_file import differing_fields, from_plain, to_plain
from train.distributed import rank, wait
from train.errors import UserError, reason

if TYPE_CHECKING:
    from train.session import Training

FORMAT, VERSION = "pixcontrast-train", 1
KEEP = "It was left as it is: move it away, or choose another --out"


def save_checkpoint(path: Path, training: Training, data: dict[str, Any]) -> None:
    """Write the whole state of ``training``; at every moment ``path`` is the old or the new file, never a part of it.

    With several processes, all must call it; rank 0 writes, and the others wait until it has.

    Args:
        path: the file; a ``.partial`` file beside it is used on the way.
        training: what to save.
        data: plain description of the data set, compared on resume.

    Raises:
        UserError: it cannot be written.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": to_plain(training.config),
        "data": data,
        "training": training.state_dict(),
    }
    if rank() == 0:
        try:
            _write(path, content)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise UserError(
                f"checkpoint {path} cannot be written ({reason(error)}): free space or choose another --out"
            ) from error
    wait()


def _write(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the file that :func:`save_checkpoint` wrote: keys ``config``, ``data``, ``training``; tensors on the CPU.

    Raises:
        UserError: the file is missing, truncated, not a checkpoint of this program, or of another version.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: give the last.pt of a run folder")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated and foreign files make torch raise many kinds
        raise UserError(f"checkpoint {path} is truncated or not a checkpoint ({reason(error)}). {KEEP}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} was not written by this program. {KEEP}")
    if content.get("version") != VERSION:
        raise UserError(f"checkpoint {path} has format version {content.get('version')}, not {VERSION}. {KEEP}")
    return content


def resume(path: Path, training: Training, data: dict[str, Any]) -> None:
    """Continue ``training`` from the checkpoint at ``path``.

    Raises:
        UserError: as :func:`read_checkpoint`; or the checkpoint is of another configuration or other data.
    """
    content = read_checkpoint(path)
    # through FitConfig, so that options newer than the checkpoint have their defaults
    differing = differing_fields(to_plain(config_of(content, path)), to_plain(training.config))
    if differing:
        raise UserError(
            f"checkpoint {path} is of another configuration ({'; '.join(differing)}). "
            f"Set these options as they were, or choose another --out"
        )
    if content["data"] != data:
        changed = [name for name in data if data[name] != content["data"].get(name)]
        raise UserError(
            f"checkpoint {path} was trained on other data ({', '.join(changed)} of the data set changed): "
            f"restore the data, or choose another --out"
        )
    try:
        training.load_state_dict(content["training"])
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}, or choose another --out") from error
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"checkpoint {path} does not fit this version of the program ({reason(error)}). {KEEP}"
        ) from error


def config_of(content: dict[str, Any], path: Path) -> FitConfig:
    """The configuration stored in a checkpoint that :func:`read_checkpoint` read from ``path``."""
    try:
        return from_plain(content["config"])
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
