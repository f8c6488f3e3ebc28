"""Publishing to synchronous handlers, in the publisher's own turn."""

from collections.abc import Callable
from itertools import repeat
from typing import Any

import aioreactive
import blinker
import pyee
import reactivex

from benchmarks.harness import Line, Run, at_least, more_than
from benchmarks.model import PlainEvent
from codomyrmex.events.streaming import Event, InMemoryStream

Handler = Callable[[Any], None]


def counting_handlers(number: int) -> tuple[list[Handler], Callable[[], int]]:
    """Distinct handlers, and a function that says how often they have been called in all."""
    delivered = 0

    def make() -> Handler:
        def handler(_event: Any) -> None:
            nonlocal delivered
            delivered += 1

        return handler

    return [make() for _ in range(number)], lambda: delivered


def loop_over_a_list(run: Run) -> None:
    handlers, delivered = counting_handlers(run.width)
    with run.timed():
        for event in repeat(PlainEvent(), run.units):
            for handler in handlers:
                handler(event)
    run.delivered = delivered()


async def aioreactive_subject(run: Run) -> None:
    delivered = 0
    subject = aioreactive.AsyncSubject()
    for _ in range(run.width):

        async def handler(_event: Any) -> None:
            nonlocal delivered
            delivered += 1

        await subject.subscribe_async(aioreactive.AsyncAnonymousObserver(handler))
    with run.timed():
        for event in repeat(PlainEvent(), run.units):
            await subject.asend(event)
    run.delivered = delivered


def reactivex_subject(run: Run) -> None:
    handlers, delivered = counting_handlers(run.width)
    subject = reactivex.Subject()
    for handler in handlers:
        subject.subscribe(handler)
    with run.timed():
        for event in repeat(PlainEvent(), run.units):
            subject.on_next(event)
    run.delivered = delivered()


def blinker_signal(run: Run) -> None:
    handlers, delivered = counting_handlers(run.width)
    signal = blinker.Signal()
    for handler in handlers:
        signal.connect(handler, weak=False)
    with run.timed():
        for event in repeat(PlainEvent(), run.units):
            signal.send(event)
    run.delivered = delivered()


def pyee_emitter(run: Run) -> None:
    handlers, delivered = counting_handlers(run.width)
    emitter = pyee.EventEmitter()
    for handler in handlers:
        emitter.on("event", handler)
    with run.timed():
        for event in repeat(PlainEvent(), run.units):
            emitter.emit("event", event)
    run.delivered = delivered()


async def ours(run: Run) -> None:
    handlers, delivered = counting_handlers(run.width)
    stream = InMemoryStream()
    for handler in handlers:
        await stream.subscribe(handler)
    with run.timed():
        for event in repeat(Event(), run.units):
            await stream.publish(event)
    run.delivered = delivered()


LINES = [
    Line(
        name=f"publish-{width}",
        work=f"publish to {width} handler{'s' * (width > 1)}",
        floor=("loop over a list", loop_over_a_list),
        peers={
            "aioreactive": aioreactive_subject,
            "reactivex": reactivex_subject,
            "blinker": blinker_signal,
            "pyee": pyee_emitter,
        },
        ours=ours,
        reach=(at_least(0.9, "peer") if width == 1 else more_than(1.0, "peer"),),
        width=width,
        deliveries=width,
        quick_units=10,
    )
    for width in (1, 10, 100, 1000)
]
