"""WebSocketStream with the sockets that people have, each over a real connection."""

import asyncio
import base64
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import uvicorn
import websockets
from aiohttp import web
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute

from codomyrmex.events.streaming import Event, WebSocketStream, create_event

pytestmark = pytest.mark.real_time

PATIENCE = 10.0  # seconds of real time for what must happen at once
KINDS = ["websockets", "starlette", "fastapi", "aiohttp", "only send"]

Serve = Callable[[WebSocketStream], Any]


class Server:
    """An application that connects each socket under the name in its path.

    Attributes:
        port: where it listens, on the loopback address.
        left: names whose handler has ended, in that order.
    """

    def __init__(self, stream: WebSocketStream) -> None:
        self.port = 0
        self.left: list[str] = []
        self._stream = stream

    async def handle(self, websocket: Any, name: str, read: Callable[[], Awaitable[Any]]) -> None:
        connection = await self._stream.connect(websocket, name)
        try:
            await read()
        finally:
            await self._stream.disconnect(connection)
            self.left.append(name)


class OnlySend:
    """An object that can do nothing but send a text."""

    def __init__(self, websocket: Any) -> None:
        self._websocket = websocket

    async def send(self, text: str) -> None:
        await self._websocket.send(text)


@asynccontextmanager
async def with_websockets(server: Server, kind: str) -> AsyncIterator[None]:
    async def handler(websocket: websockets.ServerConnection) -> None:
        async def read() -> None:
            with suppress(websockets.ConnectionClosed):
                async for _ in websocket:
                    pass

        assert websocket.request is not None
        name = websocket.request.path[1:]
        target = OnlySend(websocket) if kind == "only send" else websocket
        await server.handle(target, name, read)

    async with websockets.serve(handler, "127.0.0.1", 0, close_timeout=0.5) as serving:
        server.port = next(iter(serving.sockets)).getsockname()[1]
        yield


@asynccontextmanager
async def with_aiohttp(server: Server) -> AsyncIterator[None]:
    async def handler(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse(timeout=0.5)
        await websocket.prepare(request)

        async def read() -> None:
            async for _ in websocket:
                pass

        await server.handle(websocket, request.match_info["name"], read)
        return websocket

    application = web.Application()
    application.router.add_get("/{name}", handler)
    runner = web.AppRunner(application, shutdown_timeout=1.0)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    try:
        await web.SockSite(runner, listener).start()
        server.port = listener.getsockname()[1]
        yield
    finally:
        await runner.cleanup()


def starlette_app(server: Server) -> Starlette:
    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()

        async def read() -> None:
            async for _ in websocket.iter_text():
                pass

        await server.handle(websocket, websocket.path_params["name"], read)

    return Starlette(routes=[WebSocketRoute("/{name}", endpoint)])


def fastapi_app(server: Server) -> FastAPI:
    application = FastAPI()

    @application.websocket("/{name}")
    async def endpoint(websocket: WebSocket, name: str) -> None:
        await websocket.accept()

        async def read() -> None:
            with suppress(WebSocketDisconnect):
                while True:
                    await websocket.receive_text()

        await server.handle(websocket, name, read)

    return application


@asynccontextmanager
async def with_uvicorn(server: Server, application: Any) -> AsyncIterator[None]:
    """A server in a thread, with an event loop of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    server.port = listener.getsockname()[1]
    config = uvicorn.Config(application, log_level="critical", timeout_graceful_shutdown=1)
    serving = uvicorn.Server(config)
    thread = threading.Thread(target=serving.run, args=[[listener]])
    thread.start()
    try:
        yield
    finally:
        serving.should_exit = True
        await asyncio.to_thread(thread.join, PATIENCE)
        assert not thread.is_alive()


@asynccontextmanager
async def serving(kind: str, stream: WebSocketStream) -> AsyncIterator[Server]:
    server = Server(stream)
    async with asyncio.timeout(4 * PATIENCE):
        if kind == "starlette":
            context = with_uvicorn(server, starlette_app(server))
        elif kind == "fastapi":
            context = with_uvicorn(server, fastapi_app(server))
        elif kind == "aiohttp":
            context = with_aiohttp(server)
        else:
            context = with_websockets(server, kind)
        async with context:
            yield server


@asynccontextmanager
async def client(
    stream: WebSocketStream, server: Server, name: str
) -> AsyncIterator[websockets.ClientConnection]:
    """A client that is connected to the stream under its name."""
    before = stream._connections.get(name)
    async with websockets.connect(
        f"ws://127.0.0.1:{server.port}/{name}", max_size=None, close_timeout=0.5
    ) as connection:
        await until(lambda: stream._connections.get(name) not in (None, before))
        yield connection


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in another process, thread or socket."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - nothing here is told when it happens
            await asyncio.sleep(0.005)


async def read(connection: websockets.ClientConnection, count: int) -> list[Any]:
    async with asyncio.timeout(PATIENCE):
        texts = [await connection.recv() for _ in range(count)]
    assert all(isinstance(text, str) for text in texts)
    return [Event.from_json(text).data for text in texts]


async def closed(connection: websockets.ClientConnection) -> int | None:
    """Read on to the close, and return its code."""
    async with asyncio.timeout(PATIENCE):
        with suppress(websockets.ConnectionClosed):
            while True:
                await connection.recv()
    return connection.close_code


async def connect_and_never_read(server: Server, name: str) -> socket.socket:
    """A client that has shaken hands, and whose receive buffer is as small as can be."""
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.setblocking(False)
    await loop.sock_connect(connection, ("127.0.0.1", server.port))
    key = base64.b64encode(os.urandom(16)).decode()
    request = (
        f"GET /{name} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    await loop.sock_sendall(connection, request.encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += await loop.sock_recv(connection, 1)
    assert answer.startswith(b"HTTP/1.1 101")
    return connection


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    async def test_events_reach_every_client_in_order_as_json(self, kind: str) -> None:
        event = create_event({"text": "é ☃ \u2028"}, "order.created", topic="orders")
        async with (
            WebSocketStream() as stream,
            serving(kind, stream) as server,
            client(stream, server, "ada") as ada,
            client(stream, server, "bob") as bob,
        ):
            await stream.broadcast(event)
            text = await asyncio.wait_for(ada.recv(), PATIENCE)
            assert isinstance(text, str)
            assert Event.from_json(text) == event
            assert await read(bob, 1) == [event.data]
            for number in range(200):
                await stream.broadcast(create_event(number))
            assert await read(ada, 200) == await read(bob, 200) == list(range(200))
            assert await stream.send_to("bob", create_event("only bob")) is True
            assert await stream.send_to("nobody", create_event(1)) is False
            await stream.broadcast(create_event("last"))
            assert await read(bob, 2) == ["only bob", "last"]
            assert await read(ada, 1) == ["last"]
            await stream.aclose()

    async def test_one_that_has_gone_is_removed_and_the_others_go_on(self, kind: str) -> None:
        async with (
            WebSocketStream(send_timeout=5.0) as stream,
            serving(kind, stream) as server,
            client(stream, server, "alive") as alive,
        ):
            async with client(stream, server, "gone") as gone:
                gone.transport.abort()

            def is_removed() -> bool:
                stream.publish_nowait(create_event("anybody there?"))
                return "gone" not in stream._connections

            await until(is_removed)
            assert await stream.send_to("gone", create_event(1)) is False
            assert await stream.send_to("alive", create_event("still")) is True
            while await read(alive, 1) != ["still"]:
                pass
            await stream.aclose()

    async def test_one_that_stops_reading_is_disconnected_and_nobody_else_notices(
        self, kind: str
    ) -> None:
        big = "x" * 100_000
        async with (
            WebSocketStream(send_timeout=0.3) as stream,
            serving(kind, stream) as server,
            client(stream, server, "alive") as alive,
        ):
            stuck = await connect_and_never_read(server, "stuck")
            with stuck:
                await until(lambda: "stuck" in stream._connections)
                sent = 0
                async with asyncio.timeout(PATIENCE):
                    while "stuck" in stream._connections:
                        await stream.broadcast(create_event([sent, big]))
                        assert await read(alive, 1) == [[sent, big]]
                        sent += 1
                assert stream.statistics().failed == 1
                assert set(stream._connections) == {"alive"}
                if kind in ("websockets", "aiohttp"):  # whose transport can be reached
                    await until(lambda: "stuck" in server.left)
                assert await stream.send_to("alive", create_event("still")) is True
                assert await read(alive, 1) == ["still"]
                await stream.aclose()

    async def test_who_connects_again_replaces_and_closes_the_first(self, kind: str) -> None:
        async with (
            WebSocketStream() as stream,
            serving(kind, stream) as server,
            client(stream, server, "ada") as first,
            client(stream, server, "ada") as second,
        ):
            if kind == "only send":
                await first.close()
            else:
                assert await closed(first) == 4409
            # The first one's handler ends now, and disconnects its own connection only.
            await until(lambda: server.left == ["ada"])
            assert await stream.send_to("ada", create_event("you")) is True
            assert await read(second, 1) == ["you"]
            await stream.aclose()

    async def test_disconnect_and_aclose_close_the_sockets(self, kind: str) -> None:
        async with (
            WebSocketStream() as stream,
            serving(kind, stream) as server,
            client(stream, server, "ada") as ada,
            client(stream, server, "bob") as bob,
        ):
            await stream.disconnect("ada")
            await stream.broadcast(create_event("last"))
            await stream.aclose()
            assert await read(bob, 1) == ["last"]
            if kind != "only send":
                assert await closed(ada) == 1000
                assert await closed(bob) == 1000
                await until(lambda: sorted(server.left) == ["ada", "bob"])
