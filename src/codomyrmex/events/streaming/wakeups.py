"""Waiting that works across threads and event loops.

Whoever waits leaves a future among the waiters of what it waits for; whoever changes that wakes
one of them, or all, from any thread. Nothing polls. Both sides rely on one order: a waiter
first puts itself among the waiters and then looks once more whether it has to wait, and a waker
first makes the change and then looks for waiters. So one of them always sees the other.
"""

import asyncio
from asyncio import events as _events
from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

__all__ = [
    "Waiters",
    "resolve",
    "resolve_all",
    "running_loop",
    "wait_until",
    "wake",
    "wake_all",
    "withdraw",
]

Waiters: TypeAlias = "list[asyncio.Future[None]]"
"""Who waits, longest first. A list, since there are several for each subscriber and hardly ever
more than one or two in it: an empty list takes a tenth of the memory of an empty deque."""

running_loop: Callable[[], asyncio.AbstractEventLoop | None] = _events._get_running_loop
"""The event loop that runs in this thread, or None."""


def resolve(future: "asyncio.Future[None]") -> None:
    """End a future's wait, unless it has ended."""
    if not future.done():
        future.set_result(None)


def resolve_all(futures: Waiters) -> None:
    """`resolve` each of them."""
    for future in futures:
        resolve(future)


def wake(waiters: Waiters) -> None:
    """End the wait of the first that still waits."""
    while waiters:
        try:
            future = waiters.pop(0)
        except IndexError:  # another thread took it
            return
        if future.done():
            continue
        loop = future.get_loop()
        if loop is running_loop():
            future.set_result(None)
            return
        try:
            loop.call_soon_threadsafe(resolve, future)
        except RuntimeError:  # its loop is closed: nobody waits there any more
            continue
        return


def wake_all(waiters: Waiters) -> None:
    """End the wait of all that wait now."""
    here = running_loop()
    elsewhere: dict[asyncio.AbstractEventLoop, Waiters] = {}
    for _ in range(len(waiters)):
        try:
            future = waiters.pop(0)
        except IndexError:  # another thread took it
            break
        if future.done():
            continue
        loop = future.get_loop()
        if loop is here:
            future.set_result(None)
        else:
            elsewhere.setdefault(loop, []).append(future)
    # One call to a loop: each is a system call, and gives up the interpreter lock.
    for loop, futures in elsewhere.items():
        with suppress(RuntimeError):  # it is closed: nobody waits there any more
            loop.call_soon_threadsafe(resolve_all, futures)


def withdraw(waiters: Waiters, future: "asyncio.Future[None]") -> bool:
    """Take a future out from among the waiters. False: it is not there, it has been woken."""
    try:
        waiters.remove(future)
    except ValueError:
        return False
    return True


async def wait_until(waiters: Waiters, ready: Callable[[], bool]) -> None:
    """Wait to be woken, once, unless `ready` already.

    One that is woken and cancelled at once passes the wake-up on, if there is still cause for it.
    """
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters.append(future)
    if ready():
        future.cancel()
        withdraw(waiters, future)
        return
    try:
        await future
    except BaseException:
        # Woken by another thread, it may have been cancelled before it could notice.
        if not withdraw(waiters, future) and ready():
            wake(waiters)
        raise
