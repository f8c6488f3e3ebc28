"""Noticing that a reader has waited for so many seconds, with one timer for many waits."""

import asyncio
from typing import Any

from ..wakeups import resolve

__all__ = ["IdleTimer"]


class IdleTimer:
    """One timer for all the waits of a reader: it is armed again only when it has run out.

    Arming and cancelling one for each item would cost more than the item.

    Attributes:
        seconds: how long a wait may be.
        expired: whether the last wait was that long.
        future: what ends the wait, once one has begun; it may be over.
        since: when that was, in the time of its loop.
        armed_on: the loop the timer is armed on, if it is. Whoever begins a wait on another arms
            it; these are attributes and not a method because that is the way of every lone event.
    """

    __slots__ = ("_handle", "armed_on", "expired", "future", "seconds", "since")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.expired = False
        self.future: asyncio.Future[Any] | None = None
        self.since = 0.0
        self.armed_on: asyncio.AbstractEventLoop | None = None
        self._handle: asyncio.TimerHandle | None = None

    def arm(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look at the wait when it has lasted too long."""
        self.close()
        self.armed_on = loop
        self._handle = loop.call_at(self.since + self.seconds, self._run_out, loop)

    def close(self) -> None:
        """Disarm the timer."""
        self.armed_on = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _run_out(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handle = None
        self.armed_on = None
        if self.future is None or self.future.done():
            return  # the next wait arms it again
        if self.since + self.seconds > loop.time():  # this wait began after it had been armed
            self.arm(loop)
        else:
            self.expired = True
            resolve(self.future)
