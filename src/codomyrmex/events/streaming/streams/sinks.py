"""Whatever can take events, as a function of one event: for `broadcast` and for pipelines."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from ..errors import StreamingError
from ..models import Event
from .base import Stream
from .batching import BatchingStream
from .dispatching import DispatchingStream
from .runner import is_cancellation
from .websocket import WebSocketStream

__all__ = ["Sink", "as_sink", "broadcast"]


@runtime_checkable
class _HasStream(Protocol):
    def as_stream(self) -> Stream: ...


Sink: TypeAlias = Stream | _HasStream | Callable[[Event], Any]
"""What can take events: any stream of this library, or a function or async function of one."""


def as_sink(target: Sink) -> Callable[[Event], Awaitable[Any] | None]:
    """The function by which a target takes an event. What it returns, unless None, is awaited.

    Raises:
        TypeError: it is nothing that takes events.
    """
    if isinstance(target, DispatchingStream):
        return target.publish_soon
    if isinstance(target, Stream):
        return target.publish
    if isinstance(target, BatchingStream):
        return target.add
    if isinstance(target, WebSocketStream):
        return target.broadcast
    if isinstance(target, _HasStream):
        return target.as_stream().publish
    if callable(target):
        return target
    raise TypeError(f"events go to a stream or a function, not to {target!r}")


async def broadcast(streams: Iterable[Sink], event: Event) -> None:
    """Publish an event to several streams at once.

    One that fails does not keep the event from the others.

    Args:
        streams: any streams of this library, and functions or async functions of one event.
        event: what to publish. A `TopicStream` takes the topic in its metadata.

    Raises:
        ExceptionGroup: what those raised that failed, when all have been tried.
        TypeError: one of them is nothing that takes events; none has got it.
    """
    sinks = [as_sink(stream) for stream in streams]
    results = await asyncio.gather(*(_give(sink, event) for sink in sinks), return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    if errors:
        raise BaseExceptionGroup(f"{len(errors)} of {len(sinks)} streams did not take it", errors)


async def _give(sink: Callable[[Event], Awaitable[Any] | None], event: Event) -> None:
    try:
        result = sink(event)
        if result is not None and hasattr(result, "__await__"):
            await result
    except asyncio.CancelledError as error:
        if is_cancellation(error):
            raise
        # Not this call was cancelled but something it waited for: a failure like any other.
        raise StreamingError(f"{sink!r} was cancelled") from error
