"""The pickled splits that were released with the paper (Alonso et al., ICCV 2021), read without running them."""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import UserError, reason

LONGEST = 16
"""Bytes of a split file for each image: twice those of an int64. What is longer reads as truncated."""


def read_released_split(path: Path, n: int) -> list[int]:
    """Read the order of the images from a released pickle: the first ``n_lab`` of them are labelled.

    A pickle is a program. This one runs with inert stand-ins for the three names of numpy that an array needs; any
    other name is an error, and so is a size that the file does not have.

    The released orders of VOC number the lines of ``train_aug.txt``, which is sorted, as our items are. Those of
    Cityscapes number the files as ``os.walk`` listed them on the authors' machine; we apply them to sorted ids, so the
    labelled images are other ones, drawn in the same way.

    Args:
        path: pickle of a one-dimensional int64 array, of numpy 1 or 2.
        n: number of training images.

    Returns:
        A permutation of ``range(n)``.

    Raises:
        UserError: unreadable file, forbidden or unexpected content, not a permutation of ``range(n)``.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(LONGEST * n + 2**16)
        _check_sizes(content)
        values = _ArrayUnpickler(io.BytesIO(content)).load().values()
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise UserError(
            f"cannot read split {path} ({reason(error)}): expected a pickled one-dimensional int64 array"
        ) from None
    if sorted(values) != list(range(n)):
        raise UserError(
            f"split {path} has {len(values)} entries that are no permutation of 0 to {n - 1}: it belongs to a data set "
            f"of another size than these {n} images"
        )
    return values


def _check_sizes(content: bytes) -> None:
    """Raise ValueError where ``content`` would make the unpickler allocate more memory than it has bytes.

    `pickletools.genops` refuses strings longer than the rest of the file; the memo is as long as its largest index.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(content):
            raise ValueError(f"memo of {argument} entries in {len(content)} bytes")


class _Dtype:
    """Replaces ``numpy.dtype``: stores the arguments and the byte order."""

    def __init__(self, code: str, *flags: Any) -> None:
        self.code, self.byte_order = code, ""

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = state[1]


class _Array:
    """Replaces ``numpy.ndarray`` and the function that reconstructs it: stores the state."""

    def __init__(self, *ignored: Any) -> None:
        self.state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def values(self) -> list[int]:
        _version, (length,), dtype, _fortran_order, content = self.state
        if (dtype.code, dtype.byte_order) not in (("i8", "<"), ("i8", ">")):
            raise ValueError("numbers of another type")  # naming it could take any amount of memory
        values = np.frombuffer(content, dtype.byte_order + dtype.code)
        if len(values) != length:
            raise ValueError(f"{len(values)} numbers in an array of another length")
        return values.tolist()


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # numpy 1
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # numpy 2
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that accepts the names of `_STAND_INS` and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")
        return _STAND_INS[module, name]
