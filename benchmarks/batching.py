"""Collecting events into batches."""

from collections.abc import Callable
from itertools import repeat
from typing import Any

import reactivex
from reactivex import operators

from benchmarks.harness import Line, Run, at_least
from benchmarks.model import PlainEvent
from codomyrmex.events.streaming import BatchingStream, Event

SIZE = 100


class PlainBatches:
    """Appends to a list; when it is full, takes a new one and hands the old one over."""

    def __init__(self, on_batch: Callable[[list[Any]], None]) -> None:
        self._handlers = [on_batch]
        self._batch: list[Any] = []

    async def add(self, event: Any) -> None:
        self._batch.append(event)
        if len(self._batch) >= SIZE:
            self.flush()

    def flush(self) -> None:
        full, self._batch = self._batch, []
        for handler in self._handlers:
            handler(full)


async def append_and_swap(run: Run) -> None:
    delivered = 0

    def on_batch(events: list[Any]) -> None:
        nonlocal delivered
        delivered += len(events)

    batches = PlainBatches(on_batch)
    with run.timed():
        for event in repeat(PlainEvent(), run.units):
            await batches.add(event)
        batches.flush()
    run.delivered = delivered


def reactivex_buffer(run: Run) -> None:
    delivered = 0

    def on_batch(events: list[Any]) -> None:
        nonlocal delivered
        delivered += len(events)

    subject = reactivex.Subject()
    subject.pipe(operators.buffer_with_count(SIZE)).subscribe(on_batch)
    with run.timed():
        for event in repeat(PlainEvent(), run.units):
            subject.on_next(event)
        subject.on_completed()
    run.delivered = delivered


async def ours(run: Run) -> None:
    delivered = 0

    def on_batch(events: list[Event]) -> None:
        nonlocal delivered
        delivered += len(events)

    stream = BatchingStream(batch_size=SIZE)
    stream.on_batch(on_batch)
    await stream.start()
    with run.timed():
        for event in repeat(Event(), run.units):
            await stream.add(event)
        await stream.stop()
    run.delivered = delivered


LINES = [
    Line(
        name="batch",
        work=f"batches of {SIZE}, add",
        floor=("append to a list and swap", append_and_swap),
        peers={"reactivex": reactivex_buffer},
        ours=ours,
        reach=(at_least(0.4, "floor"),),
    ),
]
