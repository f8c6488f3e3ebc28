"""Learn that the server is told to stop, which ASGI does not say while answers are open.

A server that gets SIGINT (Ctrl-C) or SIGTERM first waits for open answers, and ends the lifespan
only then: those of a hub would hold it up for ever, and every `--reload` with it. So a hub listens
to these signals, too; they are handed on to whoever listened before.
"""

import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

__all__ = ["listen", "listen_no_more"]

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

_listeners: Final[list[weakref.WeakMethod[Callable[[], object]]]] = []
# Who listened before, by signal; several where another took over in between, and may call `_heard`.
_before: Final[dict[int, list[Any]]] = {number: [] for number in _SIGNALS}
_depth = 0


def listen(stopping: Callable[[], object]) -> None:
    """Have a method called when the server is told to stop. Again: if another took over since.

    Its object is not kept for that. It is called in the main thread, wherever that is, and must not
    wait. In another thread, where no server listens to signals, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    method = weakref.WeakMethod(stopping, _listeners.remove)
    if method not in _listeners:
        _listeners.append(method)
    for number in _SIGNALS:
        listener = signal.getsignal(number)
        # What ends the process by itself, or is ignored, holds nobody up.
        if callable(listener) and listener is not _heard:
            _before[number].append(listener)
            signal.signal(number, _heard)


def _heard(number: int, frame: FrameType | None) -> None:
    global _depth  # noqa: PLW0603 - signals are the process's
    if _depth == 0:
        for method in tuple(_listeners):
            if (stopping := method()) is not None:
                stopping()
    _depth += 1
    try:
        before = _before[number]
        if len(before) >= _depth:
            before[-_depth](number, frame)
    finally:
        _depth -= 1


def listen_no_more(stopping: Callable[[], object]) -> None:
    """Call a method no more. The last gives the signals back to who listened before."""
    method = weakref.WeakMethod(stopping)
    if method in _listeners:
        _listeners.remove(method)
    if _listeners or threading.current_thread() is not threading.main_thread():
        return
    for number, before in _before.items():
        if before and signal.getsignal(number) is _heard:
            signal.signal(number, before[-1])
        before.clear()
