"""The process in which kernels run, so that an error there ends this process and not the tests.

Usage: ``worker.py LIBRARY``. It reads pickled ``(function, order, arguments)`` and answers ``(status, arrays)``. An
argument is an integer, a float, None for a null pointer, or the bytes of an array, which the answer
has as the kernel left them.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
from typing import BinaryIO

Argument = int | float | bytes | None


def call(library: ctypes.CDLL, function: str, order: int, arguments: list[Argument]) -> tuple[int, list[bytes]]:
    library.worker_allocate.restype = ctypes.c_void_p
    library.worker_set_order(order)
    passed: list[ctypes.c_int64 | ctypes.c_double | ctypes.c_void_p] = []
    arrays: list[tuple[ctypes.c_void_p, int]] = []
    for position, argument in enumerate(arguments, 1):
        if isinstance(argument, bytes):
            name = f"argument {position} of {function}"
            pointer = ctypes.c_void_p(library.worker_allocate(ctypes.c_size_t(len(argument)), name.encode()))
            library.worker_write(pointer, argument, ctypes.c_size_t(len(argument)))
            arrays.append((pointer, len(argument)))
            passed.append(pointer)
        elif argument is None:
            passed.append(ctypes.c_void_p())
        else:
            passed.append(ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument))
    status = library[function](*passed) or library.worker_wait()
    results = []
    for pointer, size in arrays:
        result = ctypes.create_string_buffer(size)
        library.worker_read(result, pointer, ctypes.c_size_t(size))
        results.append(result.raw)
    library.worker_release()
    return status, results


def serve(library: ctypes.CDLL, requests: BinaryIO, answers: BinaryIO) -> None:
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(call(library, *request), answers)
        answers.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not get between the answers
    serve(ctypes.CDLL(sys.argv[1]), sys.stdin.buffer, answers)
