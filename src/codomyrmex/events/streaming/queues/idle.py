"""Noticing that a reader has waited for so many seconds, with one timer for many waits."""

import asyncio

from ..wakeups import resolve

__all__ = ["IdleTimer"]


class IdleTimer:
    """One timer for all the waits of a reader: it is armed again only when it has run out.

    Arming and cancelling one for each item would cost more than the item.

    Attributes:
        seconds: how long a wait may be.
        expired: whether the last wait was that long.
    """

    __slots__ = ("_armed_on", "_future", "_handle", "_since", "expired", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.expired = False
        self._future: asyncio.Future[None] | None = None
        self._since = 0.0
        self._handle: asyncio.TimerHandle | None = None
        self._armed_on: asyncio.AbstractEventLoop | None = None

    def start(self, future: "asyncio.Future[None]") -> None:
        """Begin a wait: resolve its future once it has lasted too long."""
        loop = future.get_loop()
        self._future = future
        self.expired = False
        self._since = loop.time()
        if self._handle is None or self._armed_on is not loop:
            self._armed_on = loop
            self._handle = loop.call_later(self.seconds, self._run_out, loop)

    def stop(self) -> None:
        """End a wait. The timer stays armed: the next wait is likely to begin soon."""
        self._future = None

    def close(self) -> None:
        """Disarm the timer: there will be no further wait."""
        self._future = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run_out(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handle = None
        if self._future is None:
            return
        due = self._since + self.seconds
        if due > loop.time():  # this wait began after the timer had been armed
            self._handle = loop.call_at(due, self._run_out, loop)
        else:
            self.expired = True
            resolve(self._future)
