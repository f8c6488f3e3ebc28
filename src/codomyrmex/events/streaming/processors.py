"""`StreamProcessor`: events from a source, through functions, to sinks; in order, bounded.

A pipeline whose functions are all synchronous runs inside the source's own delivery: no task, no
queue. As soon as one is async, or returns an awaitable, events pass through a queue that makes
the source wait when it is full.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias

from .errors import StreamingError
from .models import Event, Subscription
from .streams.base import Stream, StreamView
from .streams.pump import Pump
from .streams.runner import is_async, is_cancellation
from .streams.sinks import Sink, as_sink
from .streams.tasks import hold, release
from .wakeups import Waiters, running_loop, wait_until, wake_all

__all__ = ["ErrorPolicy", "ProcessorStatistics", "Retry", "StreamProcessor"]

_logger = logging.getLogger("codomyrmex.events.streaming")


@dataclass(frozen=True)
class Retry:
    """Try a function that raised again, on the same event, while later events wait.

    Attributes:
        attempts: how often it is tried in all.
        delay: seconds before the second attempt.
        factor: what the delay is multiplied by for each further attempt.
        then: what happens when the last attempt has raised: ``log``, ``raise`` or a sink.
    """

    attempts: int = 3
    delay: float = 0.1
    factor: float = 2.0
    then: "Literal['log', 'raise'] | Sink" = "log"

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.delay < 0 or self.factor < 0:
            raise ValueError(f"attempts is 1 or more, delay and factor are not negative: {self}")


ErrorPolicy: TypeAlias = Literal["log", "raise"] | Retry | Sink
"""What happens to an event on which a function raised.

``log``: it is logged and left out. ``raise``: the pipeline ends, and `StreamProcessor.stop` and
`StreamProcessor.wait` raise it. `Retry`: the function is tried again. A sink: it gets the event
as the source gave it, with what went wrong as metadata ``error`` and ``failed_in``.
"""


@dataclass(frozen=True, slots=True)
class ProcessorStatistics:
    """Counts since a processor was made.

    Attributes:
        received: events that came from the source.
        filtered: events that a filter rejected, or that a map turned into None.
        delivered: events that every sink has taken.
        failed: events that were left out because a function raised, or was interrupted.
        in_flight: events that are being worked on now.
    """

    received: int
    filtered: int
    delivered: int
    failed: int
    in_flight: int


_MAP: Final = 0  # and nothing else is false
_FILTER: Final = 1
_SINK: Final = 2
_Step: TypeAlias = tuple[int, Callable[[Any], Any]]
"""What to do with the value of a function, and the function."""

_LEFT_OUT: Any = object()  # in place of the value of an event that has left the pipeline
_NOT_CALLED: Any = object()
_NO_STEP: Any = None


class StreamProcessor:
    """A pipeline: ``StreamProcessor(source).map(f).filter(p).sink(target)``.

    Functions are called in the order in which they were added, sync or async. Events leave in
    the order in which they came, and each sink has taken an event before the next one is begun.

    Args:
        source: a `Stream`, another stream of this library, or any async iterator of events.
        on_error: what happens to an event on which a function or sink raises: see `ErrorPolicy`.
        max_concurrency: how many events may be in work at a time. The sinks still get one after
            the other, in order.
        ordered: False: with `max_concurrency`, events leave as soon as they are ready, and the
            sinks may get several at a time.

    As an async context manager it runs inside the block, and is drained at its end.

    >>> async def main():
    ...     async with StreamProcessor(stream).map(enrich).filter(is_paid).sink(database.insert):
    ...         await asyncio.sleep(3600)
    """

    def __init__(
        self,
        source: Any,
        *,
        on_error: ErrorPolicy = "log",
        max_concurrency: int = 1,
        ordered: bool = True,
    ) -> None:
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency is 1 or more, not {max_concurrency}")
        retry = on_error if isinstance(on_error, Retry) else Retry(attempts=1)
        finally_ = retry.then if isinstance(on_error, Retry) else on_error
        if isinstance(finally_, str) and finally_ not in ("log", "raise"):
            raise ValueError(f"on_error is 'log', 'raise', a Retry or a sink, not {finally_!r}")
        self.source = source
        self._retry = retry
        self._raises = finally_ == "raise"
        self._dead_letters = None if isinstance(finally_, str) else as_sink(finally_)
        self._max_concurrency = max_concurrency
        self._ordered = ordered
        self._stages: list[_Step] = []
        self._sinks: list[_Step] = []
        self._targets: list[object] = []
        self._steps: tuple[_Step, ...] = ()
        self._stream: Stream | None = None
        self._subscription: Subscription | None = None
        self._pump: Pump | None = None
        self._tasks: deque[asyncio.Task[None]] = deque()
        self._waiting_for_tasks: Waiters = []
        self._error: BaseException | None = None
        self._received = 0
        self._filtered = 0
        self._delivered = 0
        self._failed = 0

    # Building.

    def map(self, function: Callable[[Any], Any]) -> Self:
        """Replace each event by what `function` returns for it. One that is None leaves.

        Raises:
            RuntimeError: the processor is running.
        """
        self._check_not_running()
        self._stages.append((_MAP, function))
        return self

    def filter(self, function: Callable[[Any], Any]) -> Self:
        """Let an event through only if `function` returns true for it.

        Raises:
            RuntimeError: the processor is running.
        """
        self._check_not_running()
        self._stages.append((_FILTER, function))
        return self

    def sink(self, target: Sink) -> Self:
        """Give each event that comes through to `target`: any stream, or a function.

        Raises:
            RuntimeError: the processor is running.
            TypeError: `target` is nothing that takes events.
        """
        self._check_not_running()
        self._sinks.append((_SINK, as_sink(target)))
        self._targets.append(target)
        return self

    def _check_not_running(self) -> None:
        if self._subscription is not None:
            raise RuntimeError("a processor is built before it is started")

    # Running.

    async def start(self) -> Subscription:
        """Begin to process what the source gives from now on.

        Returns:
            The subscription at the source. Cancelling it ends the processing at once; `stop`
            finishes what has been received.

        Raises:
            RuntimeError: it is running already.
            TypeError: the source is nothing that gives events.
            ValueError: a sink is the source itself, and no filter would ever end the circle.
        """
        if self._subscription is not None:
            raise RuntimeError("the processor is running already")
        source = self.source
        circular = any(_leads_to(target, source) for target in self._targets)
        if circular and not any(kind == _FILTER for kind, _ in self._stages):
            raise ValueError("a processor without a filter cannot feed its own source")
        self._error = None
        self._steps = (*self._stages, *self._sinks)
        handler = self._handler()
        as_stream = getattr(source, "as_stream", None)
        if isinstance(source, Stream):
            stream: Stream | None = source
        else:
            stream = None if as_stream is None else as_stream()
        self._stream = stream
        if stream is not None:
            subscription = await stream.subscribe(handler)
        elif isinstance(source, AsyncIterable):
            subscription = Subscription(handler=handler)
            subscription._runner = pump = Pump(subscription, aiter(source))
            subscription._release = lambda _: pump.cancel()
            self._pump = pump
        else:
            raise TypeError(f"events come from a stream or an async iterator, not from {source!r}")
        self._subscription = subscription
        if self._error is not None:  # the source has replayed something, and that has failed
            subscription.cancel()
        return subscription

    async def stop(self) -> None:
        """Finish what has been received, then end the subscription. Again does nothing.

        Raises:
            Exception: with the policy ``raise``, what a function raised.
        """
        subscription = self._subscription
        if subscription is not None:
            finished = False
            try:
                if self._stream is not None:
                    await self._stream.finish(subscription.id)
                else:
                    assert self._pump is not None
                    self._pump.stop()
                    await self._pump.finish()
                await self._finish_tasks()
                finished = True
            finally:
                subscription.cancel()
                if not finished:
                    self._interrupt(subscription)
                if self._subscription is subscription:
                    self._subscription = None
        self._raise_error()

    def _interrupt(self, subscription: Subscription) -> None:
        """Give up what is in work."""
        if subscription._runner is not None:
            subscription._runner.cancel()
        for task in tuple(self._tasks):
            loop = task.get_loop()
            if loop is running_loop():
                task.cancel()
            else:
                with suppress(RuntimeError):  # it is closed
                    loop.call_soon_threadsafe(task.cancel)

    async def wait(self) -> None:
        """Wait until an iterator that is the source has ended and all it gave is processed.

        Raises:
            Exception: what the source raised, or, with the policy ``raise``, a function.
            RuntimeError: the source is a stream, which has no end, or nothing was started.
        """
        if self._pump is None:
            raise RuntimeError("wait() is for a processor of an async iterator, once started")
        await self._pump.finish()
        await self._finish_tasks()
        if self._error is None:
            self._error = self._pump.error
        await self.stop()

    async def _finish_tasks(self) -> None:
        if asyncio.current_task() in self._tasks:
            return  # a function of the pipeline: others in line would wait for it, and it for them
        while self._tasks:
            await wait_until(self._waiting_for_tasks, lambda: not self._tasks)

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if isinstance(error, asyncio.CancelledError):
            # Raised as it is, it would pass for a cancellation of the caller.
            raise StreamingError("what a function of the pipeline awaited was cancelled") from error
        if error is not None:
            raise error

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self.stop()
        except Exception as failure:
            if error is None:
                raise
            # What the block raised comes out of it.
            _logger.error("the pipeline had failed", exc_info=failure)

    def statistics(self) -> ProcessorStatistics:
        """Counts since the processor was made, as of now."""
        done = self._filtered + self._delivered + self._failed
        return ProcessorStatistics(
            received=self._received,
            filtered=self._filtered,
            delivered=self._delivered,
            failed=self._failed,
            in_flight=self._received - done,
        )

    # Processing.

    def _handler(self) -> Callable[[Event], Any]:
        """What the source calls: the simplest that these functions and settings allow."""
        if self._max_concurrency > 1:
            return self._process_concurrently
        if any(is_async(function) for _, function in self._steps):
            return self._process
        return self._process_now

    def _process_now(self, event: Event) -> Coroutine[Any, Any, None] | None:
        """Process an event as far as no function returns an awaitable.

        Returns:
            None, or a coroutine for the rest.
        """
        self._received += 1
        value: Any = event
        step: _Step = _NO_STEP
        try:
            for step in self._stages:
                is_filter, function = step
                result = function(value)
                if not is_filter:
                    if type(result) is Event:  # the usual answers first: this is the hot path
                        value = result
                        continue
                elif result is True:
                    continue
                if result is not None and hasattr(result, "__await__"):
                    return self._process_rest(event, value, step, result)
                if result is None or (is_filter and not result):
                    self._filtered += 1
                    return None
                if not is_filter:
                    value = result
            for step in self._sinks:
                result = step[1](value)
                if result is not None and hasattr(result, "__await__"):
                    return self._process_rest(event, value, step, result)
        except (Exception, asyncio.CancelledError) as error:
            if self._retry.attempts > 1 or self._dead_letters is not None:
                return self._process_rest(event, value, step, _NOT_CALLED, error)
            self._failed += 1
            self._give_up(event, step[1], error)
            return None
        self._delivered += 1
        return None

    async def _process(self, event: Event) -> None:
        """Process an event, waiting for whatever is to be waited for."""
        rest = self._process_now(event)
        if rest is not None:
            await rest

    async def _process_rest(
        self,
        event: Event,
        value: Any,
        step: _Step,
        awaitable: Any = _NOT_CALLED,
        error: BaseException | None = None,
    ) -> None:
        """Go on at a step whose function has returned an awaitable, or has raised."""
        steps = self._steps
        index = next(index for index, each in enumerate(steps) if each is step)
        try:
            value = await self._take_step(step, value, awaitable, error)
            for following in steps[index + 1 :]:
                if value is _LEFT_OUT:
                    break
                index += 1
                value = await self._take_step(following, value)
        except (Exception, asyncio.CancelledError) as last:
            self._failed += 1
            if is_cancellation(last):
                raise
            await self._give_up_with(event, steps[index][1], last)
            return
        if value is _LEFT_OUT:
            self._filtered += 1
        else:
            self._delivered += 1

    async def _take_step(
        self,
        step: _Step,
        value: Any,
        awaitable: Any = _NOT_CALLED,
        error: BaseException | None = None,
    ) -> Any:
        """The value after a step, or `_LEFT_OUT`; tried as often as the policy says.

        Args:
            step: kind and function.
            value: what to call the function with.
            awaitable: what it has returned already, if it was called.
            error: what it has raised already, if it was called.

        Raises:
            Exception: what the last attempt raised.
        """
        kind, function = step
        retry = self._retry
        delay = retry.delay
        attempts = retry.attempts
        while True:
            try:
                if error is not None:
                    raise error
                result = function(value) if awaitable is _NOT_CALLED else awaitable
                if result is not None and hasattr(result, "__await__"):
                    result = await result
                break
            except (Exception, asyncio.CancelledError) as failure:
                attempts -= 1
                if is_cancellation(failure) or attempts <= 0:
                    raise
                _logger.warning("%r failed on %r; tried again in %g s", function, value, delay)
                error, awaitable = None, _NOT_CALLED
            await asyncio.sleep(delay)
            delay *= retry.factor
        if kind == _FILTER:
            return value if result else _LEFT_OUT
        if kind == _MAP:
            return _LEFT_OUT if result is None else result
        return value

    def _give_up(self, event: Event, function: object, error: BaseException) -> None:
        """Leave an event out on which a function raised: log it, or end the pipeline."""
        if not self._raises:
            _logger.error("%r failed on %r; it is left out", function, event, exc_info=error)
            return
        if self._error is None:
            self._error = error
        if self._subscription is not None:
            self._subscription.cancel()

    async def _give_up_with(self, event: Event, function: Any, error: BaseException) -> None:
        """`_give_up`, or the dead-letter sink."""
        if self._dead_letters is None:
            self._give_up(event, function, error)
            return
        letter = Event.from_dict(event.to_dict())
        letter.metadata["error"] = f"{type(error).__name__}: {error}"
        letter.metadata["failed_in"] = getattr(function, "__qualname__", repr(function))
        try:
            result = self._dead_letters(letter)
            if result is not None and hasattr(result, "__await__"):
                await result
        except (Exception, asyncio.CancelledError) as last:
            if is_cancellation(last):
                raise
            _logger.error("the dead-letter sink failed on %r", letter, exc_info=last)

    # Several events at a time, each in a task. Those that keep the order wait for the one before
    # them, in front of the sinks and at their end: so the line is never shorter than it seems.

    async def _process_concurrently(self, event: Event) -> None:
        """Begin to process an event as soon as fewer than `max_concurrency` are in work."""
        tasks = self._tasks
        while len(tasks) >= self._max_concurrency:
            await wait_until(self._waiting_for_tasks, lambda: len(tasks) < self._max_concurrency)
        if self._error is not None:
            return  # the pipeline has ended meanwhile
        before = tasks[-1] if tasks and self._ordered else None
        task = asyncio.create_task(
            self._process_after(before, event), name="codomyrmex-streaming processor"
        )
        hold(task)
        tasks.append(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        release(task)
        self._tasks.remove(task)
        wake_all(self._waiting_for_tasks)

    async def _process_after(self, before: "asyncio.Task[None] | None", event: Event) -> None:
        """Process an event, but give it to the sinks only after the one before it."""
        self._received += 1
        value: Any = event
        index = 0
        steps = self._steps
        try:
            for index, step in enumerate(steps):  # noqa: B007
                if step[0] == _SINK:
                    await _end_of(before)
                    if self._error is not None:  # the pipeline has ended before this event
                        self._failed += 1
                        return
                value = await self._take_step(step, value)
                if value is _LEFT_OUT:
                    break
        except (Exception, asyncio.CancelledError) as error:
            self._failed += 1
            if is_cancellation(error):
                raise
            await _end_of(before)
            await self._give_up_with(event, steps[index][1], error)
            return
        if value is _LEFT_OUT:
            self._filtered += 1
        else:
            self._delivered += 1
        await _end_of(before)


def _leads_to(target: object, source: object) -> bool:
    """Whether all that a target takes comes out of a source."""
    source = _behind(source)
    target = _behind(target)
    # A topic's events come out of the stream of all topics.
    return target is source or getattr(target, "_owner", None) is source


def _behind(stream: object) -> object:
    """What publishes and delivers, where this is a view of it, or a method, or itself."""
    stream = getattr(stream, "__self__", stream)
    return stream.viewed if isinstance(stream, StreamView) else stream


async def _end_of(task: "asyncio.Task[None] | None") -> None:
    """Wait until a task is done, however it ends."""
    if task is not None and not task.done():
        await asyncio.wait([task])
