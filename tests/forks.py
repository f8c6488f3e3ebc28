"""What a forked child sees."""

import os
import time
import warnings
from collections.abc import Callable

PATIENCE = 10.0  # seconds of real time for what must happen at once


def in_a_child(check: Callable[[], bool]) -> bool:
    """Whether this is so in a child that is forked now, and does not hang."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pythons that warn of threads
        child = os.fork()
    if child == 0:  # pragma: no cover - in the child
        status = 1
        try:
            status = 0 if check() else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.001)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False
