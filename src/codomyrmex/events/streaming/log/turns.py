"""`Turns`: whoever never has to wait lets others on the event loop have a turn now and then."""

import asyncio
import time
from typing import Final

__all__ = ["Turns"]

_TURN: Final = 0.005
"""Seconds after which others get a turn."""

_now = time.monotonic


class Turns:
    """When others on the event loop had a turn last, as far as is known here.

    >>> async def main(items):
    ...     turns = Turns()
    ...     for item in items:
    ...         if turns.are_due:
    ...             await turns.give()
    """

    __slots__ = ("_due",)

    def __init__(self) -> None:
        self._due = _now() + _TURN

    @property
    def are_due(self) -> bool:
        """Whether it is time to give others a turn."""
        return _now() >= self._due

    async def give(self) -> None:
        """Give everybody else a turn."""
        await asyncio.sleep(0)
        self._due = _now() + _TURN
