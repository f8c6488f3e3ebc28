"""Time spent on work, on a machine that others use as well.

Where the kernel tells (Linux), the time in which a thread was ready to run but its core was given
to another process is taken off. Time in which it waited for a timer or for a wake-up counts.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

_SCHEDULING = Path("/proc/thread-self/schedstat")


def _reader_of_waiting_time() -> Callable[[], float]:
    try:
        scheduling = os.open(_SCHEDULING, os.O_RDONLY)
        os.pread(scheduling, 64, 0).split()[1]
    except (OSError, IndexError):
        return lambda: 0.0
    return lambda: int(os.pread(scheduling, 64, 0).split()[1]) / 1e9


time_kept_waiting = _reader_of_waiting_time()
"""Seconds the main thread has been kept from its core; 0.0 where the kernel does not tell."""


class Stopwatch:
    """What a stretch of work takes in the main thread."""

    def __init__(self) -> None:
        self._kept_waiting = time_kept_waiting()
        self._start = time.perf_counter()

    def seconds(self, until: float | None = None) -> float:
        """Since the start, or between the start and a past reading of `time.perf_counter`."""
        end = time.perf_counter() if until is None else until
        kept_waiting = time_kept_waiting() - self._kept_waiting
        # The core may be taken away between two readings here, and more taken off than there was.
        return max(1e-9, end - self._start - kept_waiting)


class ThreadsStopwatch:
    """What a stretch of work takes in all threads: together they never leave the core idle."""

    def __init__(self) -> None:
        self._start = time.process_time()

    def seconds(self) -> float:
        return time.process_time() - self._start
