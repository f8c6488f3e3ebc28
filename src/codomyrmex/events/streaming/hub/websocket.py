"""`GET /ws`: any number of subscriptions, and publishing, over one WebSocket.

One JSON object per message, both ways. Its first key says what it is; `ref`, which the client
chooses, says what it belongs to.

    client                                              server
    {"subscribe": {"topics": […], "after": …}, "ref"}   {"subscribed": {…}, "ref"}
    {"unsubscribe": {}, "ref"}                          {"unsubscribed": {…}, "ref"}
    {"publish": {"topic": …, "data": …}, "ref"}         {"published": id, "ref"}
    {"token": "…"}: another one, in time                {"renewed": when it expires}
    {"ping": …}                                         {"pong": …}
                                                        {"event": {…}, "ref"}
                                                        {"gap": {…}, "ref"}
                                                        {"error": reason, "status", "ref"}
                                                        {"bye": reason}: the hub closes; come back

Every message is answered, in order; an error ends nothing. `?topic=…` in the handshake's query is a
first subscription, without a `ref`.
"""

import asyncio
from http import HTTPStatus
from typing import Any, Final, NamedTuple, TypeAlias

from ..codec import json
from ..errors import DecodeError
from ..log import Record
from .connection import Connection
from .core import Core
from .feed import Feed, Wanted
from .frames import gap_of
from .http import Message, Refusal, Request
from .publish import draft_of, store
from .subscribe import wanted_by

__all__ = ["SUBPROTOCOL", "EventSocket"]

SUBPROTOCOL: Final = "codomyrmex.events.v1"

_KINDS: Final = ("subscribe", "unsubscribe", "publish", "token", "ping")
_PUBLISH_FIELDS: Final = frozenset({"topic", "data", "type", "id", "echo", "public"})
_SUBSCRIBE_FIELDS: Final = frozenset({"topics", "after", "last"})
_LONGEST_REF: Final = 64
_LONGEST_REASON: Final = 123
_MOST_OWN: Final = 1000
"""Events of the client's own that are remembered not to be sent back to it."""


Ref: TypeAlias = str | int | None
"""What a client calls one of its messages, and the subscription it makes."""


class _Subscription(NamedTuple):
    """What delivers the events of a subscription, and its topics."""

    task: "asyncio.Task[bool]"
    topics: list[str]


class EventSocket:
    """One WebSocket.

    Args:
        request: the handshake.
        core: what its client reads and publishes to.

    Raises:
        Refusal: 400 when the request cannot be understood.
    """

    def __init__(self, request: Request, core: Core) -> None:
        self._core = core
        offered = request.scope.get("subprotocols") or []
        if offered and SUBPROTOCOL not in offered:
            raise _wrong(f"the subprotocol here is {SUBPROTOCOL}")
        self._subprotocol = SUBPROTOCOL if offered else None
        self._request = request
        self._wanted = wanted_by(request, core.limits.topics) if request.values("topic") else None
        self._subscriptions: dict[Ref, _Subscription] = {}
        self._own: dict[str, None] = {}
        # ASGI does not say that several tasks may send at once.
        self._writing = asyncio.Lock()
        self._ended = asyncio.Event()
        self._error: BaseException | None = None

    async def run(self, connection: Connection) -> None:
        """Accept it; then do what the client says and tell it what is published, until it ends.

        Raises:
            Refusal: before it is accepted: 400 and 503, as of `Feed`.
            ClientGone: there is no client any more.
        """
        self._connection = connection
        try:
            await connection.race(self._talk(), self._wait_for_end())
        finally:
            await self._unsubscribe(*self._subscriptions)

    async def send_end(self) -> None:
        """Close the socket and say why."""
        connection = self._connection
        await connection.say_last(
            _text(bye=connection.reason),
            {
                "type": "websocket.close",
                "code": connection.code,
                "reason": _short(connection.reason),
            },
        )

    async def _wait_for_end(self) -> None:
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    async def _talk(self) -> None:
        """Accept it, and answer one message after the other until the client is gone."""
        feed = None if self._wanted is None else await self._begin(self._wanted)
        try:
            await self._write({"type": "websocket.accept", "subprotocol": self._subprotocol})
        except BaseException:
            if feed is not None:
                feed.close()
            raise
        if feed is not None:
            await self._subscribe(feed, None)
        while (message := await self._connection.receive()) is not None:
            ref: Ref = None
            try:
                value = self._decode(message)
                ref = _ref_of(value)
                await self._do(value, ref)
            except Refusal as refusal:
                await self._write(_refused(refusal, ref))

    def _decode(self, message: Message) -> dict[str, Any]:
        """The object that a message is.

        Raises:
            Refusal: it is none, or too large.
        """
        text = message.get("text")
        if text is None:
            raise _wrong("messages are text: one JSON object each")
        limit = self._core.limits.event_bytes
        if len(text) > limit or len(text.encode()) > limit:
            raise Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the message is larger than {limit} bytes"
            )
        try:
            value = json.decode(text)
        except DecodeError as error:
            raise _wrong(str(error)) from None
        if not isinstance(value, dict):
            raise _wrong('a message is an object with one key and "ref": {"publish": {…}}')
        return value

    async def _do(self, message: dict[str, Any], ref: Ref) -> None:
        """Do what a message says, and answer it.

        Raises:
            Refusal: it cannot be done.
        """
        kinds = message.keys() - {"ref"}
        if len(kinds) != 1:
            raise _wrong('a message is an object with one key and "ref": {"publish": {…}}')
        [kind] = kinds
        value = message[kind]
        if kind == "ping":
            await self._write(_text(pong=value, **_named(ref)))
        elif kind == "publish":
            id_ = await self._publish(_object(kind, value, _PUBLISH_FIELDS, "topic", "data"))
            await self._write(_text(published=id_, **_named(ref)))
        elif kind == "subscribe":
            wanted = self._wanted_by(_object(kind, value, _SUBSCRIBE_FIELDS, "topics"), ref)
            await self._subscribe(await self._begin(wanted), ref)
        elif kind == "token":
            await self._write(_text(renewed=await self._renew(value), **_named(ref)))
        elif kind == "unsubscribe":
            if ref not in self._subscriptions:
                raise Refusal(HTTPStatus.NOT_FOUND, "there is no subscription with this ref")
            topics = self._subscriptions[ref].topics
            await self._unsubscribe(ref)
            await self._write(_text(unsubscribed={"topics": topics}, **_named(ref)))
        else:
            raise _wrong(f"there is no {kind!r:.60}: it is one of {', '.join(_KINDS)}")

    # Publishing.

    async def _publish(self, fields: dict[str, Any]) -> str:
        topic, echo = fields.pop("topic"), fields.pop("echo", True)
        public = fields.pop("public", None)
        for name, given in (("topic", topic), *fields.items()):
            if name != "data" and not isinstance(given, str):
                raise _wrong(f"{name} is a string")
        if not isinstance(echo, bool):
            raise _wrong("echo is true or false")
        if public is not None and not isinstance(public, bool):
            raise _wrong("public is true or false")
        await self._core.gate.check(self._connection.visitor, "publish", topic)
        is_public = self._core.gate.is_public(topic) if public is None else public
        draft = draft_of(topic, fields, not is_public)
        meter = self._core.meter
        meter.published(meter.address_of(self._request), self._connection.visitor.subject, 1)
        with meter.publishing():
            if echo:
                [stored] = await store(self._core.log, [draft])
            else:
                stored = await self._store_own(draft)
        return stored.id

    async def _store_own(self, draft: Record) -> Record:
        """Store an event that need not come back here."""
        # Known before it is stored: it may arrive before the answer to that.
        names = [draft.id]
        self._own[draft.id] = None

        def renamed(id_: str) -> None:
            del self._own[names.pop()]  # that is another's event
            names.append(id_)
            self._own[id_] = None

        try:
            [stored] = await store(self._core.log, [draft], renamed)
        except BaseException:
            del self._own[names[0]]
            raise
        if len(self._own) > _MOST_OWN:
            del self._own[next(iter(self._own))]
        return stored

    async def _renew(self, text: Any) -> float:
        """Take another token in the place of the one that the client came with."""
        if not isinstance(text, str):
            raise _wrong("token is a string")
        connection, gate = self._connection, self._core.gate
        token = await gate.check_token(text)
        connection.renew(gate.renewed(connection.visitor, token))
        for feed in tuple(connection.feeds):
            await feed.renew(connection.visitor)
        return token.expires

    # Subscribing.

    def _wanted_by(self, fields: dict[str, Any], ref: Ref) -> Wanted:
        topics, after, last = fields["topics"], fields.get("after"), fields.get("last")
        if not isinstance(topics, list) or not all(isinstance(topic, str) for topic in topics):
            raise _wrong("topics is an array of strings")
        if after is not None and not isinstance(after, str):
            raise _wrong("after is a string")
        if last is not None and (not isinstance(last, int) or isinstance(last, bool)):
            raise _wrong("last is a whole number")
        most = self._core.limits.topics
        wanted = Wanted.checked(topics, after or None, last, most)
        if ref in self._subscriptions:
            raise Refusal(HTTPStatus.CONFLICT, "there is a subscription with this ref")
        there = sum(len(each.topics) for each in self._subscriptions.values())
        if there + len(topics) > most:
            raise _wrong(f"more than {most} topics on one WebSocket")
        return wanted

    async def _begin(self, wanted: Wanted) -> Feed:
        feed = Feed(self._core, self._connection.visitor, wanted)
        try:
            await feed.begin()
        except BaseException:
            feed.close()
            raise
        return feed

    async def _subscribe(self, feed: Feed, ref: Ref) -> None:
        """Tell the client what it subscribed to, and then every event."""
        told = feed.told()
        try:
            await self._write(_text(subscribed=told, **_named(ref)))
        except BaseException:
            feed.close()
            raise
        task = asyncio.get_running_loop().create_task(self._deliver(feed, ref))
        # Not in the task, which may be cancelled before it begins.
        task.add_done_callback(lambda _: self._forget(feed))
        task.add_done_callback(self._delivered)
        self._connection.feeds.add(feed)
        self._subscriptions[ref] = _Subscription(task, told["topics"])

    async def _deliver(self, feed: Feed, ref: Ref) -> bool:
        """Returns whether the others go on when this one is over."""
        named = _named(ref)
        end = f",{json.encode(named)[1:]}" if named else "}"
        while (batch := await feed.read()) is not None:
            if batch.gap is not None:
                await self._write(_text(gap=gap_of(batch.gap), **named))
            for record in batch:
                if record.id in self._own:
                    continue
                event = self._core.events.of(record)
                if event:
                    await self._write(_message(f'{{"event":{event}{end}'))
        if feed.refusal is not None:
            await self._write(_refused(feed.refusal, ref))
            del self._subscriptions[ref]
        return feed.refusal is not None

    def _forget(self, feed: Feed) -> None:
        feed.close()
        self._connection.feeds.discard(feed)

    def _delivered(self, task: "asyncio.Task[bool]") -> None:
        """A subscription is over: by the client's wish, with the log, or because it failed."""
        if task.cancelled():
            return
        error = task.exception()
        if error is not None or not task.result():
            self._error = self._error or error
            self._ended.set()

    async def _unsubscribe(self, *refs: Ref) -> None:
        tasks = [self._subscriptions.pop(ref).task for ref in refs]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _write(self, message: Message) -> None:
        async with self._writing:
            await self._connection.write(message)


def _object(kind: str, value: Any, fields: frozenset[str], *needed: str) -> dict[str, Any]:
    """What belongs to a message, with no field that it cannot have.

    Raises:
        Refusal: it is not that.
    """
    if not isinstance(value, dict) or not value.keys() >= set(needed):
        shown = ", ".join(f'"{name}": …' for name in needed)
        raise _wrong(f"{kind} takes an object: {{{shown}}}")
    if unknown := value.keys() - fields:
        raise _wrong(f"{kind} has no {min(unknown)!r:.60}")
    return value


def _short(reason: str) -> str:
    """As much of a reason as a close frame has room for (RFC 6455, 5.5)."""
    return reason.encode()[:_LONGEST_REASON].decode(errors="ignore")


def _refused(refusal: Refusal, ref: Ref) -> Message:
    return _text(error=refusal.reason, status=int(refusal.status), **_named(ref))


def _named(ref: Ref) -> dict[str, str | int]:
    return {} if ref is None else {"ref": ref}


def _wrong(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason)


def _ref_of(message: dict[str, Any]) -> Ref:
    """What a client calls its message.

    Raises:
        Refusal: it cannot be called that.
    """
    ref = message.get("ref")
    if ref is None:
        return None
    if not isinstance(ref, str | int) or isinstance(ref, bool) or len(str(ref)) > _LONGEST_REF:
        raise _wrong(f"ref is a string of up to {_LONGEST_REF} characters, or a whole number")
    return ref


def _text(**value: object) -> Message:
    return _message(json.encode(value))


def _message(text: str) -> Message:
    return {"type": "websocket.send", "text": text}
