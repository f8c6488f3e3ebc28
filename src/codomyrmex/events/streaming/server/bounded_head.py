"""HTTP for uvicorn, with a bound on a request's head: its first line and its headers.

uvicorn waits for a head for ever and keeps whatever comes of it, so that one connection could take
all memory, and some hundreds that send nothing all of a process's descriptors. What follows a head
has its bounds in the hub: the size of a body, and the time that it may take to arrive.
"""

import asyncio
from http import HTTPStatus
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["BoundedHeadProtocol"]

_MAX_HEAD_BYTES: Final = 64 * 1024
_HEAD_TIMEOUT: Final = 30.0
"""Seconds in which a connection's first head, and each later one that has begun, must be there."""


class BoundedHeadProtocol(HttpToolsProtocol):
    """Closes a connection whose head is too large (431) or takes too long (408)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None  # set while a head is awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Await the first head."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Await no more."""
        self._head_arrived()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Await the head that has begun."""
        super().on_message_begin()
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        """Handle the request."""
        self._head_arrived()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes."""
        super().data_received(data)
        # Afterwards: with the last of a head comes as much of the body as a read returns.
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(_HEAD_TIMEOUT, self._head_is_late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        if self._head_bytes:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:  # a browser opens connections that it may never use
            self.transport.close()

    def _refuse(self, status: HTTPStatus) -> None:
        if self.transport.is_closing():
            return
        self._head_arrived()
        reason = f'{{"error":"{status.phrase}"}}\n'
        self.transport.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(reason)}\r\nconnection: close\r\n\r\n{reason}".encode()
        )
        self.transport.close()
