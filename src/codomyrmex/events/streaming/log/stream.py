"""`LogStream`: a stream on a log."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

from ..errors import StreamClosed, StreamingError
from ..models import Event, EventType, Filter, Handler, Subscription
from ..streams.base import Stream, StreamStatistics
from ..streams.pump import Pump
from ..streams.runner import SerialRunner
from ..subscribers import SubscriberQueue, prime
from ..topics import TopicFilter
from .base import EARLIEST, LATEST, REPLAY_LIMIT, Batch, Log, Reader, as_record, gap_event, open_log
from .consumer import Consumer
from .lease import LEASE
from .record import Record
from .run import Run, RunEvents, Runs, RunStatus, Source
from .turns import Turns

__all__ = ["LogStream"]

_logger = logging.getLogger("codomyrmex.events.streaming")

_OUTBOX = 1000
"""Events of `publish_nowait` that may wait to be appended."""

_DECODED = 1000
"""Events that are kept decoded, for the next subscriber."""

_DECODED_BYTES = 8 << 20
"""Bytes that the records of these have, about."""


_LONGEST_LEASE = 1e9
"""Seconds, thirty years: above that, times cannot be computed."""


class LogStream(Stream):
    """Publish to a log, and subscribe at it: from now on, or from any place in it.

    `publish` returns when the log has stored the event. Every subscription reads the log at its
    own pace, in order, in a task of its own: a slow handler delays nobody, and loses nothing as
    long as the log retains it. What it cannot have any more it is told of: a control event
    ``stream.gap``, with ``after``, ``reason`` and ``missed`` (see `Gap`), comes in its place.

    Args:
        log: the log, or its URL. One that is opened here is closed with the stream.
        lease: seconds after which a run or a consumer whose process is not heard of is over.

    >>> async def main():
    ...     async with LogStream("memory://") as stream:
    ...         await stream.publish(create_event("hello", topic="greetings"))
    ...         async with stream.events("greetings", last=10) as events:
    ...             async for event in events:
    ...                 print(event.data)
    """

    def __init__(self, log: "Log | str", *, lease: float = LEASE) -> None:
        if not 0 < lease < _LONGEST_LEASE:
            raise ValueError(f"lease is a number of seconds above 0, not {lease}")
        self._owns_log = isinstance(log, str)
        self.log = open_log(log) if isinstance(log, str) else log
        self.lease = lease
        self._deliveries: dict[str, _Delivery] = {}
        self._consumers: set[Consumer] = set()
        # Those whose handlers close the stream, and for whom the log is not closed yet.
        self._closing: set[Consumer] = set()
        self._log_waits = False
        # Those that have been unsubscribed and whose handler still runs.
        self._leaving: set[Pump] = set()
        self._open_readers: set[Reader] = set()
        self._runs = Runs(self.log, lease, self._open_readers, self._event_of)
        self._closed = False
        self._published = 0
        self._refused = 0
        self._failed = 0
        self._dropped = 0
        self._decoded: dict[int, Event] = {}
        self._decoded_bytes = 0
        self._outbox: SerialRunner[Record] = SerialRunner(
            self._append_more, SubscriberQueue(_OUTBOX, "block"), self, self._not_appended
        )

    # Publishing.

    async def publish(self, event: "Event | Record") -> None:
        """Append an event, or a record that says more, to the log; returns when it is stored.

        Raises:
            IdConflict: the log holds another event with the same id.
            TooLarge: the event has more bytes than the log takes.
            EncodeError: the event has no JSON form.
            TopicError: the topic in the event's metadata cannot be one.
            StreamClosed: the stream or the log has been closed.
        """
        self._check_open()
        record = as_record(event, self.log.max_size)
        if self._outbox.has_work:
            await self._outbox.drain()  # what was published before comes before
        await self.log.append([record])
        self._published += 1

    def publish_nowait(self, event: Event) -> bool:
        """`publish`, without waiting for the log; from any thread, with or without an event loop.

        Events wait in memory until an event loop has appended them; the end of the process loses
        those. What the log refuses is logged, and counted as failed.

        Returns:
            False: as many wait as may; the event was not taken, and is counted as refused.

        Raises:
            TooLarge: the event has more bytes than the log takes.
            EncodeError: the event has no JSON form.
            TopicError: the topic in the event's metadata cannot be one.
            StreamClosed: the stream has been closed.
        """
        self._check_open()
        record = as_record(event, self.log.max_size)
        if self._outbox.queue.full():
            self._refused += 1
            return False
        self._outbox.feed(record)
        return True

    async def _append_more(self, first: Record) -> None:
        """Append what waits, in one batch; if that is refused, one by one."""
        records = [first, *self._outbox.take_more(_OUTBOX)]
        try:
            await self.log.append(records)
        except StreamingError:
            for record in records:
                await self._append_one(record)
        else:
            self._published += len(records)

    async def _append_one(self, record: Record) -> None:
        try:
            await self.log.append([record])
        except StreamingError:
            self._not_appended(record)
        else:
            self._published += 1

    def _not_appended(self, record: Record) -> None:
        self._failed += 1
        _logger.exception("event %s could not be appended to the log", record.id)

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosed("the stream has been closed; it takes no more events")

    # Subscribing.

    async def subscribe(
        self,
        handler: Handler,
        topic: TopicFilter = "*",
        filter_fn: Filter | None = None,
        *,
        after: str | None = None,
        last: int | None = None,
        replay_limit: int = REPLAY_LIMIT,
    ) -> Subscription:
        """Call `handler` with the events of the log that match, one after the other.

        Args:
            handler: a function or async function of one event. What it raises is logged.
            topic: a topic, a pattern, or several of them.
            filter_fn: is asked for each event whether it is wanted.
            after: begin after the event with this id, or at `EARLIEST`; None: with what is
                published from now on.
            last: begin with so many of the latest events instead.
            replay_limit: events of the past at most.

        Raises:
            TopicError: `topic` is not a topic or pattern.
            StreamClosed: the stream or the log has been closed.
        """
        self._check_open()
        reader = await self._reader(topic, after, last, replay_limit)
        subscription = Subscription(topic=topic, handler=handler, filter_fn=filter_fn)
        # What a topic is has been decided by the log: a record may have several.
        inner = Subscription(id=subscription.id, handler=partial(_receive, subscription))
        pump = Pump(
            inner,
            prime(self._events_of(reader)),
            on_failure=self._handler_failed,
            on_end=lambda: self._pump_ended(subscription, pump),
        )
        self._deliveries[subscription.id] = _Delivery(subscription, reader, pump)
        subscription._runner = pump
        subscription._release = self._release
        return subscription

    async def _reader(
        self, topic: TopicFilter, after: str | None, last: int | None, replay_limit: int
    ) -> Reader:
        reader = Reader(self.log, topic)
        try:
            await reader.begin(
                LATEST if after is None else after, last=last, replay_limit=replay_limit
            )
        except BaseException:
            reader.close()
            raise
        return reader

    async def _events_of(self, reader: Reader) -> AsyncGenerator[Event, None]:
        self._open_readers.add(reader)
        turns = Turns()
        try:
            yield cast("Event", None)  # for prime
            while (batch := await reader.read()) is not None:
                for event in self._events_in(batch):
                    yield event
                    if turns.are_due:
                        await turns.give()
        finally:
            self._open_readers.discard(reader)
            reader.close()

    def _events_in(self, batch: Batch) -> Iterator[Event]:
        """What a reader is told by a batch, decoded one after the other."""
        if batch.gap is not None:
            yield gap_event(batch.gap)
        for record in batch:
            event = self._event_of(record)
            if event is not None:
                yield event

    def _event_of(self, record: Record) -> Event | None:
        """A record's event, decoded once for all who are about to read it; None: it cannot be."""
        event = self._decoded.get(record.position)
        if event is None:
            event = self._decode(record)
            if event is None:
                return None
            self._decoded_bytes += record.size
            if len(self._decoded) >= _DECODED or self._decoded_bytes > _DECODED_BYTES:
                self._decoded.clear()
                self._decoded_bytes = record.size
            self._decoded[record.position] = event
        return event

    def _decode(self, record: Record) -> Event | None:
        """A record's event, which nobody else has; None: it cannot be decoded."""
        try:
            return record.event()
        except StreamingError:
            self._failed += 1
            _logger.exception("event %s in the log cannot be decoded", record.id)
            return None

    def events(
        self,
        topic: TopicFilter = "*",
        *,
        after: str | None = None,
        last: int | None = None,
        replay_limit: int = REPLAY_LIMIT,
    ) -> "_Events":
        """The events of the log that match, as an async context manager of an async iterator.

        It begins when the block is entered, and ends when the stream or the log is closed. The
        arguments are those of `subscribe`.

        >>> async def main(stream, cursor):
        ...     async with stream.events("orders.*", after=cursor) as events:
        ...         async for event in events:
        ...             cursor = event.id
        """
        return _Events(self, partial(self._reader, topic, after, last, replay_limit))

    # Consumers.

    def consumer(
        self,
        name: str,
        topic: TopicFilter = "*",
        *,
        start: str = EARLIEST,
        commit_every: int | None = None,
        commit_seconds: float | None = None,
    ) -> Consumer:
        """A cursor that the log keeps, under a name. The arguments are those of `Consumer`.

        >>> async def main(stream):
        ...     async with stream.consumer("billing", "orders.*") as consumer:
        ...         async for event in consumer:
        ...             print(event.data)
        ...             await consumer.commit(event)
        """
        return Consumer(
            self,
            name,
            topic,
            start=start,
            commit_every=commit_every,
            commit_seconds=commit_seconds,
        )

    # Runs.

    async def run(
        self,
        topic: str,
        source: Source,
        *,
        ttl: float = 3600.0,
        event_type: str = EventType.MESSAGE,
        private: bool = False,
        once: bool = False,
    ) -> Run:
        """Record what an async iterator gives, in a task that does not depend on any reader.

        The tokens of an answer, the steps of an agent, the rows of an export: each is an event of
        the topic. The last event, ``stream.end``, says how it ended: in its data, ``state`` is
        ``completed``, ``failed`` (then ``error`` says what was raised), ``cancelled`` (`stop`) or
        ``interrupted`` (its process ended). Retention spares a run until `ttl` after its end.

        A topic has one run at a time, in all processes that use the log. Whoever asks for a second
        one joins the first; their `source` is closed. So is that of a run which could not begin.

        Args:
            topic: the topic of its events.
            source: an async iterable of events or of JSON values, or a function that makes one,
                which is called only when the run begins.
            ttl: seconds after its end for which it is there to be read.
            event_type: the type of the events that are made of values.
            private: whether only who is authorized for the topic may read it.
            once: whether to join a run that has ended as well, rather than begin another.

        Raises:
            TopicError: events cannot be published to the topic.
            ValueError: `ttl` is below 0.
            StreamClosed: the stream or the log has been closed.

        >>> async def main(stream, model, question):
        ...     run = await stream.run("answers.42", model.answer(question))
        ...     async for event in run:
        ...         print(event.data)
        """
        return await self._runs.start(
            topic, source, ttl=ttl, event_type=event_type, private=private, once=once
        )

    def attach(self, topic: str, after: str | None = None) -> RunEvents:
        """The events of a topic's run, as an async context manager of an async iterator.

        Those there are, then those that come, until ``stream.end``, which is the last. Whoever is
        past the end is given that at once.

        Args:
            topic: the run's topic.
            after: begin after the event with this id; None: with the first of the run.

        Raises:
            UnknownRun: as the block is entered: the topic has no run, or none any more.
            StreamClosed: the stream or the log has been closed.
        """
        return RunEvents(self._runs, topic, after)

    async def stop(self, topic: str) -> bool:
        """End the run of a topic, in whatever process it is; returns when it has ended.

        False: there is none that goes on.
        """
        return await self._runs.stop(topic)

    async def status(self, topic: str) -> RunStatus | None:
        """How the run of a topic is doing; None: there is none, or it ended longer ago than ttl."""
        return await self._runs.status(topic)

    # Ending subscriptions.

    async def unsubscribe(self, subscription_id: str) -> bool:
        """End a subscription. A call of its handler that runs now is not interrupted.

        False: there is no subscription with this id.
        """
        found = self._deliveries.get(subscription_id)
        if found is None:
            return False
        found.subscription.cancel()
        return True

    async def finish(self, subscription_id: str) -> bool:
        """End a subscription once its handler has dealt with all that was published before.

        False: there is none with this id.
        """
        found = self._deliveries.get(subscription_id)
        if found is None:
            return False
        await self._outbox.drain()
        await found.reader.end_here()
        await found.pump.finish()
        return True

    def _release(self, subscription_id: str) -> None:
        """A subscription was cancelled."""
        pump = self._deliveries.pop(subscription_id).pump
        self._leaving.add(pump)
        pump.stop()

    def _pump_ended(self, subscription: Subscription, pump: Pump) -> None:
        subscription.cancel()
        self._leaving.discard(pump)

    def _handler_failed(self) -> None:
        self._failed += 1

    # The rest.

    def statistics(self) -> StreamStatistics:
        """Counts since the stream was made, as of now."""
        return StreamStatistics(
            published=self._published,
            refused=self._refused,
            dropped=self._dropped,
            failed=self._failed,
            buffered=self._outbox.queue.qsize(),
            subscribers=len(self._deliveries),
        )

    async def aclose(self, *, drain: bool = True) -> None:
        """End the stream: let handlers deal with what was published, then end subscriptions.

        Its runs are interrupted, and say so. Its consumers end: the handler of `Consumer.run` deals
        with the event that it has; what is dealt with is committed.

        Args:
            drain: False: handlers are interrupted, but for those of consumers, which nobody waits
                for; and what waits to be appended is given up, and counted as dropped.
        """
        self._closed = True
        pumps = {delivery.pump for delivery in self._deliveries.values()} | self._leaving
        try:
            await self._runs.aclose()
            if drain:
                await self._outbox.drain()
                with suppress(StreamClosed):  # the log has been closed, and has ended them
                    for reader in tuple(self._open_readers):
                        await reader.end_here()
                for pump in pumps:
                    await pump.finish()
        finally:
            self._dropped += self._outbox.queue.qsize()
            self._outbox.cancel()
            for pump in pumps:
                pump.cancel()
            if not drain:
                for reader in tuple(self._open_readers):
                    reader.end()
        for pump in pumps:
            await pump.finish()
        await self._outbox.finish()
        consumers = tuple(self._consumers)
        for consumer in consumers:
            consumer._end_reading()
        try:
            for consumer in consumers:
                if not await consumer._end(waits=drain):
                    self._closing.add(consumer)
        finally:
            self._log_waits = bool(self._closing)
            if self._owns_log and not self._closing:
                await self.log.close()

    async def _consumer_left(self, consumer: Consumer) -> None:
        self._consumers.discard(consumer)
        self._closing.discard(consumer)
        if self._owns_log and self._log_waits and not self._closing:
            self._log_waits = False
            await self.log.close()


class _Delivery(NamedTuple):
    """What reads for a subscription, and what calls its handler."""

    subscription: Subscription
    reader: Reader
    pump: Pump


def _receive(subscription: Subscription, event: Event) -> Any:
    """Give an event to a subscription's handler, if it wants it."""
    handler, filter_fn = subscription.handler, subscription.filter_fn
    if handler is None or not subscription.active:
        return None
    if filter_fn is not None and not event.is_control and not filter_fn(event):
        return None
    return handler(event)


class _Events:
    """The events of `LogStream.events`.

    It is no async generator: those end for good when somebody stops waiting for them, as a timeout
    does. Here the next `anext` goes on.
    """

    def __init__(self, stream: LogStream, open_reader: Callable[[], Awaitable[Reader]]) -> None:
        self._stream = stream
        self._open_reader = open_reader
        self._reader: Reader | None = None
        self._pending: Iterator[Event] = iter(())
        self._turns = Turns()
        self._is_read = False

    async def __aenter__(self) -> Self:
        self._stream._check_open()
        if self._reader is not None:
            raise RuntimeError("events() is entered once")
        self._reader = await self._open_reader()
        self._stream._open_readers.add(self._reader)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._reader is not None
        self._stream._open_readers.discard(self._reader)
        self._pending = iter(())
        self._reader.end()
        self._reader.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """The next event, as soon as there is one. Cancelled, it has lost nothing."""
        reader = self._reader
        if reader is None:
            raise RuntimeError("events() is an async context manager: async with stream.events()")
        if self._is_read:
            raise RuntimeError("somebody waits for the next event already")
        self._is_read = True
        try:
            if self._turns.are_due:
                await self._turns.give()
            while (event := next(self._pending, None)) is None:
                batch = await reader.read()
                if batch is None:
                    raise StopAsyncIteration
                self._pending = self._stream._events_in(batch)
            return event
        finally:
            self._is_read = False
