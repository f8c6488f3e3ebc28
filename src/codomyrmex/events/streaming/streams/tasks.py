"""Tasks that are held until they are done, and what goes on though it is cancelled.

Asyncio itself refers to a task weakly, and to what it waits for not at all. So a task whose stream
or pipeline nobody holds any more, and which waits for what nothing else refers to (the reader of
a connection is one such thing), would be collected in the middle of an event.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["hold", "release", "to_the_end"]

T = TypeVar("T")

_held: "dict[asyncio.AbstractEventLoop, set[asyncio.Task[Any]]]" = {}
"""By loop. The tasks of one are added and taken away only in the thread where it runs."""


def hold(task: "asyncio.Task[Any]") -> None:
    """Refer to a task until `release`, or until its loop is closed and another one has tasks."""
    loop = task.get_loop()
    tasks = _held.get(loop)
    if tasks is None:
        for other in tuple(_held):
            if other.is_closed():  # with tasks that never will be done
                _held.pop(other, None)
        tasks = _held[loop] = set()
    tasks.add(task)


def release(task: "asyncio.Task[Any]") -> None:
    """Refer to a task no more. It is done."""
    loop = task.get_loop()
    tasks = _held.get(loop)
    if tasks is not None:
        tasks.discard(task)
        if not tasks:
            _held.pop(loop, None)


async def to_the_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await what must not be left half done. A cancellation comes when it is done.

    It is for what takes a moment only: whoever cancels waits for it.
    """
    task = asyncio.get_running_loop().create_task(coroutine)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return task.result()
    if not task.cancelled():
        task.exception()  # looked at: it gives way to the cancellation
    raise cancelled
