"""The hub as an ASGI application: what answers which path.

    GET  /                          the live page, and its files under /page/
    GET  /events?topic=…            events as they happen (Server-Sent Events)
    GET  /events/{topic}/history    those that the log retains, page by page
    POST /events/{topic}            publish: the body is the event's data as JSON
    GET  /ws                        all of it over one WebSocket
    POST /ticket                    a ticket for those that cannot send headers: `?ticket=`
    GET, POST  /.well-known/mercure the Mercure protocol
    GET  /healthz                   whether the hub takes requests

All paths are below where the application is mounted.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from http import HTTPMethod, HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias
from urllib.parse import quote

from ..codec import json
from ..log import Log, LogStream, Record
from ..models import Event, EventType
from ..topics import TopicFilter
from . import mercure
from .assets import ASSETS, INDEX
from .authorize import TICKET_SECONDS, Authorize, Gate, Identify, Visitor
from .connection import POLICY_VIOLATION, Connection, closing
from .core import Core
from .feed import Feed, Wanted
from .frames import Frames, data_frame, event_frame, event_json
from .history import history_of
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
from .limits import Limits, Meter
from .publish import publish_body
from .stopping import listen, listen_no_more
from .subscribe import EventStream, frames_for, wanted_by
from .websocket import EventSocket

if TYPE_CHECKING:
    from .tokens import Tokens

__all__ = ["Hub"]

_HISTORY: Final = "/history"
_STOPPING: Final = 5.0
"""Seconds for which nothing new begins after the server was told to stop, in case it does not."""

_LAST_WORDS: Final = 0.5
"""Seconds in which clients have to read why it ends."""

_Endpoint: TypeAlias = Callable[[Request], Awaitable[None]]


class _Route(NamedTuple):
    endpoints: Mapping[str, _Endpoint]  # by method
    hint: str  # what to do instead of what is not done here

    @property
    def methods(self) -> str:
        return ", ".join(self.endpoints)


def _reading(endpoint: _Endpoint) -> dict[str, _Endpoint]:
    return {HTTPMethod.GET: endpoint, HTTPMethod.HEAD: endpoint}


class Hub:
    """A log on the network: an ASGI application that takes events in and streams them out.

    It needs no framework, and can be mounted in one. It ends its open answers when the process gets
    SIGINT or SIGTERM, when the server's lifespan ends and when `aclose` is called, whichever is
    first.

    Args:
        log: what is published to and read: a log, or its URL, such as ``sqlite:///events.db``.
            The default keeps the last 10 000 events in memory. A log that is given stays open; one
            of a URL is opened when it is first used, and `aclose` closes it.
        authorize: says whether a subject may ``subscribe`` or ``publish`` to a topic: a function or
            async function of the subject (None: somebody without a name), the action and the
            topic. It is asked about private events, which those are that are not said to be
            public, and about publishing; what it says is good for 60 s. None: nobody may.
            `everyone`: everybody may do everything.
        tokens: the access tokens that are accepted (`hub.tokens.Tokens`), which say themselves what
            their bearers may do. With `authorize`, both have to allow it.
        identify: says who is behind a request: a function or async function of the ASGI scope that
            returns the subject's name, or None. None: nobody has a name.
        anonymous: whether those without a name may connect, to read public events and what
            `authorize` lets them; by default if there is an `authorize`, and
            neither `tokens` nor `identify` to give names.
        public: topics whose events are public unless one is published as private.
        allowed_hosts: names besides loopback ones by which clients may call the hub; see `Hosts`.
        allowed_origins: origins besides its own whose pages may use the hub; see `Hosts`.
        limits: how much of everything is taken; see `Limits`.
        proxies: addresses or networks of proxies in front of the hub, whose ``X-Forwarded-For`` is
            believed.
        keep_alive: after how many seconds without an event a comment is sent instead, so that what
            is between takes the connection for alive.
        reconnect_seconds: when readers are told to come back after a cut: a random time between
            these two, so that they do not come all at once.
        page: whether to serve the live page.

    Raises:
        ValueError: a log's URL, a host, an origin or a proxy that cannot be one.
        TopicError: `public` cannot be a topic filter.

    >>> hub = Hub("sqlite:///events.db")
    >>> async def main():
    ...     await hub.publish("orders.42", {"state": "paid"})
    ...     async with hub.subscribe("orders.*", last=10) as events:
    ...         async for event in events:
    ...             print(event.data)
    """

    def __init__(
        self,
        log: "Log | str" = "memory://",
        *,
        authorize: Authorize | None = None,
        tokens: "Tokens | None" = None,
        identify: Identify | None = None,
        anonymous: bool | None = None,
        public: TopicFilter = (),
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        limits: Limits | None = None,
        proxies: Iterable[str] = (),
        keep_alive: float = 30.0,
        reconnect_seconds: tuple[float, float] = (1.0, 3.0),
        page: bool = True,
    ) -> None:
        self._hosts = Hosts(allowed_hosts, allowed_origins)
        self._gate = Gate(authorize, tokens, identify, anonymous, public)
        self._stream = LogStream(log)
        self._core = Core(
            self._stream.log,
            self._gate,
            {"data": Frames(data_frame, b""), "event": Frames(event_frame, b"")},
            Frames(event_json, ""),
            keep_alive,
            Meter(limits or Limits(), proxies),
            reconnect_seconds,
        )
        self._assets = ASSETS if page else {}
        self._connections: set[Connection] = set()
        self._idle: asyncio.Event | None = None
        self._closed = False
        self._stops_until = 0.0

    @property
    def log(self) -> Log:
        """What is published to and read."""
        return self._core.log

    @property
    def stream(self) -> LogStream:
        """The log as a stream, with handlers, consumers and runs."""
        return self._stream

    async def publish(
        self,
        topic: str,
        data: Any = None,
        event_type: str = EventType.MESSAGE,
        *,
        id: str | None = None,  # noqa: A002 - the field's name
        public: bool | None = None,
        **metadata: Any,
    ) -> Event:
        """Publish an event; returns when the log has stored it.

        Args:
            topic: where to.
            data: any JSON value.
            event_type: the event's type.
            id: the event's id; None: one of its own. The same event published again under the same
                id is not stored again.
            public: whether whoever may connect may read it, or only who is authorized for the
                topic; None: as the hub's `public` says.
            metadata: what else is to be known of it.

        Raises:
            EventError: an id, type or metadata that an event cannot have.
            The errors of `LogStream.publish`.
        """
        event = Event(id, event_type, data, {**metadata, "topic": topic})
        is_public = self._gate.is_public(topic) if public is None else public
        await self._stream.publish(Record.of(event, private=not is_public))
        return event

    def subscribe(
        self, topic: TopicFilter = "*", *, after: str | None = None, last: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """The events of a topic, as an async context manager of an async iterator.

        Args:
            topic: a topic, a pattern, or several of them.
            after: begin after the event with this id, or at `EARLIEST`; None: with what is
                published from now on.
            last: begin with so many of the latest events instead.

        Raises:
            The errors of `LogStream.events`, as the block is entered.
        """
        return self._stream.events(topic, after=after, last=last)

    def revoke(self, subject: str) -> int:
        """End all that a subject reads over the network, and ask `authorize` anew about it.

        Its tokens that were made until now are refused.

        Returns:
            How many connections that were.
        """
        self._gate.revoke(subject)
        revoked = [each for each in self._connections if each.visitor.subject == subject]
        for connection in revoked:
            connection.close(1.0, "you are not authorized any more", POLICY_VIOLATION)
        return len(revoked)

    async def reauthorize(self) -> None:
        """Ask `authorize` anew about everyone, and end what they may not read any more."""
        self._gate.forget()
        feeds = [feed for each in self._connections for feed in each.feeds]
        await asyncio.gather(*(feed.recheck() for feed in feeds))

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Close the hub at the end of the block: the lifespan of an application it is mounted in.

        >>> app = FastAPI(lifespan=hub.lifespan)
        """
        try:
            yield
        finally:
            await self.aclose()

    async def aclose(self, deadline: float = _LAST_WORDS) -> None:
        """End every open answer, with a last word to those who read within `deadline` seconds.

        New requests are refused from now on. Safe to call again.
        """
        self._closed = True
        listen_no_more(self._server_stops)
        self._idle = self._idle or asyncio.Event()
        if self._connections:
            for connection in self._connections:
                connection.close(deadline, "the hub is closing")
            await self._idle.wait()
        await self._gate.aclose()
        await self._stream.aclose()

    def _server_stops(self) -> None:
        """The server is told to stop: let go of what would hold it up. In a signal's handler."""
        self._stops_until = time.monotonic() + _STOPPING
        for connection in tuple(self._connections):
            connection.close(_LAST_WORDS, "the server is stopping")

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
            elif (endpoint := route.endpoints.get(request.method)) is not None:
                await endpoint(request)
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
            return _Route(_reading(self._subscribe), "publish with POST /events/{topic}")
        if path.startswith("/events/"):
            reading = _reading(self._history) if path.endswith(_HISTORY) else {}
            return _Route(
                {**reading, HTTPMethod.POST: self._publish},
                "subscribe with GET /events?topic={topic}, or read GET /events/{topic}/history",
            )
        if path in (mercure.PATH, mercure.METADATA_PATH):
            return self._mercure_route(path)
        if path == "/ticket":
            return _Route({HTTPMethod.POST: self._ticket}, "get one with POST")
        if path == "/ws":
            return _Route({HTTPMethod.GET: self._no_websocket}, "it is a WebSocket")
        if path == "/healthz":
            return _Route(_reading(self._health), "read it with GET")
        if self._page_file(path) is not None:
            return _Route(_reading(self._page), "read it with GET")
        raise Refusal(HTTPStatus.NOT_FOUND, f"nothing is at {path!r:.200}")

    async def _subscribe(self, request: Request) -> None:
        visitor = await self._gate.admit(request)
        wanted = wanted_by(request, self._core.limits.topics)
        await self._stream_out(
            request,
            visitor,
            wanted,
            EventStream(request, self._core, frames_for(request, self._core)),
        )

    async def _stream_out(
        self, request: Request, visitor: Visitor, wanted: Wanted, answer: EventStream
    ) -> None:
        with self._counted(request, visitor), self._open(request, visitor) as connection:
            feed = Feed(self._core, visitor, wanted)
            connection.feeds.add(feed)
            connection.end_in_time(self._core.limits.lifetime)
            try:
                await connection.race(answer.send(connection, feed), connection.gone())
            finally:
                feed.close()
            connection.check_begun()
            if request.method != HTTPMethod.HEAD:
                await answer.send_end(connection)

    async def _publish(self, request: Request) -> None:
        topic = request.path.removeprefix("/events/")
        answer: dict[str, Any] | None = None
        visitor = await self._gate.admit(request)

        async def publish() -> None:
            nonlocal answer
            await self._gate.check(visitor, "publish", topic)
            body = await request.body(self._core.limits.event_bytes)
            answer = await publish_body(self._core, request, visitor, topic, body)

        with self._open(request, visitor) as connection:
            await connection.race(publish())
        if answer is None:
            raise closing()
        await request.answer_json(HTTPStatus.CREATED, answer)

    async def _history(self, request: Request) -> None:
        topic = request.path.removeprefix("/events/").removesuffix(_HISTORY)
        visitor = await self._gate.admit(request)
        body = await history_of(self._core, request, visitor, topic)
        await request.answer(
            HTTPStatus.OK, [(b"content-type", b"application/json"), NO_STORE], body
        )

    def _mercure_route(self, path: str) -> _Route:
        if path == mercure.METADATA_PATH:
            return _Route(_reading(self._mercure_metadata), "read it with GET")
        subscribing = {**_reading(self._mercure_subscribe), "QUERY": self._mercure_subscribe}
        endpoints = {**subscribing, HTTPMethod.POST: self._mercure_publish}
        return _Route(endpoints, "subscribe with GET, publish with POST")

    async def _mercure_subscribe(self, request: Request) -> None:
        with mercure.challenges(request):
            visitor = await self._gate.admit(request)
        wanted = await mercure.wanted_by(request, self._core.limits)
        answer = mercure.MercureStream(request, self._core, wanted)
        with mercure.challenges(request):
            await self._stream_out(request, visitor, wanted, answer)

    async def _mercure_publish(self, request: Request) -> None:
        answer: bytes | None = None
        with mercure.challenges(request):
            visitor = await self._gate.admit(request)

        async def publish() -> None:
            nonlocal answer
            answer = await mercure.publish(self._core, request, visitor)

        with self._open(request, visitor) as connection, mercure.challenges(request):
            await connection.race(publish())
        if answer is None:
            raise closing()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), NO_STORE]
        await request.answer(HTTPStatus.OK, headers, answer)

    async def _mercure_metadata(self, request: Request) -> None:
        await request.answer_json(HTTPStatus.OK, mercure.metadata(request, self._gate.tokens))

    async def _ticket(self, request: Request) -> None:
        if request.value("ticket") is not None:
            raise Refusal(HTTPStatus.FORBIDDEN, "a ticket is no reason for another")
        ticket = self._gate.make_ticket(await self._gate.admit(request))
        told = {"ticket": ticket, "expires_in": TICKET_SECONDS}
        await request.answer_json(HTTPStatus.CREATED, told)

    async def _health(self, request: Request) -> None:
        if self._closed:
            raise closing()
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
            visitor = await self._gate.admit(request)
            socket = EventSocket(request, self._core)
            with self._counted(request, visitor), self._open(request, visitor) as connection:
                connection.end_in_time(self._core.limits.lifetime)
                await socket.run(connection)
                connection.check_begun()
                await socket.send_end()
        except ClientGone:
            pass
        except Refusal as refusal:
            await _refuse_handshake(request, refusal)

    def _counted(self, request: Request, visitor: Visitor) -> AbstractContextManager[None]:
        """Count a connection that stays."""
        listen(self._server_stops)
        meter = self._core.meter
        return meter.connection(meter.address_of(request), visitor.subject)

    @contextmanager
    def _open(self, request: Request, visitor: Visitor) -> Iterator[Connection]:
        """Let `aclose` end what is done with this connection."""
        if self._closed or time.monotonic() < self._stops_until:
            raise closing()
        self._gate.check_valid(visitor)  # also after a body that took its time
        asgi = request.scope, request.receive, request.send
        connection = Connection(*asgi, visitor, self._core.limits.write_timeout)
        self._connections.add(connection)
        try:
            yield connection
        finally:
            connection.forget_time()
            self._connections.discard(connection)
            if self._idle is not None and not self._connections:
                self._idle.set()


def _allow(route: _Route) -> tuple[bytes, bytes]:
    return (b"allow", f"{route.methods}, {HTTPMethod.OPTIONS}".encode())


def _cors(origin: str | None) -> Headers:
    """Let a page of another origin, which is allowed, read the answer (the Fetch standard)."""
    if origin is None:
        return ()
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", b"link, mercure-last-event-id, www-authenticate"),
        (b"vary", b"origin"),
    ]


async def _answer_options(request: Request, route: _Route) -> None:
    headers = [_allow(route)]
    if request.header(b"access-control-request-method") is not None:
        headers += [
            (b"access-control-allow-methods", route.methods.encode()),
            (b"access-control-allow-headers", b"authorization, content-type, last-event-id"),
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
