"""`SubscriberQueue`: a bounded queue for one reader, filled from any thread."""

import asyncio
import logging
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from ..errors import AlreadyConsumed, StreamClosed
from ..models import Event, control_event
from ..wakeups import Waiters, running_loop, wait_until, wake, wake_all
from .idle import IdleTimer
from .policies import Overflow, QueueStatistics, check_overflow

__all__ = ["SubscriberQueue", "hand_over_to_all"]

_logger = logging.getLogger("codomyrmex.events.streaming")

T = TypeVar("T")

# Where asyncio.Queue would keep those who wait for it, who stand elsewhere here.
_NOBODY: Any = ()


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
    """The queue of one subscriber. See `subscribers` for what it promises.

    Threads that fill it at the same moment may each put one item more into it than it may hold:
    looking and adding is not one step, and making it one would slow down every publisher.

    Args:
        maxsize: how many items it holds; 0 or less: any number.
        overflow: what `offer` does when it is full. ``latest_by_key`` needs a `KeyedQueue`.
        name: whose queue this is, for the log.
        crowd: a set in which the queue stands while it is full and its policy is ``block``, so
            that a stream sees at a glance whether any subscriber is behind. It leaves the set
            when it is down to half.

    Attributes:
        dropped: how many items were lost.
        replaced: how many a newer one took the place of.
        ended: whether nothing more is taken in.
        reading: how many readers `iterate` has now. More than one only while one that was
            abandoned is being closed.
    """

    _policies: ClassVar[tuple[str, ...]] = ("block", "drop_oldest", "drop_newest", "disconnect")

    def __init__(
        self,
        maxsize: int = 0,
        overflow: Overflow = "drop_newest",
        *,
        name: str = "",
        crowd: "set[SubscriberQueue[T]] | None" = None,
    ) -> None:
        # Not asyncio.Queue's own: of its state only the bound is used here, and a subscriber is
        # held in as little memory as can be, for there may be very many. What every event touches
        # comes first, and so stands together in memory.
        self._init(maxsize)
        # Who iterates and waits: it can be handed an item, past the queue. And in which loop.
        self._taker: asyncio.Future[Any] | None = None
        self._taker_loop: asyncio.AbstractEventLoop | None = None
        self._received = 0
        self.ended = False
        self._losses: list[_Loss] = []
        self._crowded = False
        self._writers: Waiters = []
        self._readers: Waiters = []  # who waits in `get`
        self._limit = maxsize if maxsize > 0 else sys.maxsize
        self._low = self._limit // 2
        self._crowd: set[SubscriberQueue[T]] = set() if crowd is None else crowd
        self.name = name
        self.overflow = check_overflow(overflow, self._policies)
        self.dropped = 0
        self.replaced = 0
        self.reading = 0
        self._evicted = 0
        self._done = 0
        self._joiners: Waiters = []
        self._waiting_for_room: Waiters = []
        self._maxsize = maxsize
        self._unfinished_tasks = 0
        self._getters = self._putters = _NOBODY

    def _init(self, maxsize: int) -> None:
        del maxsize
        self._queue: Any = deque()

    def __repr__(self) -> str:
        bound = self.maxsize if self.maxsize > 0 else "unbounded"
        state = ", ended" if self.ended else ""
        return f"<{type(self).__name__} {len(self._queue)}/{bound} {self.overflow}{state}>"

    __str__ = __repr__

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
        if self.full():
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
                await wait_until(self._writers, lambda: self.ended or not self.full())

    def get_nowait(self) -> T:
        """Take the oldest item out.

        Raises:
            asyncio.QueueEmpty: there is none.
        """
        try:
            item: T = self._queue.popleft()
        except IndexError:
            raise asyncio.QueueEmpty from None
        if self._losses:
            self._join_overdue()
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
        """Wait until `task_done` was said for every item that came through the queue.

        An item that was dropped, replaced or cleared is not waited for.
        """
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
        # In this order and next to one another, here and wherever items come in: between the two a
        # reader in another thread would take a loss that is due for one that is not.
        self._received += 1
        self._queue.append(item)
        if len(self._queue) >= self._limit:
            self._filled()
        if self._taker is not None or self._readers:
            self._wake_reader()
        return True

    def fill(self, items: "list[T]") -> int:
        """Take in as many of these items as there is room for; returns how many that were.

        The policy is not asked: what does not fit is still the caller's. A queue that has ended
        takes all of them, for nobody.
        """
        count = len(items)
        if self.ended:
            return count
        room = self._limit - len(self._queue)
        if room < count:
            count = max(room, 0)
            items = items[:count]
        if count:
            self._received += count
            self._queue.extend(items)
            if room == count:
                self._filled()
            if self._taker is not None or self._readers:
                self._wake_readers()
        return count

    def hand_over(self, item: T) -> bool:
        """Give an item to the one who waits for it, past the queue. False: that cannot be done.

        It spares both sides the queue. Not across threads: only in the loop of the one who waits
        is it certain that nobody else ends the wait meanwhile.
        """
        return item is not None and not hand_over_to_all((self,), item, running_loop())

    def feed(self, item: T) -> None:
        """`offer`, for a publisher that has waited for `room` already or must not wait.

        With ``block`` the item is taken although there may be no room.
        """
        if self.ended or (
            len(self._queue) >= self._limit and self.overflow != "block" and not self._make_room()
        ):
            return
        if self._taker is not None and self.hand_over(item):
            return
        self._received += 1
        self._queue.append(item)
        if len(self._queue) >= self._limit:
            self._filled()
        if self._taker is not None or self._readers:
            self._wake_reader()

    def force(self, item: T) -> None:
        """Take an item in although there may be no room, or the queue has ended."""
        self._received += 1
        self._queue.append(item)
        if len(self._queue) >= self._limit:
            self._filled()
        if self._taker is not None or self._readers:
            self._wake_reader()

    def put_back(self, item: T) -> None:
        """Put an item that was taken out, or what is left of it, before all others."""
        self._queue.appendleft(item)

    def lose(self, count: int) -> None:
        """Record that so many items, due now, will never arrive."""
        self._count_dropped(count)
        losses, at = self._losses, self._received
        if losses and losses[-1].at == at:
            losses[-1].count += count
        else:
            losses.append(_Loss(at, count))
        if self._taker is not None or self._readers:
            self._wake_reader()

    def end(self) -> None:
        """Take nothing more in; the reader gets what is there, and then its iteration ends."""
        self.ended = True
        self._leave_crowd()
        self._wake_readers()
        wake_all(self._writers)

    def clear(self) -> None:
        """Forget what is in the queue, its losses too."""
        self._evicted += len(self._queue)
        self._queue.clear()
        self._losses.clear()
        self._leave_crowd()
        wake_all(self._writers)
        if not self._unfinished():
            wake_all(self._joiners)

    def take_all(self) -> "list[T]":
        """Take out all that is in the queue now, oldest first, and forget its losses."""
        # As many as there are now: other threads could fill it as fast as this empties it.
        taken = self.take(len(self._queue))
        self._losses.clear()
        return taken

    def take(self, count: int) -> "list[T]":
        """Take out so many items, oldest first, or as many as there are."""
        taken: list[T] = []
        for _ in range(count):
            try:
                taken.append(self._queue.popleft())
            except IndexError:  # another thread was quicker
                break
        if self._losses:
            self._join_overdue()
        if self._crowded and len(self._queue) <= self._low:
            self._leave_crowd()
        wake_all(self._writers)
        return taken

    def snapshot(self) -> "list[T]":
        """What is in the queue now, oldest first, without taking it out."""
        return list(self._queue)

    @property
    def free(self) -> int:
        """How many items there is room for; may be negative after `force`."""
        return self._limit - len(self._queue)

    @property
    def awaited(self) -> bool:
        """Whether one who iterates waits for an item, which may be handed over."""
        return self._taker is not None

    @property
    def read_out(self) -> bool:
        """Whether it has ended and its reader has had everything, what was lost included."""
        return self.ended and not self._queue and not self._losses

    @property
    def crowded(self) -> bool:
        """Whether a ``block`` queue was filled and is not yet down to half."""
        return self._crowded

    def when_room(self, callback: Callable[[], object]) -> None:
        """Call back once there is room for an item, or the queue has ended.

        On the running event loop, and soon if that is so already.
        """

        def call(_: object) -> None:
            callback()
            if not self.full():  # it may not use the room, and others wait for that
                wake(self._writers)

        future = asyncio.get_running_loop().create_future()
        future.add_done_callback(call)
        self._writers.append(future)
        if self.ended or not self.full():
            wake_all(self._writers)

    async def room(self) -> None:
        """Wait until a ``block`` queue that was filled is down to half, or ended."""
        while self._crowded:
            await wait_until(self._waiting_for_room, lambda: not self._crowded)

    def forget_waiters(self) -> None:  # pragma: no cover - in forked children only
        """Wake nobody who waits now: in a forked child nobody does any more."""
        self._taker = None
        for waiters in (self._writers, self._readers, self._joiners, self._waiting_for_room):
            waiters.clear()

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
            maxsize=max(self.maxsize, 0),
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

        Raises:
            AlreadyConsumed: another reader waits for the next item.
        """
        items = self._queue
        losses = self._losses
        timer = IdleTimer(idle) if idle is not None and on_idle is not None else None
        loop: asyncio.AbstractEventLoop | None = None
        self.reading += 1
        try:
            yield cast("T", None)
            for item in first:
                yield item
            while True:
                if losses and (loss := self.due_loss()) is not None:
                    yield cast("T", loss)
                    continue
                if items:
                    try:
                        item = items.popleft()
                    except IndexError:  # a publisher in another thread has dropped it
                        continue
                    if self._crowded or self._writers:
                        self._taken()
                    yield item
                    continue
                if self.ended:
                    return
                while True:
                    # As wait_until, here and not in a call: this is the way of a lone event. And
                    # the loop is looked up once: CPython 3.11 makes a system call to find it.
                    if loop is None:
                        loop = asyncio.get_running_loop()
                    future: asyncio.Future[Any] = loop.create_future()
                    if self._taker is not None and self._waits(self._taker):
                        raise AlreadyConsumed(self.name)
                    self._taker_loop = loop
                    self._taker = future
                    if items or losses or self.ended:
                        self._take_back(future)
                        break
                    try:
                        if timer is not None:
                            timer.future = future
                            timer.since = loop.time()
                            if timer.armed_on is not loop:
                                timer.arm(loop)
                        handed = await future
                    except BaseException as error:
                        self._take_back(future)
                        # Is it read on in another loop? Asyncio refuses to wait for the future.
                        if not isinstance(error, RuntimeError) or running_loop() is loop:
                            raise
                        loop = None
                        break
                    if handed is None:
                        break
                    yield handed
                if timer is not None and timer.expired:
                    timer.expired = False
                    if not self._has_news() and on_idle is not None:
                        yield on_idle()
        finally:
            self.reading -= 1
            if timer is not None:
                timer.close()
            if on_close is not None:
                on_close()

    def due_loss(self, *, before_last: bool = False) -> Event | None:
        """The control event for what was lost before the next item, once; None: nothing was.

        For a reader that takes items out one by one; `iterate` does this by itself.

        Args:
            before_last: look at the place before the item that was taken out last instead.
        """
        losses = self._losses
        if not losses:
            return None
        taken = self._received - len(self._queue) - before_last
        try:
            if losses[0].at > taken:
                return None
            loss = losses.pop(0)
            # What stood between them may have been lost as well: then it is one loss.
            while not loss.final and losses and losses[0].at <= taken and not losses[0].final:
                loss.count += losses.pop(0).count
        except IndexError:  # another thread has cleared them
            return None
        if loss.final:
            return control_event("stream.disconnect", reason="overflow", lost=loss.count)
        return control_event("stream.lost", lost=loss.count, overflow=self.overflow)

    # Inside.

    def _take_back(self, future: "asyncio.Future[Any]") -> None:
        """A wait is over before its time: what was handed over to it shall not be lost."""
        if self._taker is future:
            self._taker = None
        else:
            if future.done() and not future.cancelled() and (handed := future.result()) is not None:
                self.put_back(handed)
            # It was woken, perhaps by another thread and without having noticed: somebody else
            # may read by `get`.
            if self._has_news():
                self._wake_reader()
        future.cancel()

    @staticmethod
    def _waits(taker: "asyncio.Future[Any]") -> bool:
        """Whether somebody waits there still, and does so in a loop that can go on."""
        return not taker.done() and not taker.get_loop().is_closed()

    def _wake_reader(self) -> None:
        """An item has come: wake one who waits for it."""
        taker, self._taker = self._taker, None
        if taker is not None and not taker.done():
            wake([taker])
        else:
            wake(self._readers)

    def _wake_readers(self) -> None:
        """Items have come, or the end: wake all who wait."""
        taker, self._taker = self._taker, None
        if taker is not None:
            wake([taker])
        wake_all(self._readers)

    def _unfinished(self) -> int:
        return self._received - self._evicted - self._done

    def _count_dropped(self, count: int) -> None:
        if not self.dropped:
            _logger.warning(
                "%s reads more slowly than its stream publishes; of its queue of %d "
                "events it loses some by its policy %r (this is said once, statistics() counts)",
                f"subscription {self.name}" if self.name else "a subscriber",
                self.maxsize,
                self.overflow,
            )
        self.dropped += count

    def _discard(self, item: T) -> None:
        """An item was evicted or replaced: for a subclass whose items someone waits for."""

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
        # What was dropped stood at the head, so it is told before all that is still here, with
        # what was lost just before it. (A loss further back is of what came later.) This comes
        # first, since a reader in another thread may take the next item at any moment.
        losses, at = self._losses, self._received - len(self._queue)
        if losses and losses[0].at <= at:
            losses[0].at = at
            losses[0].count += 1
        else:
            losses.insert(0, _Loss(at, 1))
        self._evicted += 1
        self._count_dropped(1)
        self._discard(item)
        return True

    def _join_overdue(self) -> None:
        """Make one of the losses that a reader has passed without asking: `get` never asks.

        Only readers call this, and only they take losses away.
        """
        losses = self._losses
        passed = self._received - len(self._queue)
        try:
            while losses[1].at < passed:
                overdue = losses.pop(0)
                losses[0].count += overdue.count
        except IndexError:  # there is but one, or another thread has cleared them
            return

    def _filled(self) -> None:
        if self.overflow != "block" or self._crowded:
            return
        self._crowded = True
        self._crowd.add(self)
        # A reader in another thread may have emptied it, or ended it, before it could see this.
        if self.ended or len(self._queue) <= self._low:
            self._leave_crowd()

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

    def _has_news(self) -> bool:
        return bool(self._queue or self.ended or self._losses)


def hand_over_to_all(
    queues: Iterable[SubscriberQueue[T]], item: T, loop: asyncio.AbstractEventLoop | None
) -> list[SubscriberQueue[T]]:
    """Give an item, which is not None, to each who waits for it in this loop, past these queues.

    As `SubscriberQueue.hand_over`, in one call for all: it is the way of every lone event. The loop
    is the one that runs.

    Returns:
        The queues that did not get it.
    """
    others: list[SubscriberQueue[T]] = []
    for queue in queues:
        taker = queue._taker
        if taker is None or queue._taker_loop is not loop or queue._queue:
            others.append(queue)
            continue
        queue._taker = None
        try:
            taker.set_result(item)
        except asyncio.InvalidStateError:  # its task was cancelled and has not noticed yet
            others.append(queue)
        else:
            queue._received += 1
    return others
