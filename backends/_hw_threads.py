"""Threads of `hw`: samples are shared out between workers, and each worker's products run on one thread.

A threaded product waits for its slowest thread by spinning, so on a machine with other work it can take fifty times
as long; workers that never wait for each other only slow down by their share.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

SYMBOLS = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")
_lock = threading.Lock()
_users = 0
_before = 0


def workers() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _blas() -> tuple[Callable[[], int], Callable[[int], None]] | None:
    """Getter and setter of the threads of the OpenBLAS that NumPy brings; None where it brings another library."""
    core: Any = getattr(np, "_core", None) or np.core
    try:
        library = ctypes.CDLL(core._multiarray_umath.__file__)
    except (AttributeError, OSError):
        return None
    for symbol in SYMBOLS:
        if hasattr(library, symbol.format("get")) and hasattr(library, symbol.format("set")):
            return getattr(library, symbol.format("get")), getattr(library, symbol.format("set"))
    return None


@contextmanager
def one_thread_a_product() -> Iterator[None]:
    """Products run on the calling thread; the setting of before comes back when the last user leaves."""
    global _users, _before  # noqa: PLW0603 - the setting is the library's, one for the process
    blas = _blas()
    if blas is None:
        yield
        return
    get, put = blas
    with _lock:
        if _users == 0:
            _before = get()
            put(1)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                put(_before)


def share(work: Callable[[Sequence[slice]], None], parts: Sequence[slice]) -> None:
    """Calls ``work`` with all parts, dealt out to as many threads as there are processors."""
    hands = min(workers(), len(parts))
    if hands < 2:
        work(parts)
        return
    with one_thread_a_product(), ThreadPoolExecutor(hands) as pool:
        for done in [pool.submit(work, parts[i::hands]) for i in range(hands)]:
            done.result()
