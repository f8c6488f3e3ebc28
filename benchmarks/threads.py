"""Threads that publish: to handlers in the same threads, and to a coroutine in another."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from threading import Lock, Thread
from typing import Any

import blinker
import culsans
import janus
import pyee

from benchmarks.harness import Line, Run, at_least
from benchmarks.model import PlainEvent
from codomyrmex.events.streaming import AsyncStream, Event, InMemoryStream

THREADS = 4


@contextmanager
def publishing_threads(run: Run, publish: Callable[[Any], Any], event: Any) -> Iterator[None]:
    """Run threads that publish `run.units` events each; leaving waits for them."""

    def work() -> None:
        for each in repeat(event, run.units):
            publish(each)

    threads = [Thread(target=work) for _ in range(run.width)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def lock_and_list_of_handlers(run: Run) -> None:
    got: list[Any] = []

    def handler(event: Any) -> None:
        got.append(event)

    lock = Lock()
    recent: deque[Any] = deque(maxlen=1000)
    handlers = [handler]

    def publish(event: Any) -> None:
        with lock:
            recent.append(event)
            for handler in handlers:
                handler(event)

    with run.timed_in_all_threads(), publishing_threads(run, publish, PlainEvent()):
        pass
    run.delivered = len(got)


def blinker_signal(run: Run) -> None:
    got: list[Any] = []

    def handler(event: Any) -> None:
        got.append(event)

    signal = blinker.Signal()
    signal.connect(handler)
    with run.timed_in_all_threads(), publishing_threads(run, signal.send, PlainEvent()):
        pass
    run.delivered = len(got)


def pyee_emitter(run: Run) -> None:
    got: list[Any] = []

    def handler(event: Any) -> None:
        got.append(event)

    emitter = pyee.EventEmitter()
    emitter.on("event", handler)

    def publish(event: Any) -> None:
        emitter.emit("event", event)

    with run.timed_in_all_threads(), publishing_threads(run, publish, PlainEvent()):
        pass
    run.delivered = len(got)


async def ours_to_a_handler(run: Run) -> None:
    got: list[Any] = []

    def handler(event: Event) -> None:
        got.append(event)

    stream = InMemoryStream()
    await stream.subscribe(handler)

    def publish(event: Event) -> None:
        while not stream.publish_nowait(event):  # too much is waiting for the thread that delivers
            time.sleep(0)

    with run.timed_in_all_threads(), publishing_threads(run, publish, Event()):
        pass
    run.delivered = len(got)


async def deque_and_one_wake_up(run: Run) -> None:
    loop = asyncio.get_running_loop()
    pending: deque[Any] = deque()
    wake = asyncio.Event()
    waking = False

    def publish(event: Any) -> None:
        nonlocal waking
        pending.append(event)
        if not waking:
            waking = True
            loop.call_soon_threadsafe(wake.set)

    async def published() -> AsyncIterator[Any]:
        nonlocal waking
        while True:
            await wake.wait()
            wake.clear()
            waking = False
            while pending:
                yield pending.popleft()

    await count_events(run, published(), publish, PlainEvent())


async def janus_queue(run: Run) -> None:
    queue: janus.Queue[Any] = janus.Queue()
    expected = run.units * run.width
    with run.timed_in_all_threads(), publishing_threads(run, queue.sync_q.put, PlainEvent()):
        while run.delivered < expected:
            await queue.async_q.get()
            run.delivered += 1
    await queue.aclose()


async def culsans_queue(run: Run) -> None:
    queue: culsans.Queue[Any] = culsans.Queue()
    expected = run.units * run.width
    with run.timed_in_all_threads(), publishing_threads(run, queue.put_nowait, PlainEvent()):
        while run.delivered < expected:
            await queue.async_get()
            run.delivered += 1


async def ours_to_a_coroutine(run: Run) -> None:
    expected = run.units * run.width
    stream = AsyncStream(buffer_size=expected)
    await stream.start()
    events = stream.consume(await stream.subscribe(buffer_size=expected))
    await count_events(run, events, stream.publish_nowait, Event())
    await stream.stop()


async def count_events(
    run: Run, events: AsyncIterator[Any], publish: Callable[[Any], Any], event: Any
) -> None:
    expected = run.units * run.width
    with run.timed_in_all_threads(), publishing_threads(run, publish, event):
        async for _ in events:
            run.delivered += 1
            if run.delivered == expected:
                break


LINES = [
    Line(
        name="threads",
        work=f"{THREADS} threads into one stream",
        floor=("lock, deque, list of handlers", lock_and_list_of_handlers),
        peers={"blinker": blinker_signal, "pyee": pyee_emitter},
        ours=ours_to_a_handler,
        reach=(at_least(0.6, "floor"),),
        width=THREADS,
        deliveries=THREADS,
    ),
    Line(
        name="threads-coroutine",
        work=f"{THREADS} threads into a coroutine",
        floor=("deque and one wake-up at a time", deque_and_one_wake_up),
        peers={"janus": janus_queue, "culsans": culsans_queue},
        ours=ours_to_a_coroutine,
        reach=(at_least(0.4, "floor"),),
        width=THREADS,
        deliveries=THREADS,
    ),
]
