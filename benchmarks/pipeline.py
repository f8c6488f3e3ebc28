"""A pipeline: publish, map, filter, sink."""

from collections.abc import AsyncIterable, AsyncIterator
from itertools import cycle, islice
from typing import Any

import aioreactive
import reactivex
from expression import pipe
from reactivex import operators

from benchmarks.harness import Line, Run, at_least, more_than
from benchmarks.model import PlainEvent
from codomyrmex.events.streaming import Event, InMemoryStream, StreamProcessor

KINDS = [{"paid": True}, {"paid": False}]


def unchanged(event: Any) -> Any:
    return event


def is_paid(event: Any) -> bool:
    return event.data["paid"]


class Sink:
    """Counts what reaches the end of the pipeline."""

    def __init__(self) -> None:
        self.delivered = 0

    def put(self, _event: Any) -> None:
        self.delivered += 1

    async def aput(self, _event: Any) -> None:
        self.delivered += 1


async def async_generators(run: Run) -> None:
    async def published() -> AsyncIterator[Any]:
        for event in islice(cycle([PlainEvent(kind) for kind in KINDS]), run.units * 2):
            yield event

    async def mapped(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
        async for event in events:
            yield unchanged(event)

    async def filtered(events: AsyncIterable[Any]) -> AsyncIterator[Any]:
        async for event in events:
            if is_paid(event):
                yield event

    sink = Sink()
    with run.timed():
        async for event in filtered(mapped(published())):
            sink.put(event)
    run.delivered = sink.delivered


async def aioreactive_operators(run: Run) -> None:
    sink = Sink()
    subject = aioreactive.AsyncSubject()
    paid = pipe(subject, aioreactive.map(unchanged), aioreactive.filter(is_paid))
    await paid.subscribe_async(aioreactive.AsyncAnonymousObserver(sink.aput))
    with run.timed():
        for event in islice(cycle([PlainEvent(kind) for kind in KINDS]), run.units * 2):
            await subject.asend(event)
    run.delivered = sink.delivered


def reactivex_operators(run: Run) -> None:
    sink = Sink()
    subject = reactivex.Subject()
    subject.pipe(operators.map(unchanged), operators.filter(is_paid)).subscribe(sink.put)
    with run.timed():
        for event in islice(cycle([PlainEvent(kind) for kind in KINDS]), run.units * 2):
            subject.on_next(event)
    run.delivered = sink.delivered


async def ours(run: Run) -> None:
    sink = Sink()
    source = InMemoryStream()
    processor = StreamProcessor(source).map(unchanged).filter(is_paid).sink(sink.put)
    await processor.start()
    with run.timed():
        for event in islice(cycle([Event(data=kind) for kind in KINDS]), run.units * 2):
            await source.publish(event)
        await processor.stop()
    run.delivered = sink.delivered


LINES = [
    Line(
        name="pipeline",
        work="publish → map → filter → sink",
        floor=("async generators composed", async_generators),
        peers={"aioreactive": aioreactive_operators, "reactivex": reactivex_operators},
        ours=ours,
        reach=(at_least(0.4, "floor"), more_than(1.0, "peer")),
    ),
]
