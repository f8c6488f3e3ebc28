"""Handlers and threads that the tests of the streams share."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from codomyrmex.events.streaming import Event, create_event

PATIENCE = 10.0  # seconds of real time for what must happen at once


def data_of(events: list[Event]) -> list[Any]:
    return [event.data for event in events]


class TakesEvents(Protocol):
    def publish_nowait(self, event: Event) -> bool: ...


def publish(stream: TakesEvents, *data: Any) -> None:
    """Publish without a loop, again and again if the stream is full."""
    for each in data:
        while not stream.publish_nowait(create_event(each)):
            time.sleep(0)


def plainly(function: Callable[[Event], Any]) -> Callable[[Event], Any]:
    """A function that does not look async and returns what an async one does."""

    def call(event: Event) -> Any:
        return function(event)

    return call


class Gate:
    """A handler that stays in its first call until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()
        self.got: list[Any] = []

    def __call__(self, event: Event) -> None:
        self.entered.set()
        assert self.open.wait(PATIENCE)
        self.got.append(event.data)


@contextmanager
def thread(target: Callable[[], object]) -> Iterator[threading.Thread]:
    """Run a function in a thread, and wait for it at the end; what it raises comes out there."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        yield worker
    finally:
        worker.join(PATIENCE)
    assert not worker.is_alive()
    if errors:
        raise errors[0]
