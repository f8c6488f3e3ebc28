"""A connection under servers and clients that misbehave on purpose."""

import asyncio
from typing import Any

import pytest

from codomyrmex.events.streaming.hub.authorize import Visitor
from codomyrmex.events.streaming.hub.connection import ABORT_EXTENSION, Connection, SlowReader
from codomyrmex.events.streaming.hub.http import ClientGone
from codomyrmex.events.streaming.testing import cancel_at_every_await

pytestmark = pytest.mark.virtual_time


class Peer:
    """What a server gives an application, with a client whose reading the test controls."""

    def __init__(self, kind: str = "http") -> None:
        self.kind = kind
        self.sent: list[Any] = []
        self.error: Exception | None = None
        self.reads = True
        self.aborted = 0
        self.gone = asyncio.Event()

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": f"{self.kind}.disconnect"}

    async def send(self, message: Any) -> None:
        if self.error is not None:
            raise self.error
        if not self.reads:
            await self.gone.wait()
            return
        self.sent.append(message["n"])

    def abort(self) -> None:
        self.aborted += 1
        asyncio.get_running_loop().call_later(0.1, self.gone.set)

    def connect(self, *, can_abort: bool = True) -> Connection:
        scope: dict[str, Any] = {"type": self.kind}
        if can_abort:
            scope["extensions"] = {ABORT_EXTENSION: {"abort": self.abort}}
        return Connection(scope, self.receive, self.send, Visitor(), 10.0)


def now() -> float:
    return asyncio.get_running_loop().time()


async def write_for_ever(connection: Connection) -> None:
    number = 0
    while True:
        await connection.write({"n": number})
        number += 1
        await asyncio.sleep(1)


async def test_a_write_that_takes_too_long() -> None:
    peer = Peer()
    peer.reads = False
    with pytest.raises(SlowReader):
        await peer.connect().write({"n": 1})
    assert now() == 10.0


async def test_a_client_that_stops_reading_is_cut() -> None:
    peer = Peer()
    connection = peer.connect()
    asyncio.get_running_loop().call_later(2.5, setattr, peer, "reads", False)
    with pytest.raises(ClientGone):
        await connection.race(write_for_ever(connection), connection.gone())
    assert peer.sent == [0, 1, 2]
    assert peer.aborted == 1
    assert now() == 13.1  # the server's word that it is gone has been waited for
    await connection.say_last({"n": "bye"})
    assert peer.sent == [0, 1, 2]


async def test_where_the_server_cannot_cut_nothing_is_waited_for() -> None:
    peer = Peer()
    peer.reads = False
    connection = peer.connect(can_abort=False)
    with pytest.raises(ClientGone):
        await connection.race(write_for_ever(connection), connection.gone())
    assert now() == 10.0


async def test_a_server_that_cuts_but_does_not_tell() -> None:
    peer = Peer()
    peer.reads = False
    peer.gone.set = lambda: None  # type: ignore[method-assign]
    connection = peer.connect()
    with pytest.raises(ClientGone):
        await connection.race(write_for_ever(connection), connection.gone())
    assert now() == 11.0


async def test_a_client_that_leaves_ends_the_race() -> None:
    peer = Peer()
    connection = peer.connect()
    asyncio.get_running_loop().call_later(1.5, peer.gone.set)
    await connection.race(write_for_ever(connection), connection.gone())
    assert now() == 1.5
    await connection.say_last({"n": "bye"})
    assert peer.sent == [0, 1]


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_a_server_that_says_so_by_raising(kind: str) -> None:
    peer = Peer(kind)
    peer.error = ConnectionResetError()
    connection = peer.connect()
    with pytest.raises(ClientGone):
        await connection.race(write_for_ever(connection), connection.gone())
    await connection.say_last({"n": "bye"})
    await peer.gone.wait()


async def test_a_websocket_that_the_server_has_closed() -> None:
    peer = Peer("websocket")
    peer.error = RuntimeError("after close")
    with pytest.raises(ClientGone):
        await peer.connect().write({"n": 1})
    over_http = Peer()
    over_http.error = RuntimeError("a mistake")
    with pytest.raises(RuntimeError, match="a mistake"):
        await over_http.connect().write({"n": 1})


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError("no space left on device")])
async def test_what_a_runner_raises_is_not_lost(error: Exception) -> None:
    peer = Peer()
    connection = peer.connect()

    async def fail() -> None:
        await asyncio.sleep(1)
        raise error

    with pytest.raises(type(error), match=str(error)):
        await connection.race(fail(), connection.gone(), fail())
    assert peer.aborted == 0


async def test_closing_ends_the_race_and_leaves_time_for_last_words() -> None:
    peer = Peer()
    connection = peer.connect()
    asyncio.get_running_loop().call_later(1.5, connection.close, 0.5, "over")
    asyncio.get_running_loop().call_later(1.5, connection.close, 5.0, "later")
    await connection.race(write_for_ever(connection), connection.gone())
    assert connection.closing
    assert connection.reason == "over"
    assert now() == 1.5
    await connection.say_last({"n": "bye"}, {"n": "end"})
    assert peer.sent == [0, 1, "bye", "end"]


async def test_last_words_to_one_that_does_not_read() -> None:
    peer = Peer()
    peer.reads = False
    connection = peer.connect()
    connection.close(0.5, "over")
    await connection.race(connection.gone())
    await connection.say_last({"n": "bye"}, {"n": "end"})
    assert now() == 0.6
    assert peer.aborted == 1


async def test_last_words_to_one_that_is_gone() -> None:
    peer = Peer()
    peer.error = BrokenPipeError()
    await peer.connect().say_last({"n": "bye"})


def test_cancelled_anywhere_it_leaves_nothing_running() -> None:
    async def scenario() -> None:
        peer = Peer()
        connection = peer.connect()
        leaves = asyncio.get_running_loop().call_later(1.5, peer.gone.set)
        try:
            await connection.race(write_for_ever(connection), connection.gone())
            await connection.say_last({"n": "bye"})
        finally:
            leaves.cancel()

    assert cancel_at_every_await(scenario) > 0
