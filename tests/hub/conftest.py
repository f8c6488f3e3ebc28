from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from codomyrmex.events.streaming.hub import Hub
from codomyrmex.events.streaming.log import Log, MemoryLog
from tests.hub.serving import PATIENCE, ServedUrl, open_hub, serving


class CurrentHub:
    """The hub of the test that runs now: to start a server for each would take most of the time."""

    hub: Hub

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.hub(scope, receive, send)


@pytest.fixture(scope="session")
def current() -> CurrentHub:
    return CurrentHub()


@pytest.fixture(scope="session")
def shared_url(current: CurrentHub) -> Iterator[ServedUrl]:
    with serving(open_hub(), current) as url:
        yield url


@pytest.fixture(scope="session")
def shared_client(shared_url: ServedUrl) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_url, timeout=PATIENCE) as http:
        yield http


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()


@pytest.fixture
def hub(log: Log) -> Hub:
    return open_hub(log, allowed_origins=["https://friend.example"])


@pytest.fixture
def url(hub: Hub, current: CurrentHub, shared_url: ServedUrl) -> Iterator[ServedUrl]:
    current.hub = hub
    yield shared_url
    shared_url.run(hub.aclose())


@pytest.fixture
def client(url: ServedUrl, shared_client: httpx.Client) -> httpx.Client:
    assert shared_client.base_url == url
    return shared_client
