"""uvicorn, with what it does not do by itself for an application that streams.

- Open streams are told to end before uvicorn waits for them, so that a stop takes less than two
  seconds whatever is connected.
- The application is given a way to cut a connection whose client does not read.
- A request's head has a bound in size and time.
- A WebSocket handshake that is refused with a reason is no error.
- No new connection is taken while the old ones end: an `EventSource` that is refused with a
  status gives up, one that cannot connect comes back.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..hub import Hub
from ..hub.connection import ABORT_EXTENSION
from ..hub.http import Receive, Scope, Send
from .bounded_head import BoundedHeadProtocol

__all__ = ["HubServer"]

_STREAMS_END: Final = 0.4
_CONNECTIONS_END: Final = 1.0
"""Seconds from a stop until streams had their last word, and until every connection is cut."""


async def _nothing() -> None:
    pass


class HubServer(uvicorn.Server):
    """Runs a hub, or an application that one is mounted in.

    >>> HubServer(uvicorn.Config(app, port=8000), hub).run()

    Args:
        config: of uvicorn; its `app` contains the hub, or is it.
        hub: whose streams are ended when the server stops.
        start: is called when connections are accepted.
        stop: is called when all of them have ended.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        hub: Hub,
        *,
        start: Callable[[], Awaitable[None]] = _nothing,
        stop: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        if not config.loaded:
            config.load()
        config.loaded_app = _WithAbort(config.loaded_app)
        if config.http_protocol_class is HttpToolsProtocol:
            config.http_protocol_class = BoundedHeadProtocol
        # Reached only if cutting the connections does not end their requests.
        config.timeout_graceful_shutdown = 2
        super().__init__(config)
        self._hub = hub
        self._start = start
        self._stop = stop

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until SIGINT (Ctrl-C) or SIGTERM."""
        with suppress(KeyboardInterrupt):  # raised again by uvicorn once everything has ended
            super().run(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        await super().startup(sockets)
        await self._start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections and end those that there are."""
        for server in self.servers:
            server.close()
        timer = asyncio.get_running_loop().call_later(_CONNECTIONS_END, self._cut_connections)
        await self._hub.aclose(_STREAMS_END)
        await super().shutdown(sockets)
        timer.cancel()
        await self._stop()

    def _cut_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class _WithAbort:
    """Gives an application a way to cut a connection, which ASGI does not have."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # uvicorn's `send` is a method of the object that holds the connection's transport.
        connection = getattr(send, "__self__", None)
        abort = getattr(getattr(connection, "transport", None), "abort", None)
        if abort is not None:
            extensions = scope.get("extensions") or {}
            scope["extensions"] = {**extensions, ABORT_EXTENSION: {"abort": abort}}
        await self._app(scope, receive, send)
        if scope["type"] == "websocket" and getattr(connection, "initial_response", None):
            # uvicorn takes an answer other than a handshake for a handshake that was forgotten,
            # and logs an error.
            connection.handshake_complete = True  # type: ignore[union-attr]
