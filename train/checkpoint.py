"""Checkpoints: written atomically, read only if they are undamaged, ours, and of the same configuration."""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from train.config import FitConfig
from train.config_file import differing_fields, from_plain, to_plain
from train.distributed import any_rank, rank, wait
from train.errors import UserError, reason
from train.run_folder import not_written, replacing

if TYPE_CHECKING:
    from train.session import Training

FORMAT, VERSION = "pixcontrast-train", 1
KEEP = "It was left as it is: move it away, or choose another --out"

CHECKPOINT, PREVIOUS, BROKEN = "last.pt", "previous.pt", "broken.pt"
"""Files of a run: its current state, the one before, and a damaged ``last.pt`` that was put aside."""


class WrongArchive(Exception):
    """The archive of a file does not have the bytes that were written, or too many."""


class Unreadable(UserError):
    """There is no file, or it is truncated, or its bytes are not those that were written."""


def save_checkpoint(path: Path, training: Training, data: dict[str, Any]) -> None:
    """Write the state of ``training``: all of it as ``last.pt``, under another name the networks alone.

    At every moment ``path`` is the old or the new file, never a part of it.

    With several processes, all must call it; rank 0 writes, and the others wait until it has.

    Args:
        path: the file; what was at ``last.pt`` becomes ``previous.pt``.
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
        "training": training.state_dict() if path.name == CHECKPOINT else training.networks(),
    }
    if rank() == 0:
        keep = path.with_name(PREVIOUS) if path.name == CHECKPOINT else None
        try:
            with replacing(path, "wb", keep) as file:
                torch.save(content, file)
        except (OSError, RuntimeError) as error:
            raise not_written(f"checkpoint {path}", error) from error
    wait()


def load_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote into a file: tensors, on the CPU, in plain containers; nothing else in it is run.

    PyTorch itself does not look at the checksums (CRC-32) that it writes, and unpacks compressed parts of any size.

    Raises:
        WrongArchive: a checksum that is not right, or parts that are larger than the file.
        Exception: of many kinds, for truncated and foreign files.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):  # before PyTorch 1.6, files had another format
            with zipfile.ZipFile(file) as archive:
                if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                    raise WrongArchive("its parts are larger than the file")
                if wrong := archive.testzip():
                    raise WrongArchive(f"its part {wrong} does not have its checksum")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def read_checkpoint(path: Path, convert: Callable[[Any, Path], Any] | None = None) -> dict[str, Any]:
    """Read the file that :func:`save_checkpoint` wrote: keys ``config``, ``data``, ``training``; tensors on the CPU.

    Args:
        path: the file.
        convert: brings the content of another program's file, and its path, into that form; returns any other as it is.

    Raises:
        Unreadable: there is no file, or it does not have the checksums (CRC-32) that were written with it.
        UserError: it is not a checkpoint of this program, or of another version.
    """
    if not path.is_file():
        raise Unreadable(f"checkpoint {path} does not exist: give the last.pt of a run folder")
    try:
        content = load_tensors(path)
    except (PermissionError, MemoryError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({reason(error)})") from None
    except Exception as error:  # damaged and foreign files make zipfile and torch raise many kinds
        wrong = str(error) if isinstance(error, WrongArchive) else "it is truncated or of another kind"
        previous = path.with_name(PREVIOUS)
        other = f"; the one before is {previous}" if previous.is_file() and previous != path else ""
        raise Unreadable(f"checkpoint {path} is damaged: {wrong}. {KEEP}{other}") from None
    content = convert(content, path) if convert else content
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"checkpoint {path} was not written by this program. {KEEP}")
    if content.get("version") != VERSION:
        raise UserError(f"checkpoint {path} has format version {content.get('version')}, not {VERSION}. {KEEP}")
    return content


def resume(path: Path, training: Training, data: dict[str, Any]) -> None:
    """Continue ``training`` from the checkpoint at ``path``.

    If that is damaged, it is renamed to ``broken.pt``, and the training goes on from ``previous.pt``, if there is one.
    A line on stderr says so.

    Raises:
        UserError: as :func:`read_checkpoint`; or the checkpoint is of another configuration or other data.
    """
    last, previous = path, path.with_name(PREVIOUS)
    try:
        content = read_checkpoint(path)
    except Unreadable:
        if not previous.is_file():
            raise
        path = previous
    if any_rank(path == previous):
        path, content = previous, read_checkpoint(previous)
    # through FitConfig, so that options newer than the checkpoint have their defaults
    config = config_of(content, path)
    differing = differing_fields(to_plain(config), to_plain(training.config))
    if training.config.run.change_lr:
        differing = [field for field in differing if not field.startswith("optim.lr ")]
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
    for group in training.optimizer.param_groups:
        group["lr"] *= training.config.optim.lr / config.optim.lr
    if path == previous and rank() == 0:
        print(
            f"{last} is missing, or damaged and now {BROKEN}: going on from {path}, step {training.step}",
            file=sys.stderr,
        )
        with suppress(FileNotFoundError):
            os.replace(last, last.with_name(BROKEN))


def config_of(content: dict[str, Any], path: Path) -> FitConfig:
    """The configuration stored in a checkpoint that :func:`read_checkpoint` read from ``path``."""
    try:
        return from_plain(content["config"])
    except UserError as error:
        raise UserError(f"checkpoint {path}: {error}") from error
