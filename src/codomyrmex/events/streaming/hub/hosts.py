"""Who may talk to the hub, as a browser tells it: the `Host` and `Origin` headers.

Two attacks come from pages of other sites that a user has open. *DNS rebinding*: the page's name
is made to resolve to this machine, so that the browser counts the hub as the page's own site; its
requests carry that name as `Host`, which is why a name must be known here to be served.
*Cross-site requests*: the page posts to this hub, or opens a WebSocket, which no browser stops; its
requests carry the page's `Origin`, which must be the hub's own or an allowed one.

Programs that are no browsers send no `Origin` and are not affected.
"""

import re
from collections.abc import Iterable
from http import HTTPStatus
from ipaddress import ip_address
from typing import Final

from .http import Refusal, Request

__all__ = ["Hosts"]

_HOST: Final = re.compile(
    r"(?P<name>\[[0-9a-fA-F:.]{2,45}\]|[^\s:/?#@\[\]\\]{1,253})(?::(?P<port>[0-9]{1,5}))?"
)
_ORIGIN: Final = re.compile(r"(?P<scheme>https?)://(?P<host>[^/?#\\\s]+)", re.IGNORECASE)
_DEFAULT_PORTS: Final = {"http": 80, "ws": 80, "https": 443, "wss": 443}


class Hosts:
    """What the hub is called, and whose pages may use it.

    Args:
        allowed_hosts: names besides the loopback ones: `"hub.example.com"` (on any port),
            `"hub.example.com:8443"` (on that one), `"*.example.com"` (its subdomains) or `"*"`
            (any name at all: for a hub behind a proxy that checks them itself).
        allowed_origins: origins besides the hub's own, as browsers send them:
            `"https://app.example.com"`; `"*"` is every origin.

    Raises:
        ValueError: one of them cannot be a host or an origin.
    """

    def __init__(self, allowed_hosts: Iterable[str] = (), allowed_origins: Iterable[str] = ()):
        if isinstance(allowed_hosts, str) or isinstance(allowed_origins, str):
            raise TypeError("allowed_hosts and allowed_origins are collections of strings")
        self._any_host = False
        self._hosts: set[tuple[str, int | None]] = set()
        self._suffixes: set[tuple[str, int | None]] = set()
        for host in allowed_hosts:
            if host == "*":
                self._any_host = True
                continue
            split = _split_host(host.removeprefix("*."))
            if split is None:
                raise ValueError(f"not a host name or address: {host!r}")
            if host.startswith("*."):
                self._suffixes.add(("." + split[0], split[1]))
            else:
                self._hosts.add(split)
        self._any_origin = False
        self._origins: set[tuple[str, str, int]] = set()
        for origin in allowed_origins:
            if origin == "*":
                self._any_origin = True
                continue
            parsed = _split_origin(origin)
            if parsed is None:
                raise ValueError(f"not an origin such as https://app.example.com: {origin!r}")
            self._origins.add(parsed)

    def check(self, request: Request) -> str | None:
        """Refuse a request that a foreign page may have made.

        Returns:
            The foreign origin that is allowed to read the answer; None when the request comes
            from the hub's own page or from no page at all.

        Raises:
            Refusal: 400 without exactly one readable `Host`, 403 for one that is not served here
                or an `Origin` that is not allowed.
        """
        host = request.header(b"host")
        if host is None:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the request has no Host header")
        split = _split_host(host)
        if split is None:
            raise Refusal(HTTPStatus.BAD_REQUEST, "the Host header cannot be read")
        scheme: str = request.scope.get("scheme", "http")
        name, port = split[0], split[1] or _DEFAULT_PORTS.get(scheme, 80)
        if not self._serves(name, port):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                f"the host {host!r:.100} is not served here; allowed_hosts"
                " (on the command line: --allow-host) can add it",
            )
        origin = request.header(b"origin")
        if origin is None:
            return None
        parsed = _split_origin(origin)
        # A proxy that ends TLS leaves the scheme of the origin and of this request different: the
        # same name and port as the Host are the hub's own page.
        if parsed is not None and parsed[1] == name:
            own_port = split[1] or _DEFAULT_PORTS[parsed[0]]
            if parsed[2] == own_port:
                return None
        if self._any_origin or (parsed is not None and parsed in self._origins):
            return origin
        raise Refusal(
            HTTPStatus.FORBIDDEN,
            f"pages of the origin {origin!r:.100} may not use this hub; allowed_origins"
            " (on the command line: --allow-origin) can let them",
        )

    def _serves(self, name: str, port: int) -> bool:
        if self._any_host or (name, None) in self._hosts or (name, port) in self._hosts:
            return True
        if any(name.endswith(s) and p in (None, port) for s, p in self._suffixes):
            return True
        # On any port: a tunnel or a proxy on this machine listens on another one. A page of another
        # site cannot be called so, and one of another program here says so by its Origin.
        return _is_loopback(name)


def _split_host(host: str) -> tuple[str, int | None] | None:
    """Return name (in lower case, without brackets or a final dot) and port, or None."""
    match = _HOST.fullmatch(host)
    if match is None:
        return None
    port = match["port"]
    if port is not None and not 0 < int(port) < 65536:
        return None
    name = match["name"].strip("[]").lower().removesuffix(".")
    return (name, int(port) if port else None) if name else None


def _split_origin(origin: str) -> tuple[str, str, int] | None:
    """Return scheme, name and port, the default one where none is written; None for `null`."""
    match = _ORIGIN.fullmatch(origin)
    split = match and _split_host(match["host"])
    if not match or not split:
        return None
    scheme = match["scheme"].lower()
    return scheme, split[0], split[1] or _DEFAULT_PORTS[scheme]


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
