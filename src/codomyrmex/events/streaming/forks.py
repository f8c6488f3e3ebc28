"""What a forked child has to make anew, since only the forking thread lives on in it.

A lock that another thread held would never be released, a delivery that another thread was at
would never end, and no event loop goes on. So a stream made before a fork works in the child. A
log in a file that was open does not, and says so: SQLite's connections cannot be made anew.
"""

import os
from typing import Protocol
from weakref import WeakSet

__all__ = ["follow_forks"]


class _Forkable(Protocol):
    def _after_fork(self) -> None: ...


_followers: WeakSet[_Forkable] = WeakSet()


def follow_forks(stream: _Forkable) -> None:
    """Have a stream's `_after_fork` called in every child that is forked while it exists."""
    _followers.add(stream)


def _in_child() -> None:  # pragma: no cover - runs in forked children only
    for stream in tuple(_followers):
        stream._after_fork()


if hasattr(os, "register_at_fork"):  # pragma: no branch - not on Windows, which has no fork
    os.register_at_fork(after_in_child=_in_child)
