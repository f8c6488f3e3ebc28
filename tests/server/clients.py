"""Clients by hand: what libraries do for their users, such as reading, these do not."""

import json
import socket
from urllib.parse import urlsplit

PATIENCE = 10.0


def connect(url: str) -> socket.socket:
    """A connection that has room for little that is not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(PATIENCE)
    connection.connect((urlsplit(url).hostname, urlsplit(url).port))
    return connection


def open_sse(url: str, topic: str = "*") -> socket.socket:
    """A reader that has read the first frame."""
    connection = connect(url)
    request = f"GET /events?topic={topic} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n\r\n"
    connection.sendall(request.encode())
    read_until(connection, b"stream.connect")
    return connection


def open_websocket(url: str, topic: str = "*") -> socket.socket:
    """A WebSocket that has read its first message."""
    connection = connect(url)
    connection.sendall(
        f"GET /ws?topic={topic} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
    )
    read_until(connection, b"subscribed")
    return connection


def begin_post(url: str) -> socket.socket:
    """A request whose body the server waits for, and which gets no further."""
    connection = connect(url)
    connection.sendall(
        f"POST /events/t HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        "Content-Length: 100\r\nExpect: 100-continue\r\n\r\n".encode()
    )
    read_until(connection, b"100 Continue\r\n\r\n")
    connection.sendall(json.dumps("half").encode())
    return connection


def read_until(connection: socket.socket, text: bytes) -> bytes:
    received = b""
    while text not in received:
        chunk = connection.recv(4096)
        assert chunk, f"the connection ended after {received!r}"
        received += chunk
    return received


def read_to_the_end(connection: socket.socket) -> bytes:
    """Everything until the connection ends, however it ends."""
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received
