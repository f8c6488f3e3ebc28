"""The bounded queue between a stream and one subscriber, and what happens when it is full.

`SubscriberQueue` is an `asyncio.Queue` for whoever holds one: maxsize, put, get, the ``_nowait``
forms and `asyncio.QueueFull` mean what they always mean. Beyond that

- it may be filled from any thread, and belongs to no event loop;
- `offer` never waits: it does what the queue's overflow policy says, and counts what that cost;
- `iterate` reads it, waking once for however much has arrived, until it is ended;
- loss is visible: the reader finds a control event ``stream.lost`` in the place of what it lost,
  outside the queue's bound, and `statistics` counts it.

Policies: ``block`` (whoever fills it waits), ``drop_oldest``, ``drop_newest``, ``latest_by_key``
(a newer item takes the place of the one with the same key), ``disconnect`` (the subscriber is
ended, and told so).
"""

import asyncio
import logging
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast, get_args

from .errors import StreamClosed
from .models import Event, control_event
from .wakeups import Waiters, resolve, wait_until, wake, wake_all, withdraw

__all__ = [
    "HEARTBEAT_INTERVAL",
    "KeyedQueue",
    "Overflow",
    "QueueStatistics",
    "SubscriberQueue",
    "check_overflow",
    "make_queue",
    "prime",
    "topic_of",
]

Overflow: TypeAlias = Literal["block", "drop_oldest", "drop_newest", "latest_by_key", "disconnect"]
"""What happens when a subscriber is slower than its stream."""

HEARTBEAT_INTERVAL = 30.0
"""Seconds without an event after which a reader gets a HEARTBEAT, by default."""

_logger = logging.getLogger("codomyrmex.events.streaming")

T = TypeVar("T")


def check_overflow(policy: str, allowed: Iterable[str] = get_args(Overflow)) -> Overflow:
    """The policy itself, if it is one of those allowed here.

    Raises:
        ValueError: it is not; names those that are.
    """
    allowed = tuple(allowed)
    if policy not in allowed:
        raise ValueError(f"overflow is one of {', '.join(allowed)} here, not {policy!r}")
    return cast("Overflow", policy)


def topic_of(event: Any) -> Hashable:
    """The topic of an event, or None: the key that ``latest_by_key`` uses unless told otherwise."""
    return cast("Hashable", event.metadata.get("topic"))


def prime(generator: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Run an async generator up to its first ``yield``, which must come before any ``await``.

    A generator that was never started does not run its ``finally`` when it is closed or dropped.
    One that has been primed does, so what it was made to release is released in any case.
    """
    try:
        generator.__anext__().__await__().send(None)
    except StopIteration:
        return generator
    raise AssertionError("the generator awaited before its first yield")  # pragma: no cover


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """What has passed through one subscriber's queue.

    Attributes:
        size: items in the queue now.
        maxsize: its bound; 0: none.
        overflow: its policy.
        received: items that were taken into the queue.
        dropped: items lost to the policy.
        replaced: items that a newer one with the same key took the place of.
    """

    size: int
    maxsize: int
    overflow: str
    received: int
    dropped: int
    replaced: int


@dataclass(slots=True)
class _Loss:
    """Something the reader will never get.

    Attributes:
        at: how many items were received before it: the reader that has had these is told.
        count: how many items it was.
        final: whether it is why the queue ended.
    """

    at: int
    count: int
    final: bool = False


class SubscriberQueue(asyncio.Queue[T]):
    """The queue of one subscriber. See the module for what it promises.

    Args:
        maxsize: how many items it holds; 0 or less: any number.
        overflow: what `offer` does when it is full.
        name: whose queue this is, for the log.
        crowd: a set in which the queue stands while it is full and its policy is ``block``, so
            that a stream sees at a glance whether any subscriber is behind. It leaves the set
            when it is down to half.
    """

    def __init__(
        self,
        maxsize: int = 0,
        overflow: Overflow = "drop_newest",
        *,
        name: str = "",
        crowd: "set[SubscriberQueue[T]] | None" = None,
    ) -> None:
        super().__init__(maxsize)  # calls _init
        self.name = name
        self.overflow = check_overflow(overflow)
        self.dropped = 0
        self.replaced = 0
        self.ended = False
        self.reading = 0  # readers there are; more than one only while an abandoned one closes
        self._limit = maxsize if maxsize > 0 else sys.maxsize
        self._low = self._limit // 2
        self._crowd: set[SubscriberQueue[T]] = set() if crowd is None else crowd
        self._crowded = False
        self._received = 0
        self._evicted = 0
        self._done = 0
        self._losses: deque[_Loss] = deque()
        self._readers: Waiters = deque()
        self._writers: Waiters = deque()
        self._joiners: Waiters = deque()
        self._waiting_for_room: Waiters = deque()

    def _init(self, maxsize: int) -> None:
        del maxsize
        self._queue: Any = deque()

    def __repr__(self) -> str:
        bound = self._maxsize or "unbounded"  # type: ignore[attr-defined]
        state = ", ended" if self.ended else ""
        return f"<{type(self).__name__} {len(self._queue)}/{bound} {self.overflow}{state}>"

    # What an asyncio.Queue can do, for any thread and any event loop.

    def qsize(self) -> int:
        """How many items are in the queue; control events are not counted."""
        return len(self._queue)

    def empty(self) -> bool:
        """Whether there is no item in the queue."""
        return not self._queue

    def full(self) -> bool:
        """Whether the queue holds as many items as it may."""
        return len(self._queue) >= self._limit

    def put_nowait(self, item: T) -> None:
        """Take an item in.

        Raises:
            asyncio.QueueFull: there is no room, whatever the policy: it is `offer` that obeys it.
            StreamClosed: the queue has ended.
        """
        if self.ended:
            raise StreamClosed("the queue of a subscription that has ended takes no more items")
        if not self._accepts(item):
            raise asyncio.QueueFull
        self.force(item)

    async def put(self, item: T) -> None:
        """Take an item in, as soon as there is room.

        Raises:
            StreamClosed: the queue has ended, before or meanwhile.
        """
        while True:
            try:
                return self.put_nowait(item)
            except asyncio.QueueFull:
                await wait_until(self._writers, lambda: self.ended or self._accepts(item))

    def get_nowait(self) -> T:
        """Take the oldest item out.

        Raises:
            asyncio.QueueEmpty: there is none.
        """
        try:
            item: T = self._queue.popleft()
        except IndexError:
            raise asyncio.QueueEmpty from None
        self._taken()
        return item

    async def get(self) -> T:
        """Take the oldest item out, as soon as there is one.

        Raises:
            StreamClosed: the queue has ended and is empty.
        """
        while True:
            try:
                return self.get_nowait()
            except asyncio.QueueEmpty:
                if self.ended:
                    raise StreamClosed("the subscription has ended") from None
                await wait_until(self._readers, lambda: self.ended or bool(self._queue))

    def task_done(self) -> None:
        """Say that an item that was taken out has been dealt with, for `join`.

        Raises:
            ValueError: said more often than items were received.
        """
        if not self._unfinished():
            raise ValueError("task_done() called too many times")
        self._done += 1
        if not self._unfinished():
            wake_all(self._joiners)

    async def join(self) -> None:
        """Wait until `task_done` was said for every item that came through the queue."""
        while self._unfinished():
            await wait_until(self._joiners, lambda: not self._unfinished())

    def shutdown(self, immediate: bool = False) -> None:
        """End the queue; with `immediate`, forget what is in it as well."""
        if immediate:
            self.clear()
        self.end()

    # What a stream does with it.

    def offer(self, item: T) -> bool:
        """Take an item in as the policy says, without ever waiting.

        Returns:
            Whether the item itself was taken. With ``block``, False means that there is no room:
            nothing was lost, the item is still the caller's.
        """
        if self.ended or (len(self._queue) >= self._limit and not self._make_room()):
            return False
        self._queue.append(item)
        self._received += 1
        if len(self._queue) >= self._limit:
            self._filled()
        if self._readers:
            wake(self._readers)
        return True

    def fill(self, items: "list[T]") -> int:
        """Take in as many of these items as there is room for; returns how many that were.

        The policy is not asked: what does not fit is still the caller's.
        """
        room = self._limit - len(self._queue)
        count = len(items)
        if self.ended:
            return count  # nobody will read them
        if room < count:
            items = items[:room]
            count = room
        if count:
            self._queue.extend(items)
            self._received += count
            if room == count:
                self._filled()
            if self._readers:
                wake(self._readers)
        return count

    def feed(self, item: T) -> None:
        """`offer`, for a publisher that has waited for `room` already or must not wait.

        With ``block`` the item is taken although there may be no room.
        """
        if self.ended or (
            len(self._queue) >= self._limit and self.overflow != "block" and not self._make_room()
        ):
            return
        self._queue.append(item)
        self._received += 1
        if len(self._queue) >= self._limit:
            self._filled()
        if self._readers:
            wake(self._readers)

    def force(self, item: T) -> None:
        """Take an item in although there may be no room."""
        self._queue.append(item)
        self._received += 1
        if len(self._queue) >= self._limit:
            self._filled()
        if self._readers:
            wake(self._readers)

    def lose(self, count: int) -> None:
        """Record that so many items, due now, will never arrive."""
        self._count_dropped(count)
        at = self._received
        if self._losses and self._losses[-1].at == at:
            self._losses[-1].count += count
        else:
            self._losses.append(_Loss(at, count))
        if self._readers:
            wake(self._readers)

    def end(self) -> None:
        """Take nothing more in; the reader gets what is there, and then its iteration ends."""
        self.ended = True
        self._leave_crowd()
        wake_all(self._readers)
        wake_all(self._writers)

    def clear(self) -> None:
        """Forget what is in the queue, its losses too."""
        self._evicted += len(self._queue)
        self._queue.clear()
        self._losses.clear()
        self._leave_crowd()
        wake_all(self._writers)

    def take_all(self) -> "list[T]":
        """Take out all that is in the queue, oldest first, and forget its losses."""
        taken: list[T] = []
        while True:
            try:
                taken.append(self._queue.popleft())
            except IndexError:
                break
        self._losses.clear()
        self._taken()
        return taken

    def snapshot(self) -> "list[T]":
        """What is in the queue now, oldest first, without taking it out."""
        return list(self._queue)

    @property
    def crowded(self) -> bool:
        """Whether a ``block`` queue was filled and is not yet down to half."""
        return self._crowded

    def when_room(self, callback: Callable[[], object]) -> None:
        """Call back once a ``block`` queue that was filled is down to half, or ended.

        On the running event loop, and soon if that is so already.
        """
        future = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda _: callback())
        self._waiting_for_room.append(future)
        if not self._crowded:
            wake_all(self._waiting_for_room)

    async def room(self) -> None:
        """Wait until a ``block`` queue that was filled is down to half, or ended."""
        while self._crowded:
            await wait_until(self._waiting_for_room, lambda: not self._crowded)

    @property
    def received(self) -> int:
        """How many items have stood in the queue."""
        return self._received

    @property
    def evicted(self) -> int:
        """How many of those were dropped or forgotten again instead of being taken out."""
        return self._evicted

    def statistics(self) -> QueueStatistics:
        """Counts, as of now."""
        return QueueStatistics(
            size=len(self._queue),
            maxsize=self.maxsize,
            overflow=self.overflow,
            received=self._received,
            dropped=self.dropped,
            replaced=self.replaced,
        )

    async def iterate(
        self,
        *,
        first: Iterable[T] = (),
        idle: float | None = None,
        on_idle: Callable[[], T] | None = None,
        on_close: Callable[[], object] | None = None,
    ) -> AsyncGenerator[T, None]:
        """The items, as they come, until the queue has ended and is empty.

        Control events come between them where something was lost. The first thing yielded is
        None and is for `prime`.

        Args:
            first: what is yielded before the items of the queue.
            idle: after so many seconds without an item, one that `on_idle` makes is yielded;
                None: never.
            on_idle: makes that item.
            on_close: is called when the iteration is over, however it ends.
        """
        items = self._queue
        losses = self._losses
        timer = _IdleTimer(idle) if idle is not None and on_idle is not None else None
        self.reading += 1
        try:
            yield cast("T", None)
            for item in first:
                yield item
            while True:
                if losses and self._lost_here():
                    yield cast("T", self._take_loss())
                    continue
                try:
                    item = items.popleft()
                except IndexError:
                    if self.ended:
                        return
                    if await self._wait_to_read(timer) and on_idle is not None:
                        yield on_idle()
                    continue
                if self._crowded or self._writers:
                    self._taken()
                yield item
        finally:
            self.reading -= 1
            if timer is not None:
                timer.close()
            if on_close is not None:
                on_close()

    # Inside.

    def _accepts(self, item: T) -> bool:
        return len(self._queue) < self._limit

    def _unfinished(self) -> int:
        return self._received - self._evicted - self._done

    def _count_dropped(self, count: int) -> None:
        if not self.dropped:
            _logger.warning(
                "subscription %s reads more slowly than its stream publishes; of its queue of %d "
                "events it loses some by its policy %r (this is said once, statistics() counts)",
                self.name,
                self.maxsize,
                self.overflow,
            )
        self.dropped += count

    def _discard(self, item: T) -> None:
        """An item was evicted: for a subclass whose items someone waits for."""

    def _make_room(self) -> bool:
        """Do what the policy says of a full queue. Returns whether there is room now."""
        policy = self.overflow
        if policy == "block":
            return False
        if policy == "drop_newest":
            self.lose(1)
            return False
        if policy == "disconnect":
            self._count_dropped(1)
            self._losses.append(_Loss(self._received, 1, final=True))
            self.end()
            return False
        try:
            item = self._queue.popleft()
        except IndexError:  # a reader in another thread was quicker
            return True
        self._evicted += 1
        self._count_dropped(1)
        self._discard(item)
        # What was dropped stood at the head, so it is told before all that is still here.
        at = self._received - len(self._queue)
        if self._losses and self._losses[0].at >= at - 1:
            self._losses[0].at = at
            self._losses[0].count += 1
        else:
            self._losses.appendleft(_Loss(at, 1))
        return True

    def _filled(self) -> None:
        if self.overflow == "block" and not self._crowded:
            self._crowded = True
            self._crowd.add(self)

    def _leave_crowd(self) -> None:
        self._crowded = False
        self._crowd.discard(self)
        wake_all(self._waiting_for_room)

    def _taken(self) -> None:
        """An item was taken out: let in who waited for that."""
        if self._crowded and len(self._queue) <= self._low:
            self._leave_crowd()
        if self._writers:
            wake(self._writers)

    def due_loss(self, *, before_last: bool = False) -> Event | None:
        """The control event for what was lost before the next item, once; None: nothing was.

        For a reader that takes items out one by one; `iterate` does this by itself.

        Args:
            before_last: look at the place before the item that was taken out last instead.
        """
        taken = self._received - len(self._queue) - before_last
        return self._take_loss() if self._losses and self._losses[0].at <= taken else None

    def _lost_here(self) -> bool:
        """Whether the next thing for the reader is a loss, not an item."""
        return self._losses[0].at <= self._received - len(self._queue)

    def _take_loss(self) -> Event:
        loss = self._losses.popleft()
        if loss.final:
            return control_event("stream.disconnect", reason="overflow", lost=loss.count)
        return control_event("stream.lost", lost=loss.count, overflow=self.overflow)

    async def _wait_to_read(self, timer: "_IdleTimer | None") -> bool:
        """Wait for an item, a loss or the end. True: nothing of that came within the idle time."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._readers.append(future)
        if self._queue or self.ended or self._losses:
            withdraw(self._readers, future)
            return False
        if timer is not None:
            timer.start(future)
        try:
            await future
        finally:
            if timer is not None:
                timer.future = None
            if future.cancelled() or (timer is not None and timer.expired):
                withdraw(self._readers, future)
        return (
            timer is not None and timer.expired and not (self._queue or self._losses or self.ended)
        )


class KeyedQueue(SubscriberQueue[T]):
    """A queue with the policy ``latest_by_key``: at most one item of each key, the newest.

    A newer item takes the place in line of the one it replaces, which counts as `replaced`. Only
    when there are as many different keys as the queue may hold is the oldest dropped, and told.
    """

    def __init__(
        self,
        maxsize: int = 0,
        *,
        key: Callable[[T], Hashable] = topic_of,
        name: str = "",
        crowd: "set[SubscriberQueue[T]] | None" = None,
    ) -> None:
        self._key = key
        super().__init__(maxsize, "latest_by_key", name=name, crowd=crowd)

    def _init(self, maxsize: int) -> None:
        del maxsize
        self._queue = _KeyedItems(self._key)

    def _accepts(self, item: T) -> bool:
        return super()._accepts(item) or self._queue.has(item)

    def offer(self, item: T) -> bool:
        """Take an item in, in place of the one with the same key if there is one."""
        if self.ended:
            return False
        return self._replace(item) or super().offer(item)

    def force(self, item: T) -> None:
        """Take an item in although there may be no room, unless it has a key that is there."""
        if not self._replace(item):
            super().force(item)

    def _replace(self, item: T) -> bool:
        old = self._queue.exchange(item)
        if old is None:
            return False
        self.replaced += 1
        self._discard(old)
        return True

    def feed(self, item: T) -> None:
        """`offer`: this policy never makes anybody wait."""
        self.offer(item)

    def fill(self, items: "list[T]") -> int:
        """Take in all of these items: the policy makes nobody wait, so there is no use in it."""
        for item in items:
            self.offer(item)
        return len(items)


class _KeyedItems(Generic[T]):
    """What a deque is to other queues: the items in line, at most one of each key.

    An item whose key cannot be made is like no other: it has a key of its own.
    """

    def __init__(self, key: Callable[[T], Hashable]) -> None:
        self._make_key = key
        self._by_key: dict[Hashable, T] = {}
        self.clear = self._by_key.clear

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Any:
        return iter(self._by_key.values())

    def _key(self, item: T) -> Hashable:
        try:
            key = self._make_key(item)
            hash(key)
        except Exception:
            _logger.exception("key function %r failed on %r", self._make_key, item)
            return (_KeyedItems, id(item))  # it is in line, so no other can have this id
        return key

    def has(self, item: T) -> bool:
        return self._key(item) in self._by_key

    def exchange(self, item: T) -> T | None:
        """Put an item in place of the one that has its key, and return that one, if there is."""
        key = self._key(item)
        old = self._by_key.get(key)
        if old is not None:
            self._by_key[key] = item
        return old

    def append(self, item: T) -> None:
        self._by_key[self._key(item)] = item

    def popleft(self) -> T:
        try:
            return self._by_key.pop(next(iter(self._by_key)))
        except StopIteration:
            raise IndexError from None


class _IdleTimer:
    """One timer for all the idle times of a reader: it is armed again only when it has expired.

    Arming and cancelling one for each item would cost more than the item.
    """

    __slots__ = ("_handle", "_since", "expired", "future", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.future: asyncio.Future[None] | None = None
        self.expired = False
        self._since = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self, future: "asyncio.Future[None]") -> None:
        loop = future.get_loop()
        self.future = future
        self.expired = False
        self._since = loop.time()
        if self._handle is None:
            self._handle = loop.call_later(self.seconds, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handle = None
        if self.future is None:
            return
        due = self._since + self.seconds
        if due > loop.time():
            self._handle = loop.call_at(due, self._expire, loop)
        else:
            self.expired = True
            resolve(self.future)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()


def make_queue(
    maxsize: int,
    overflow: str,
    *,
    key: Callable[[Event], Hashable] | None = None,
    name: str = "",
    crowd: set[SubscriberQueue[Event]] | None = None,
) -> SubscriberQueue[Event]:
    """The queue for a policy.

    Raises:
        ValueError: there is no such policy, or it has no use for a key.
    """
    policy = check_overflow(overflow)
    if policy == "latest_by_key":
        return KeyedQueue(maxsize, key=key or topic_of, name=name, crowd=crowd)
    if key is not None:
        raise ValueError(f"a key is for overflow='latest_by_key', not for {policy!r}")
    return SubscriberQueue(maxsize, policy, name=name, crowd=crowd)
