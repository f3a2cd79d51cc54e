"""Labelled sets as files: the released pickles, read without running them, and plain lists."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from train_helpers import error_of

from train.data.released_splits import read_released_split
from train.data.splits import split_by_order


def pickled(array: np.ndarray, numpy_module: str = "numpy.core.multiarray") -> bytes:
    """The array as numpy 1 or 2 pickles it, whichever runs here."""
    content = pickle.dumps(array, protocol=3)
    return content.replace(array.__reduce__()[0].__module__.encode(), numpy_module.encode())


@pytest.mark.parametrize("numpy_module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("dtype", ["<i8", ">i8"])
def test_published_split(tmp_path: Path, numpy_module: str, dtype: str):
    order = np.random.default_rng(0).permutation(300)
    path = tmp_path / "split_0.pkl"
    path.write_bytes(pickled(order.astype(dtype), numpy_module))
    assert numpy_module.encode() in path.read_bytes()
    values = read_released_split(path, 300)
    assert values == order.tolist() and all(type(value) is int for value in values)
    labelled, unlabelled = split_by_order(values, 300, 20)
    assert set(labelled) == set(order[:20].tolist()) and sorted(labelled + unlabelled) == list(range(300))
    assert labelled == sorted(labelled) and unlabelled == sorted(unlabelled)
    assert "299" in error_of(lambda: read_released_split(path, 299))


class Hostile:
    """Runs ``callable(*arguments)`` when it is unpickled."""

    def __init__(self, callable_, *arguments):
        self.reduction = callable_, arguments

    def __reduce__(self):
        return self.reduction


def test_hostile_pickles_are_refused_and_run_nothing(tmp_path: Path):
    path, mark = tmp_path / "split.pkl", tmp_path / "ran"
    for callable_, *arguments in ((Path.touch, mark), (eval, f"open({str(mark)!r}, 'w')"), (np.load, str(path)),
                                  (np.frombuffer, b"12345678", "i8"), (getattr, np.ndarray, "tofile")):  # fmt: skip
        path.write_bytes(pickle.dumps(Hostile(callable_, *arguments), protocol=3))
        assert "the pickle asks for" in error_of(lambda: read_released_split(path, 1))
    assert not mark.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        pickled(np.arange(5))[:-9],
        pickled(np.arange(5.0)),
        pickled(np.arange(5, dtype=np.int32)),
        pickled(np.arange(6).reshape(2, 3)),
        pickled(np.array([[1, 2], "a"], object)),
        pickled(np.array([0, 1, 2, 3, 3])),
        pickled(np.array([1, 2, 3, 4, 5])),
        pickled(np.array([-1, 0, 1, 2, 3])),
        pickled(np.arange(5)).replace(b"K\x05\x85", b"K\x04\x85"),  # shape and content differ
        pickle.dumps([0, 1, 2, 3, 4]),
        pickle.dumps({}),
        b"cnumpy\nndarray\n(K\x05tR.",  # an array that never gets content
    ],
)
def test_pickles_of_something_else(tmp_path: Path, content: bytes):
    path = tmp_path / "split.pkl"
    path.write_bytes(content)
    assert str(path) in error_of(lambda: read_released_split(path, 5))
    assert "missing.pkl" in error_of(lambda: read_released_split(tmp_path / "missing.pkl", 5))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**30) + b"x.",  # bytes
        b"\x80\x05\x96" + struct.pack("<Q", 2**30) + b"x.",  # bytearray
        b"\x80\x04\x8d" + struct.pack("<Q", 2**30) + b"x.",  # string
        b"\x80\x04\x95" + struct.pack("<Q", 2**30) + b"N.",  # frame
        b"\x80\x04Nr" + struct.pack("<I", 2**26) + b".",  # index of the memo
        b"\x80\x04Np67108864\n.",
        pickled(np.arange(2**22)),  # too long for 5 images
        # a dtype of nested tuples, whose text would have 2^25 letters
        pickled(np.arange(5)).replace(b"X\x02\x00\x00\x00i8", b")q~0" + b"h~h~\x86q~0" * 24 + b"h~"),
    ],
)
def test_memory_is_bounded_by_the_file(tmp_path: Path, content: bytes):
    path = tmp_path / "split.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert len(error_of(lambda: read_released_split(path, 5))) < 300 + len(str(path))
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
