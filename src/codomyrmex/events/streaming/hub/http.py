"""Requests as an ASGI scope has them, answers, and the one exception that is an answer.

An endpoint raises `Refusal` wherever it finds a reason to; the hub turns it into a status with a
JSON body `{"error": reason}`, over HTTP and as the answer to a WebSocket handshake alike.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import parse_qsl, unquote_to_bytes

from ..codec import json

__all__ = [
    "NO_STORE",
    "ClientGone",
    "Headers",
    "Message",
    "Receive",
    "Refusal",
    "Request",
    "Scope",
    "Send",
]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

NO_STORE: Final = (b"cache-control", b"no-store")
_NO_SNIFF: Final = (b"x-content-type-options", b"nosniff")

# What a body may take to arrive in full, in seconds. A client that trickles one byte at a time
# would otherwise hold its connection for ever.
_BODY_TIMEOUT: Final = 30.0
_MAX_QUERY_FIELDS: Final = 1000


class ClientGone(Exception):
    """The client left: there is nobody to answer."""


class Refusal(Exception):
    """What was asked is not done; `status` and `reason` are the answer."""

    def __init__(self, status: HTTPStatus, reason: str, headers: Headers = ()) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason
        self.headers = tuple(headers)


def _ends_with_slash(raw_path: bytes) -> bool:
    # Without the query, which the specification leaves out and some servers do not.
    return raw_path.partition(b"?")[0].endswith((b"/", b"%2F", b"%2f"))


class Request:
    """One HTTP request or WebSocket handshake, and the answer to it.

    Args:
        scope, receive, send: what the server gave the application.

    Attributes:
        method: `"GET"` for a WebSocket handshake too, which is one.
        path: the path below where the hub is mounted, percent-decoded; it begins with a slash
            unless it is empty.
        answer_headers: what every answer to this request carries besides its own headers.
    """

    __slots__ = ("_query", "answer_headers", "method", "path", "receive", "scope", "send")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        self.method: str = scope.get("method", "GET")
        self.answer_headers: Headers = ()
        # The ASGI specification leaves the mount point in `path`; some frameworks cut it off.
        path: str = scope["path"]
        root: str = scope.get("root_path", "").rstrip("/")
        if root and (path == root or path.startswith(root + "/")):
            path = path[len(root) :]
        if path.endswith("/") and not _ends_with_slash(scope.get("raw_path") or b"/"):
            path = path[:-1]  # Litestar puts one behind every path below a mount
        self.path = path
        self._query: dict[str, list[str]] | None = None

    def check_path(self) -> None:
        """Refuse a path that is not UTF-8, which servers hand over with replacement characters.

        Raises:
            Refusal: 400.
        """
        if "\ufffd" in self.path:
            try:
                unquote_to_bytes(self.scope.get("raw_path") or b"").decode()
            except UnicodeDecodeError:
                raise Refusal(HTTPStatus.BAD_REQUEST, "the path is not UTF-8") from None

    def header(self, name: bytes) -> str | None:
        """Return the header `name` (in lower case); None when it is absent.

        Raises:
            Refusal: it is there more than once: which one counts is how requests are smuggled.
        """
        values = [value for key, value in self.scope["headers"] if key == name]
        if len(values) > 1:
            shown = name.decode("latin-1").title()
            raise Refusal(HTTPStatus.BAD_REQUEST, f"more than one {shown} header")
        return values[0].decode("latin-1") if values else None

    def values(self, name: str) -> list[str]:
        """Return every value of the query field `name`, in order.

        Raises:
            Refusal: the query string is not UTF-8, or has too many fields.
        """
        if self._query is None:
            query: dict[str, list[str]] = {}
            try:
                fields = parse_qsl(
                    self.scope["query_string"].decode("ascii"),
                    keep_blank_values=True,
                    errors="strict",
                    max_num_fields=_MAX_QUERY_FIELDS,
                )
            except UnicodeError:
                raise Refusal(HTTPStatus.BAD_REQUEST, "the query string is not UTF-8") from None
            except ValueError:
                raise Refusal(
                    HTTPStatus.BAD_REQUEST, f"more than {_MAX_QUERY_FIELDS} query fields"
                ) from None
            for key, value in fields:
                query.setdefault(key, []).append(value)
            self._query = query
        return self._query.get(name, [])

    def value(self, name: str) -> str | None:
        """Return the value of the query field `name`; None when it is absent.

        Raises:
            Refusal: it is there more than once.
        """
        values = self.values(name)
        if len(values) > 1:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"more than one {name!r} in the query")
        return values[0] if values else None

    async def body(self, max_bytes: int) -> bytes:
        """Return the request's body.

        Raises:
            Refusal: 413 when it is larger than `max_bytes`, said before it is read when the client
                said how large; 408 when it does not arrive in 30 s.
            ClientGone: the client left first.
        """
        too_large = Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {max_bytes} bytes"
        )
        length = self.header(b"content-length")
        if length is not None and length.isdecimal() and int(length) > max_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_TIMEOUT):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    body += message.get("body", b"")
                    if len(body) > max_bytes:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise Refusal(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the body took longer than {_BODY_TIMEOUT:.0f} s",
                [(b"connection", b"close")],
            ) from None

    async def answer(self, status: HTTPStatus, headers: Headers = (), body: bytes = b"") -> None:
        """Send a complete answer; to HEAD, its head alone."""
        all_headers = [*headers, *self.answer_headers, _NO_SNIFF]
        if status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
            all_headers.append((b"content-length", b"%d" % len(body)))
        await self.send(
            {"type": "http.response.start", "status": int(status), "headers": all_headers}
        )
        await self.send(
            {"type": "http.response.body", "body": b"" if self.method == "HEAD" else body}
        )

    async def answer_json(self, status: HTTPStatus, value: object, headers: Headers = ()) -> None:
        """Send `value` as a complete JSON answer that nothing may keep."""
        await self.answer(
            status,
            [(b"content-type", b"application/json"), NO_STORE, *headers],
            json.encode(value).encode() + b"\n",
        )
