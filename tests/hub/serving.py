"""A hub under uvicorn in a thread of its own, for tests that speak to it over real sockets."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx
import uvicorn

from codomyrmex.events.streaming.hub import Hub, everyone
from codomyrmex.events.streaming.log import Log, Record
from codomyrmex.events.streaming.models import Event
from codomyrmex.events.streaming.server.hub_server import HubServer

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds within which everything here must have happened."""


class ServedUrl(str):
    """Where a hub is served, without a final slash; and what its server has and can do."""

    __slots__ = ("connections", "loop", "stop")
    connections: Callable[[], int]
    loop: asyncio.AbstractEventLoop
    stop: Callable[[], None]

    @property
    def host(self) -> str:
        """Name and port."""
        return self.removeprefix("http://")

    @property
    def websocket(self) -> str:
        return f"ws://{self.host}"

    def connect(self) -> socket.socket:
        name, _, port = self.host.partition(":")
        return socket.create_connection((name, int(port)), PATIENCE)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine where the hub runs."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)


def open_hub(log: Log | str = "memory://", **options: Any) -> Hub:
    """A hub that whoever reaches it may use."""
    return Hub(log, authorize=everyone, **options)


@contextmanager
def serving(hub: Hub, app: Callable[..., Any] | None = None, **options: Any) -> Iterator[ServedUrl]:
    """Serve `hub`, or an `app` that contains it."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        url = ServedUrl(f"http://127.0.0.1:{listening.getsockname()[1]}")
        ready = threading.Event()

        async def start() -> None:
            url.loop = asyncio.get_running_loop()
            ready.set()

        config = uvicorn.Config(app or hub, lifespan="off", log_config=None, **options)
        server = HubServer(config, hub, start=start)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server does not end"

        url.stop = stop
        url.connections = lambda: len(server.server_state.connections)
        try:
            assert ready.wait(PATIENCE), "the server does not start"
            yield url
        finally:
            stop()


def append(log: Log, *events: Event | Record) -> None:
    """Append events to a log that any thread may use."""
    asyncio.run(log.append(events))


def error_of(answer: httpx.Response) -> str:
    """The reason of a refusal, which is JSON, may not be kept, and has nothing else in it."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    body: dict[str, str] = answer.json()
    assert list(body) == ["error"]
    return body["error"]


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until what happens in another thread has happened."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.005)
