"""The process in which kernels run, so that an error there ends this process and not the tests.

Usage: ``worker.py LIBRARY MARK``. It reads pickled ``(function, order, arguments)`` and answers with the mark and
``(status, what it means, arrays, launches)``. An argument is an integer, a float, None for a null pointer, or the bytes
of an array, which the answer has as the kernel left them. It ends at ``None`` or at the end of its input.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import sys
from typing import BinaryIO

Argument = int | float | bytes | None
Answer = tuple[int, str, list[bytes], int]


def call(library: ctypes.CDLL, function: str, order: int, arguments: list[Argument]) -> Answer:
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
    launches = library.worker_launches() if hasattr(library, "worker_launches") else -1  # a GPU does not count
    return status, meaning(library, status), results, launches


def meaning(library: ctypes.CDLL, status: int) -> str:
    """What a GPU calls an error."""
    if status == 0 or not hasattr(library, "worker_meaning"):
        return ""
    library.worker_meaning.restype = ctypes.c_char_p
    return f": {library.worker_meaning(status).decode()}"


def serve(library: ctypes.CDLL, mark: bytes, requests: BinaryIO, answers: BinaryIO) -> None:
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        if request is None:
            return
        answer = call(library, *request)
        answers.write(mark)
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a kernel prints must not get between the answers
    serve(ctypes.CDLL(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.stdin.buffer, answers)
