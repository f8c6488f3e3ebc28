"""`serve`: a hub with the measurements of its machine, over HTTP, until it is told to stop."""

import asyncio
import errno
import ipaddress
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

import psutil
import uvicorn

from ..hub import Hub, everyone
from ..log import LATEST, Log, LogStream, open_log
from .host_metrics import HostMetrics
from .hub_server import HubServer

__all__ = ["serve"]

DEFAULT_LOG: Final = "sqlite:///events.db"
"""The log of `serve`: a file where it is started."""

_MAX_WEBSOCKET_MESSAGE: Final = 2 * 1024 * 1024
"""Above what a hub takes, so that the hub can say so before uvicorn ends the connection."""


def serve(
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    log: str = DEFAULT_LOG,
    allowed_hosts: Iterable[str] = (),
    allowed_origins: Iterable[str] = (),
    page: bool = True,
    metrics: bool = True,
    log_level: str = "warning",
    on_ready: Callable[[list[str]], None] | None = None,
) -> None:
    """Serve a hub, which everyone may use, over HTTP until SIGINT (Ctrl-C) or SIGTERM.

    Args:
        host: name or address to listen on.
        port: port to listen on; 0 takes a free one.
        log: URL of the log that keeps the events.
        allowed_hosts: names by which clients may call the hub, besides the loopback ones, `host`
            and, when that is every address of the machine, those addresses; see `Hub`.
        allowed_origins: origins besides its own whose pages may use the hub; see `Hub`.
        page: whether to serve the live page.
        metrics: whether to publish the measurements of this machine; see `HostMetrics`.
        log_level: what uvicorn logs: `"debug"`, `"info"` (each request), `"warning"`, `"error"`.
        on_ready: is called with the URLs of the hub once it takes requests.

    Raises:
        OSError: it cannot listen on `host` and `port`.
        LogUnusable: the log cannot be opened.
        ValueError: a log's URL, a host or an origin that cannot be one.
    """
    kept = open_log(log)
    sockets: list[socket.socket] = []
    try:
        asyncio.run(_try(kept))
        sockets += _listen(host, port)
        hub = Hub(
            kept,
            authorize=everyone,
            allowed_hosts=[*_own_names(host), *allowed_hosts],
            allowed_origins=allowed_origins,
            page=page,
        )
        # A stream of its own: it goes on while the hub ends what others read and publish.
        measured = LogStream(kept)
        producer = HostMetrics(measured) if metrics else None
        config = uvicorn.Config(
            hub,
            lifespan="off",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            access_log=log_level in ("debug", "info"),
            log_level=log_level,
            ws_max_size=_MAX_WEBSOCKET_MESSAGE,
        )

        async def start() -> None:
            if producer is not None:
                await producer.start()
            if on_ready is not None:
                on_ready([_url(listening) for listening in sockets])

        async def stop() -> None:
            if producer is not None:
                await producer.stop()
            await measured.aclose()

        server = HubServer(config, hub, start=start, stop=stop)
        # Ctrl-C is raised again by uvicorn once everything has ended.
        with (
            suppress(KeyboardInterrupt),
            asyncio.Runner(loop_factory=config.get_loop_factory()) as runner,
        ):
            runner.run(server.serve(sockets))
    finally:
        for listening in sockets:
            listening.close()
        asyncio.run(kept.close())


async def _try(log: Log) -> None:
    """Open a log, which opens itself when it is first used."""
    await log.read(LATEST)


def _listen(host: str, port: int) -> list[socket.socket]:
    """Listen on every address that `host` stands for.

    Raises:
        OSError: on one of them it is not possible, or the name is not known.
    """
    sockets: list[socket.socket] = []
    try:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except UnicodeError as error:  # what cannot even be asked for
            raise OSError(errno.EINVAL, "not a host name") from error
        for family, kind, protocol, _, address in dict.fromkeys(found):
            if port == 0 and sockets:  # the free port of the first address, for all of them
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            listening = socket.socket(family, kind, protocol)
            sockets.append(listening)
            if sys.platform != "win32":  # where it would let two servers share a port
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listening.bind(address)
            listening.listen(2048)
    except BaseException:
        for listening in sockets:
            listening.close()
        raise
    return sockets


def _own_names(host: str) -> list[str]:
    """Return what a client may call a hub that listens on `host`, besides loopback names."""
    if _is_every_address(host):
        names = [socket.gethostname()]
        for addresses in psutil.net_if_addrs().values():
            for address in addresses:
                if address.family == socket.AF_INET:
                    names.append(address.address)
                elif address.family == socket.AF_INET6:
                    names.append(_in_url(address.address.partition("%")[0]))
        return names
    return [_in_url(host)]


def _is_every_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://{_in_url(host)}:{port}"
