"""The hub as an ASGI application: what answers which path.

    GET  /                  the live page, and its files under /page/
    GET  /events?topic=…    events as they happen (Server-Sent Events)
    POST /events/{topic}    publish: the body is the event's data as JSON
    GET  /ws?topic=…        both over one WebSocket
    GET  /healthz           whether the hub takes requests

All paths are below where the application is mounted.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, contextmanager
from http import HTTPMethod, HTTPStatus
from typing import Final, NamedTuple
from urllib.parse import quote

from ..codec import json
from ..models import Event
from ..stream import SSEStream
from .assets import ASSETS, INDEX
from .connection import Connection
from .hosts import Hosts
from .http import (
    NO_STORE,
    ClientGone,
    Headers,
    Receive,
    Refusal,
    Request,
    Scope,
    Send,
)
from .publish import publish_body
from .subscribe import EventStream, subscribe
from .websocket import EventSocket

__all__ = ["Hub"]

_GET: Final = (HTTPMethod.GET, HTTPMethod.HEAD)
_POST: Final = (HTTPMethod.POST,)
_BUFFER_SIZE: Final = 2000
"""Events that a hub's own stream keeps for readers who come back."""


class _Route(NamedTuple):
    methods: tuple[HTTPMethod, ...]
    endpoint: Callable[[Request], Awaitable[None]]
    hint: str  # what to do instead of what is not done here


class Hub:
    """An ASGI application that publishes to one stream and streams it out.

    It needs no framework, and can be mounted in one. It ends its open answers when the server's
    lifespan ends and when `aclose` is called, whichever is first. A server that waits for open
    answers before it ends the lifespan, as uvicorn does, should have `aclose` called when it is
    told to stop.

    Args:
        stream: what is published to and read. The default is one of the hub's own, which keeps
            the last 2000 events and which `aclose` closes; one that is given stays open.
        allowed_hosts: names besides loopback ones by which clients may call the hub; see `Hosts`.
        allowed_origins: origins besides its own whose pages may use the hub; see `Hosts`.
        max_event_bytes: the largest body of a request, or message of a WebSocket, that is taken.
        write_timeout: how long, in seconds, a client may take to read before it is cut off.
        reconnect_seconds: when readers are told to come back after a cut: a random time between
            these two, so that they do not come all at once.
        page: whether to serve the live page.

    Raises:
        ValueError: a host or an origin that cannot be one.
    """

    def __init__(
        self,
        stream: SSEStream | None = None,
        *,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        max_event_bytes: int = 1024 * 1024,
        write_timeout: float = 10.0,
        reconnect_seconds: tuple[float, float] = (1.0, 3.0),
        page: bool = True,
    ) -> None:
        self._hosts = Hosts(allowed_hosts, allowed_origins)
        self._owns_stream = stream is None
        self._stream = SSEStream(buffer_size=_BUFFER_SIZE) if stream is None else stream
        self._max_event_bytes = max_event_bytes
        self._write_timeout = write_timeout
        self._reconnect_seconds = reconnect_seconds
        self._assets = ASSETS if page else {}
        self._connections: set[Connection] = set()
        self._idle: asyncio.Event | None = None
        self._closed = False

    @property
    def stream(self) -> SSEStream:
        """The stream that is published to and read."""
        return self._stream

    async def aclose(self, deadline: float = 0.5) -> None:
        """End every open answer, with a last word to those who read within `deadline` seconds.

        New requests are refused from now on. Safe to call again.
        """
        self._closed = True
        self._idle = self._idle or asyncio.Event()
        if self._connections:
            for connection in self._connections:
                connection.close(deadline)
            await self._idle.wait()
        if self._owns_stream:
            await self._stream.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, WebSocket or lifespan of an ASGI server."""
        if scope["type"] == "http":
            await self._http(Request(scope, receive, send))
        elif scope["type"] == "websocket":
            await self._websocket(Request(scope, receive, send))
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            raise NotImplementedError(f"ASGI scope {scope['type']!r}")

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, request: Request) -> None:
        try:
            request.check_path()
            if request.path != "/healthz":  # what probes it may call this machine by any name
                request.answer_headers = _cors(self._hosts.check(request))
            route = self._route(request)
            if request.method == HTTPMethod.OPTIONS:
                await _answer_options(request, route)
            elif request.method in route.methods:
                await route.endpoint(request)
            else:
                raise Refusal(
                    HTTPStatus.METHOD_NOT_ALLOWED,
                    f"{request.method} is not done here; {route.hint}",
                    [_allow(route)],
                )
        except ClientGone:
            pass
        except Refusal as refusal:
            await request.answer_json(refusal.status, {"error": refusal.reason}, refusal.headers)

    def _route(self, request: Request) -> _Route:
        path = request.path
        if path == "/events":
            return _Route(_GET, self._subscribe, "publish with POST /events/{topic}")
        if path.startswith("/events/"):
            return _Route(_POST, self._publish, "subscribe with GET /events?topic={topic}")
        if path == "/ws":
            return _Route(_GET[:1], self._no_websocket, "it is a WebSocket")
        if path == "/healthz":
            return _Route(_GET, self._health, "read it with GET")
        if self._page_file(path) is not None:
            return _Route(_GET, self._page, "read it with GET")
        raise Refusal(HTTPStatus.NOT_FOUND, f"nothing is at {path!r:.200}")

    async def _subscribe(self, request: Request) -> None:
        answer = EventStream(request, self._reconnect_seconds)
        with self._open(request) as connection:
            async with aclosing(await subscribe(self._stream, answer.wanted)) as events:
                await connection.race(answer.send(connection, events), connection.gone())
            if request.method != HTTPMethod.HEAD:
                await answer.send_end(connection, _reason(connection))

    async def _publish(self, request: Request) -> None:
        topic = request.path.removeprefix("/events/")
        published: Event | None = None

        async def publish() -> None:
            nonlocal published
            body = await request.body(self._max_event_bytes)
            published = await publish_body(self._stream, request, topic, body)

        with self._open(request) as connection:
            await connection.race(publish())
        if published is None:
            raise _closed()
        await request.answer_json(HTTPStatus.CREATED, {"id": published.id, "topic": topic})

    async def _health(self, request: Request) -> None:
        if self._closed:
            raise _closed()
        await request.answer_json(HTTPStatus.OK, {"status": "ok"})

    async def _no_websocket(self, request: Request) -> None:
        raise Refusal(
            HTTPStatus.UPGRADE_REQUIRED, "this is a WebSocket", [(b"upgrade", b"websocket")]
        )

    def _page_file(self, path: str) -> str | None:
        """Return the name of the page's file at `path`; None when there is none."""
        name = INDEX if path in ("", "/") else path.removeprefix("/page/")
        # The page is at one place only, from which its relative links are right.
        return name if name in self._assets and path not in (name, f"/page/{INDEX}") else None

    async def _page(self, request: Request) -> None:
        name = self._page_file(request.path)
        assert name is not None
        root = quote(request.scope.get("root_path", "").rstrip("/")).encode()
        # Not every framework tells where the hub is mounted; what the client asked for does.
        root = root or (request.scope.get("raw_path") or b"").rstrip(b"/")
        if not request.path and root:
            # Not "//…", which names another host.
            location = b"/" + root.lstrip(b"/") + b"/"
            await request.answer(HTTPStatus.PERMANENT_REDIRECT, [(b"location", location)])
            return
        asset = self._assets[name]
        if asset.is_current(request):
            await request.answer(HTTPStatus.NOT_MODIFIED, asset.headers())
        else:
            await request.answer(HTTPStatus.OK, asset.headers(), asset.body)

    async def _websocket(self, request: Request) -> None:
        await request.receive()  # websocket.connect
        try:
            request.check_path()
            self._hosts.check(request)
            if request.path != "/ws":
                raise Refusal(HTTPStatus.NOT_FOUND, f"no WebSocket is at {request.path!r:.200}")
            socket = EventSocket(request, self._stream, self._max_event_bytes)
            with self._open(request) as connection:
                async with aclosing(await subscribe(self._stream, socket.wanted)) as events:
                    await connection.race(
                        socket.send(connection, events), socket.answer_messages(connection)
                    )
                await socket.send_end(connection, _reason(connection))
        except ClientGone:
            pass
        except Refusal as refusal:
            await _refuse_handshake(request, refusal)

    @contextmanager
    def _open(self, request: Request) -> Iterator[Connection]:
        """Let `aclose` end what is done with this connection."""
        if self._closed:
            raise _closed()
        connection = Connection(request.scope, request.receive, request.send, self._write_timeout)
        self._connections.add(connection)
        try:
            yield connection
        finally:
            self._connections.discard(connection)
            if self._idle is not None and not self._connections:
                self._idle.set()


def _reason(connection: Connection) -> str:
    return "the hub is closing" if connection.closing else "the stream has ended"


def _closed() -> Refusal:
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the hub is closing", [(b"retry-after", b"1")])


def _allow(route: _Route) -> tuple[bytes, bytes]:
    return (b"allow", ", ".join((*route.methods, HTTPMethod.OPTIONS)).encode())


def _cors(origin: str | None) -> Headers:
    """Let a page of another origin, which is allowed, read the answer (the Fetch standard)."""
    if origin is None:
        return ()
    return [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin")]


async def _answer_options(request: Request, route: _Route) -> None:
    headers = [_allow(route)]
    if request.header(b"access-control-request-method") is not None:
        headers += [
            (b"access-control-allow-methods", ", ".join(route.methods).encode()),
            (b"access-control-allow-headers", b"content-type, last-event-id"),
            (b"access-control-max-age", b"600"),
        ]
    await request.answer(HTTPStatus.NO_CONTENT, headers)


async def _refuse_handshake(request: Request, refusal: Refusal) -> None:
    """Answer a WebSocket handshake with a status, and a reason where the server can carry one."""
    try:
        if "websocket.http.response" not in (request.scope.get("extensions") or {}):
            await request.send({"type": "websocket.close", "code": 1008, "reason": refusal.reason})
            return
        await request.send(
            {
                "type": "websocket.http.response.start",
                "status": int(refusal.status),
                "headers": [(b"content-type", b"application/json"), NO_STORE, *refusal.headers],
            }
        )
        body = json.encode({"error": refusal.reason}).encode() + b"\n"
        await request.send({"type": "websocket.http.response.body", "body": body})
    except OSError:
        pass
