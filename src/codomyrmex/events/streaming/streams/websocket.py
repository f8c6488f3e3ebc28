"""`WebSocketStream`: events to the WebSockets of an application, as JSON text."""

import asyncio
import inspect
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

from ..errors import StreamClosed
from ..forks import follow_forks
from ..ids import uuid7
from ..models import Event, Filter, Handler, Subscription, check_event
from ..subscribers import KeyedQueue, SubscriberQueue, check_overflow, topic_of
from ..topics import TopicFilter
from ..wakeups import Waiters, running_loop, wait_until, wake_all
from .base import Stream, StreamStatistics, StreamView
from .memory import InMemoryStream
from .runner import SerialRunner, is_cancellation

__all__ = ["WebSocketStream"]

_logger = logging.getLogger("codomyrmex.events.streaming")

# Close codes (RFC 6455, section 7.4): 1000 is a normal end; 4000-4999 are the application's.
_NORMAL = 1000
_REPLACED = 4409
_TOO_SLOW = 4408


@dataclass(slots=True, eq=False)
class _Message:
    """A text on its way to one client.

    Attributes:
        event: what the text says.
        sent: is told whether it was sent, if somebody waits for that.
    """

    event: Event
    text: str
    sent: "asyncio.Future[bool] | None" = None

    def settle(self, was_sent: bool) -> None:
        """Tell whoever waits whether it was sent. From any thread; only the first time counts."""
        sent = self.sent
        if sent is None:
            return
        loop = sent.get_loop()
        if loop is running_loop():
            _settle(sent, was_sent)
        else:
            with suppress(RuntimeError):  # it is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, sent, was_sent)


def _settle(sent: "asyncio.Future[bool]", was_sent: bool) -> None:
    if not sent.done():
        sent.set_result(was_sent)


class _ClientQueue(SubscriberQueue[_Message]):
    def _discard(self, item: _Message) -> None:
        item.settle(False)


class _KeyedClientQueue(KeyedQueue[_Message]):
    def _discard(self, item: _Message) -> None:
        item.settle(False)


class _Client:
    """One socket: the texts that wait for it, and the task that sends them."""

    def __init__(self, stream: "WebSocketStream", websocket: Any, client_id: str) -> None:
        self.id = uuid7()
        self.client_id = client_id
        self.websocket = websocket
        self.send = _send_function(websocket)
        self.queue: SubscriberQueue[_Message] = stream._make_queue(client_id)
        self.runner = SerialRunner(
            self._send_next, self.queue, self, self._failed, loop=asyncio.get_running_loop()
        )
        self._stream = stream
        self._closing: asyncio.Task[None] | None = None
        self._closed = False
        self._waiting_for_close: Waiters = []

    async def _send_next(self, message: _Message) -> None:
        try:
            while (loss := self.queue.due_loss(before_last=True)) is not None:
                await self._send(loss.to_json())
            await self._send(message.text)
        except BaseException:
            message.settle(False)
            raise
        message.settle(True)
        while (loss := self.queue.due_loss()) is not None:
            await self._send(loss.to_json())

    async def _send(self, text: str) -> None:
        async with asyncio.timeout(self._stream.send_timeout):
            await self.send(text)

    def _failed(self, message: _Message) -> None:
        self._stream._lost(self)

    def end(self) -> None:
        """Send nothing more; whoever waits for a message to be sent learns that it was not."""
        self.queue.end()
        waiting = self.queue.snapshot()
        self.runner.cancel()
        for message in waiting:
            message.settle(False)

    def close(self, code: int, reason: str) -> None:
        """Begin to close the socket, in the loop where it lives. From any thread."""
        loop = self.runner.loop
        assert loop is not None

        def begin() -> None:
            self._closing = loop.create_task(
                _close(self.websocket, code, reason, self._stream.send_timeout),
                name="codomyrmex-streaming close",
            )
            self._closing.add_done_callback(self._close_ended)

        if loop is running_loop():
            begin()
            return
        try:
            loop.call_soon_threadsafe(begin)
        except RuntimeError:  # it is closed, and so are its sockets
            self._stream._closing.discard(self)

    def _close_ended(self, task: "asyncio.Task[None]") -> None:
        self._closed = True
        self._stream._closing.discard(self)
        wake_all(self._waiting_for_close)

    async def wait_closed(self) -> None:
        """Wait until the socket is closed, or was given up."""
        while not self._has_closed():
            await wait_until(self._waiting_for_close, self._has_closed)

    def _has_closed(self) -> bool:
        return self._closed or self.runner.loop is None or self.runner.loop.is_closed()

    def give_up_closing(self) -> None:
        """Cut a socket off that is not closed yet."""
        if self._closing is not None and not self._has_closed():
            self._closing.get_loop().call_soon_threadsafe(self._closing.cancel)


class WebSocketStream:
    """Events to the WebSockets of an application, as JSON text, each client in its own time.

    Takes the sockets people have: websockets, Starlette and FastAPI, aiohttp, and any object with
    an async ``send(text)``. It sends; receiving, and noticing that a client has left, stay with
    the handler that accepted the socket. A client whose socket fails, or takes longer than
    `send_timeout` for one text, is closed (code 4408) and removed.

    Args:
        buffer_size: how many texts may wait for one client.
        overflow: what happens when they do: ``drop_oldest`` (the client gets a control event
            ``stream.lost``), ``drop_newest``, ``latest_by_key``, ``disconnect``, or ``block``:
            `broadcast` waits.
        send_timeout: seconds that one text may take to be sent, and a socket to be closed.
        key: for ``latest_by_key``: the key of an event, by default its topic.

    >>> stream = WebSocketStream()
    >>> async def endpoint(websocket):  # FastAPI
    ...     await websocket.accept()
    ...     connection = await stream.connect(websocket, client_id="ada")
    ...     try:
    ...         async for text in websocket.iter_text():
    ...             ...
    ...     finally:
    ...         await stream.disconnect(connection)
    """

    def __init__(
        self,
        *,
        buffer_size: int = 1000,
        overflow: str = "drop_oldest",
        send_timeout: float = 10.0,
        key: Callable[[Event], Hashable] | None = None,
    ) -> None:
        check_overflow(overflow)
        if key is not None and overflow != "latest_by_key":
            raise ValueError(f"a key is for overflow='latest_by_key', not for {overflow!r}")
        self.send_timeout = send_timeout
        self._buffer_size = buffer_size
        self._overflow = overflow
        self._key = key
        self._connections: dict[str, _Client] = {}
        self._by_connection: dict[str, _Client] = {}
        self._crowd: set[SubscriberQueue[_Message]] = set()
        self._observers = InMemoryStream(0)
        self._closed = False
        # Clients whose sockets are being closed: a task nobody refers to may vanish unfinished.
        self._closing: set[_Client] = set()
        self._published = 0
        self._refused = 0
        self._failed = 0
        self._dropped_before = 0
        follow_forks(self)

    def _after_fork(self) -> None:  # pragma: no cover - in the child, where nothing is measured
        # The sockets are the parent's: what a child wrote would come between its texts.
        self._connections = {}
        self._by_connection = {}
        self._crowd.clear()
        self._closing.clear()

    async def connect(self, websocket: Any, client_id: str) -> str:
        """Send every broadcast to this socket from now on.

        A socket that was connected with the same client id is replaced, and closed (code 4409).

        Returns:
            The id of this connection, for `disconnect`.

        Raises:
            StreamClosed: the stream has been closed.
            TypeError: the object has no way to send a text.
        """
        self._check_open()
        client = _Client(self, websocket, client_id)
        replaced = self._connections.get(client_id)
        if replaced is not None and replaced.websocket is websocket:
            self._remove(replaced)
        elif replaced is not None:
            self._end(replaced, _REPLACED, "replaced by a newer connection")
        self._connections[client_id] = client
        self._by_connection[client.id] = client
        return client.id

    async def disconnect(self, client_id: str) -> None:
        """Send nothing more to a client, and close its socket (code 1000).

        Waits until it is closed, or, after `send_timeout`, was cut off.

        Args:
            client_id: the client, or the id of a connection, which `connect` returned: that ends
                this very connection and not one that has replaced it. Unknown: nothing happens.
        """
        client = self._connections.get(client_id) or self._by_connection.get(client_id)
        if client is not None:
            self._end(client, _NORMAL, "")
            await client.wait_closed()

    async def broadcast(self, event: Event) -> None:
        """Send an event to every client. It waits for none, unless the policy is ``block``.

        Raises:
            EncodeError: the event has no JSON form; it is sent to nobody.
            TopicError: the topic in the event's metadata cannot be one; it is sent to nobody.
            StreamClosed: the stream has been closed.
        """
        check_event(event)
        text = event.to_json()
        self._check_open()
        # All waiting comes first, so that one who is cancelled while waiting has published nothing.
        while True:
            await self._observers._wait_for_room(event)
            if not self._crowd:
                break
            for queue in tuple(self._crowd):
                await queue.room()
        self._check_open()  # it may have been closed meanwhile
        self._observers._append(event)
        self._feed(event, text)
        # Senders get a turn now, so that publishing in a loop does not outrun quick clients.
        await asyncio.sleep(0)

    def publish_nowait(self, event: Event) -> bool:
        """`broadcast`, without ever waiting; from any thread.

        Returns:
            False: with the policy ``block``, a client is behind; the event was not sent to
            anybody, and is counted as refused.

        Raises:
            EncodeError: the event has no JSON form; it is sent to nobody.
            TopicError: the topic in the event's metadata cannot be one; it is sent to nobody.
            StreamClosed: the stream has been closed.
        """
        check_event(event)
        text = event.to_json()
        self._check_open()
        if self._crowd or not self._observers.publish_nowait(event):
            self._refused += 1
            return False
        self._feed(event, text)
        return True

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosed("the stream has been closed; it takes no more events or sockets")

    def _feed(self, event: Event, text: str) -> None:
        self._published += 1
        for client in tuple(self._connections.values()):
            client.runner.feed(_Message(event, text))
            if client.queue.ended:  # by the policy "disconnect"
                self._lost(client)

    async def send_to(self, client_id: str, event: Event) -> bool:
        """Send an event to one client, after all that waits for it, and wait until it is sent.

        Returns:
            Whether it was. False: there is no such client, or its socket failed.

        Raises:
            EncodeError: the event has no JSON form; the client is not affected.
        """
        client = self._connections.get(client_id)
        if client is None:
            return False
        sent: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        check_event(event)
        message = _Message(event, event.to_json(), sent)
        client.queue.force(message)
        client.runner.start()
        if client.queue.ended:  # another thread has just removed it
            message.settle(False)
        return await sent

    def _make_queue(self, name: str) -> SubscriberQueue[_Message]:
        if self._overflow == "latest_by_key":
            key = self._key or topic_of

            def key_of(message: _Message) -> Hashable:
                # What only this client is sent takes no place but its own.
                return key(message.event) if message.sent is None else message

            return _KeyedClientQueue(self._buffer_size, key=key_of, name=name)
        return _ClientQueue(
            self._buffer_size, check_overflow(self._overflow), name=name, crowd=self._crowd
        )

    def _lost(self, client: _Client) -> None:
        """A client's socket failed, or it was too slow."""
        if self._end(client, _TOO_SLOW, "too slow, or gone"):
            self._failed += 1
            _logger.info("WebSocket client %s is lost", client.client_id, exc_info=sys.exception())

    def _remove(self, client: _Client) -> bool:
        """Send nothing more to a client. False: it has been removed before."""
        if self._by_connection.pop(client.id, None) is None:
            return False
        del self._connections[client.client_id]
        self._dropped_before += client.queue.dropped
        client.end()
        return True

    def _end(self, client: _Client, code: int, reason: str) -> bool:
        """Remove a client and close its socket. False: that has been done before."""
        if not self._remove(client):
            return False
        self._closing.add(client)
        client.close(code, reason)
        return True

    def as_stream(self) -> Stream:
        """This as a `Stream`: publish is `broadcast`; handlers get what is broadcast."""
        return _AsStream(self)

    def statistics(self) -> StreamStatistics:
        """Counts since the stream was made, as of now. Queues are named by client."""
        clients = dict(self._connections)
        queues = {name: client.queue.statistics() for name, client in clients.items()}
        return StreamStatistics(
            published=self._published,
            refused=self._refused,
            dropped=self._dropped_before + sum(queue.dropped for queue in queues.values()),
            failed=self._failed + self._observers.statistics().failed,
            buffered=max((queue.size for queue in queues.values()), default=0),
            subscribers=len(clients),
            queues=queues,
        )

    async def aclose(self, *, drain: bool = True) -> None:
        """Send what waits, then close every socket (code 1000), within `send_timeout`.

        Args:
            drain: False: what waits is not sent.
        """
        self._closed = True
        clients = tuple(self._connections.values())
        try:
            if drain:
                await asyncio.gather(*(client.runner.drain() for client in clients))
            await self._observers.aclose(drain=drain)
        finally:
            for client in clients:
                self._end(client, _NORMAL, "")
            closing = tuple(self._closing)
            try:
                for client in closing:
                    await client.wait_closed()
            finally:  # cancelled once more: the rest is cut off
                for client in closing:
                    client.give_up_closing()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose(drain=kind is None)


def _send_function(websocket: Any) -> Callable[[str], Awaitable[Any]]:
    """The function of a socket that sends a text.

    Starlette's and aiohttp's ``send`` want something else, so their own names are looked for
    first.
    """
    for name in ("send_text", "send_str", "send"):
        function = getattr(websocket, name, None)
        if callable(function):
            return cast("Callable[[str], Awaitable[Any]]", function)
    raise TypeError(f"{type(websocket).__name__} has no async send(text), send_text or send_str")


async def _close(websocket: Any, code: int, reason: str, timeout: float) -> None:
    """Close a socket, if it can be closed. One that fails, or takes too long, is cut off."""
    close = getattr(websocket, "close", None)
    if close is None:
        return
    try:
        async with asyncio.timeout(timeout):
            result = close(**_close_options(close, code, reason))
            if inspect.isawaitable(result):
                await result
    except (Exception, asyncio.CancelledError) as error:
        _cut_off(websocket)
        if is_cancellation(error):
            raise
        _logger.debug("closing %r failed", websocket, exc_info=True)


def _cut_off(websocket: Any) -> None:
    """End the connection beneath a socket, where it can be reached.

    With Starlette it cannot: there the server's own pings find that nobody is there.
    """
    abort = getattr(getattr(websocket, "transport", None), "abort", None)  # websockets
    if callable(abort):
        abort()
        return
    get_extra_info = getattr(websocket, "get_extra_info", None)  # aiohttp
    connection: Any = get_extra_info("socket") if callable(get_extra_info) else None
    if connection is not None:
        # By a descriptor of our own, since the socket that a transport shows cannot do it itself
        # under every event loop.
        with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as twin:
            twin.shutdown(socket.SHUT_RDWR)


def _close_options(close: Callable[..., Any], code: int, reason: str) -> dict[str, Any]:
    """What a socket's own way to close takes of code and reason."""
    try:
        parameters = inspect.signature(close).parameters
    except (TypeError, ValueError):  # not written in Python
        return {}
    options: dict[str, Any] = {}
    if "code" in parameters:
        options["code"] = code
    if "reason" in parameters:
        options["reason"] = reason
    elif "message" in parameters:  # aiohttp
        options["message"] = reason.encode()
    return options


class _AsStream(StreamView):
    """A `WebSocketStream` behind the interface of a stream."""

    def __init__(self, stream: WebSocketStream) -> None:
        super().__init__(stream)
        self._stream = stream

    async def publish(self, event: Event) -> None:
        await self._stream.broadcast(event)

    def publish_nowait(self, event: Event) -> bool:
        return self._stream.publish_nowait(event)

    async def subscribe(
        self, handler: Handler, topic: TopicFilter = "*", filter_fn: Filter | None = None
    ) -> Subscription:
        return await self._stream._observers.subscribe(handler, topic, filter_fn)

    async def unsubscribe(self, subscription_id: str) -> bool:
        return await self._stream._observers.unsubscribe(subscription_id)

    async def finish(self, subscription_id: str) -> bool:
        return await self._stream._observers.finish(subscription_id)

    def statistics(self) -> StreamStatistics:
        return self._stream.statistics()

    async def aclose(self, *, drain: bool = True) -> None:
        await self._stream.aclose(drain=drain)
