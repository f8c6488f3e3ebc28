"""One streaming answer: writes that end in time, and an end that nothing can hold up.

A client that stops reading must cost a bounded time and no more; a client that leaves, and a hub
that closes, must end the answer at once. ASGI has no way to cut a connection whose client does not
read: a server that can do it offers it in the scope's extensions, as
`{"codomyrmex.abort": {"abort": callable}}` (`server/serve.py` does). Under other servers the answer
is left incomplete, and the server closes the connection in its own time.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from http import HTTPStatus
from typing import Any, Final

from .authorize import Visitor
from .feed import Feed
from .http import ClientGone, Message, Receive, Refusal, Scope, Send

__all__ = [
    "ABORT_EXTENSION",
    "POLICY_VIOLATION",
    "SERVICE_RESTART",
    "Connection",
    "SlowReader",
    "closing",
]

ABORT_EXTENSION: Final = "codomyrmex.abort"


# Close codes of RFC 6455's registry: to come back, and not to.
SERVICE_RESTART: Final = 1012
POLICY_VIOLATION: Final = 1008


def closing() -> Refusal:
    """The answer to what is asked of a hub that closes."""
    return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the hub is closing", [(b"retry-after", b"1")])


class SlowReader(Exception):
    """The client took no byte for the whole write timeout."""


class Connection:
    """A client that is being streamed to.

    Args:
        scope, receive, send: what the server gave the application.
        visitor: who the client is.
        write_timeout: how long, in seconds, one write may wait for the client to read.

    Attributes:
        visitor: who the client is.
        feeds: what it reads.
    """

    __slots__ = (
        "_abort",
        "_closing",
        "_code",
        "_has_begun",
        "_is_gone",
        "_loop",
        "_reason",
        "_receive",
        "_send",
        "_type",
        "_write_timeout",
        "feeds",
        "visitor",
    )

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, visitor: Visitor, write_timeout: float
    ) -> None:
        self.visitor = visitor
        self.feeds: set[Feed] = set()
        extension = (scope.get("extensions") or {}).get(ABORT_EXTENSION)
        self._abort: Callable[[], None] | None = extension["abort"] if extension else None
        self._loop = asyncio.get_running_loop()
        self._closing: asyncio.Future[None] = self._loop.create_future()
        self._reason = "the stream has ended"
        self._code = SERVICE_RESTART
        self._has_begun = False
        self._is_gone = False
        self._receive = receive
        self._send = send
        self._type: str = scope["type"]
        self._write_timeout = write_timeout

    @property
    def closing(self) -> bool:
        """Whether `close` has been called."""
        return self._closing.done()

    def check_begun(self) -> None:
        """See whether there is an answer that can be ended.

        Raises:
            Refusal: not yet; what to answer instead, as it closes.
            ClientGone: there is nobody to answer.
        """
        if self._is_gone:
            raise ClientGone
        if not self._has_begun:
            raise closing()

    @property
    def reason(self) -> str:
        """Why it ends."""
        for feed in self.feeds:
            if feed.refusal is not None:
                return feed.refusal.reason
        return self._reason

    @property
    def code(self) -> int:
        """The same as the close code of a WebSocket."""
        return self._code

    def close(self, deadline: float, reason: str, code: int = SERVICE_RESTART) -> None:
        """Let `race` end, and give the last words `deadline` seconds. From any thread."""
        self._loop.call_soon_threadsafe(self._close, deadline, reason, code)

    def _close(self, deadline: float, reason: str, code: int) -> None:
        if not self._closing.done():
            self._reason, self._code = reason, code
            self._write_timeout = min(self._write_timeout, deadline)
            self._closing.set_result(None)

    async def write(self, message: Message) -> None:
        """Send an ASGI message.

        Raises:
            SlowReader: the client read nothing for the write timeout.
            ClientGone: there is no client any more.
        """
        self._has_begun = True
        try:
            async with asyncio.timeout(self._write_timeout):
                await self._send(message)
        except TimeoutError:
            raise SlowReader from None
        except OSError as error:  # the ASGI specification, 2.4 and later
            self._is_gone = True
            raise ClientGone from error
        except RuntimeError as error:
            # What uvicorn raises once it has closed a WebSocket whose client does not answer pings.
            if self._type != "websocket":
                raise
            self._is_gone = True
            raise ClientGone from error

    async def receive(self) -> Message | None:
        """Return the next message that the client sent; None when it is gone."""
        message = await self._receive()
        if message["type"].endswith(".disconnect"):
            self._is_gone = True
            return None
        return message

    async def gone(self) -> None:
        """Wait until the client is gone."""
        while await self.receive() is not None:
            pass

    async def race(self, *runners: Coroutine[Any, Any, None]) -> None:
        """Run all of them until one ends or the connection closes, then end the others.

        What a runner raises is raised here.

        Raises:
            ClientGone: a write found that there is no client any more, or one that does not read,
                which is cut off.
        """
        tasks = [self._loop.create_task(runner) for runner in runners]
        try:
            await asyncio.wait([*tasks, self._closing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        errors = [error for task in tasks if not task.cancelled() and (error := task.exception())]
        for error in errors:
            if isinstance(error, SlowReader | ClientGone):
                await self._cut()
                raise ClientGone from error
            raise error

    async def say_last(self, *messages: Message) -> None:
        """Send the last words to a client that may be gone or not reading any more."""
        try:
            for message in messages:
                if self._is_gone:
                    return
                await self.write(message)
        except SlowReader:
            await self._cut()
        except ClientGone:
            pass

    async def _cut(self) -> None:
        """End the connection, with whatever the client has not read, where the server can."""
        if self._abort is None:
            return
        self._abort()
        if self._is_gone:
            return
        # To return before the server has noticed would be an incomplete answer in its eyes.
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self.gone()
