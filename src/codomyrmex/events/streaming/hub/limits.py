"""How much of it a hub takes: connections, events, time and memory; and whose they are.

Whatever is over a limit is refused with a status and a reason, at once; what is under way goes on.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from .http import Refusal, Request

__all__ = ["Limits", "Meter"]

_MOST_BUCKETS: Final = 100_000
_LOOK_AT_MEMORY: Final = 1.0
"""Seconds between two looks at how much memory the process has."""

_STATM: Final = "/proc/self/statm"
_GROUP: Final = "/sys/fs/cgroup/memory.max"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a hub takes at most.

    Attributes:
        connections: readers and WebSockets together; None: four fifths of the descriptors that the
            process may have.
        per_address: of these, from one client's address.
        per_subject: of these, of one subject; None: any number.
        topics: to a reader, or to all of a WebSocket.
        event_bytes: of a request's body, or a WebSocket's message.
        publish_rate: events that a subject (somebody without a name: an address) may publish in a
            second, over time; 0: any number.
        publish_burst: events that it may publish at once.
        publishing: requests that may wait for the log at once.
        write_timeout: seconds that a client may take to read, before it is cut off.
        lifetime: seconds after which a reader has to come back, a random 80 to 100 % of it.
        memory: bytes of the process above which no more connections are taken; None: four fifths of
            what its control group may have, where it has a bound.

    Raises:
        ValueError: a limit that is not above 0.
    """

    connections: int | None = None
    per_address: int = 256
    per_subject: int | None = None
    topics: int = 100
    event_bytes: int = 1 << 20
    publish_rate: float = 1000.0
    publish_burst: int = 5000
    publishing: int = 1000
    write_timeout: float = 10.0
    lifetime: float = 3600.0
    memory: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            limit = getattr(self, name)
            if limit is not None and not limit > 0 and not (name == "publish_rate" and limit == 0):
                raise ValueError(f"the limit {name} is above 0, not {limit}")


class Meter:
    """Counts what is under way, and refuses what is over a limit.

    Args:
        limits: the limits.
        proxies: addresses or networks of proxies whose ``X-Forwarded-For`` is believed.
        clock: seconds.

    Raises:
        ValueError: a proxy that is no address or network.
    """

    def __init__(
        self,
        limits: Limits,
        proxies: Iterable[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._proxies: list[IPv4Network | IPv6Network] = [
            ip_network(each, strict=False) for each in proxies
        ]
        self._clock = clock
        self._most = limits.connections or _most_connections()
        self._most_memory = _most_memory() if limits.memory is None else limits.memory
        self._memory = 0
        self._looked = float("-inf")
        self._total = 0
        self._by_address: Counter[str] = Counter()
        self._by_subject: Counter[str] = Counter()
        self._publishing = 0
        # How many events each may publish now, and as of when.
        self._buckets: dict[str, tuple[float, float]] = {}

    def address_of(self, request: Request) -> str:
        """The client's address: behind proxies that are believed, the one they name.

        Of what they name, the last that is no such proxy itself counts: whatever is before it may
        have been made up by the client.
        """
        client = request.scope.get("client")
        address = client[0] if client else ""
        if not self._is_proxy(address):
            return address
        lines = [value for key, value in request.scope["headers"] if key == b"x-forwarded-for"]
        named = b",".join(lines).decode("latin-1").split(",")
        for each in reversed([name.strip() for name in named if name.strip()]):
            address = each
            if not self._is_proxy(each):
                break
        return address

    def _is_proxy(self, text: str) -> bool:
        if not self._proxies:
            return False
        try:
            address = ip_address(text)
        except ValueError:
            return False
        if isinstance(address, IPv6Address):  # as a socket for both kinds shows it
            address = address.ipv4_mapped or address
        return any(address in network for network in self._proxies)

    @contextmanager
    def connection(self, address: str, subject: str | None) -> Iterator[None]:
        """Count a connection for as long as the block runs.

        Raises:
            Refusal: 429 or 503: it is one too many.
        """
        limits = self.limits
        if self._total >= self._most:
            raise _later(HTTPStatus.SERVICE_UNAVAILABLE, "there are too many connections", 5)
        if self._by_address[address] >= limits.per_address:
            raise _later(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"more than {limits.per_address} connections from your address",
                5,
            )
        of_subject = self._by_subject[subject] if subject is not None else 0
        if limits.per_subject is not None and of_subject >= limits.per_subject:
            raise _later(
                HTTPStatus.TOO_MANY_REQUESTS, f"more than {limits.per_subject} of yours", 5
            )
        if self._is_short_of_memory():
            raise _later(HTTPStatus.SERVICE_UNAVAILABLE, "there is too little memory", 5)
        self._total += 1
        self._by_address[address] += 1
        if subject is not None:
            self._by_subject[subject] += 1
        try:
            yield
        finally:
            self._total -= 1
            _count_down(self._by_address, address)
            if subject is not None:
                _count_down(self._by_subject, subject)

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Count a request that publishes for as long as the block runs.

        Raises:
            Refusal: 503: it is one too many.
        """
        if self._publishing >= self.limits.publishing:
            raise _later(HTTPStatus.SERVICE_UNAVAILABLE, "too much is being published", 1)
        self._publishing += 1
        try:
            yield
        finally:
            self._publishing -= 1

    def published(self, address: str, subject: str | None, count: int) -> None:
        """Take events into account that are about to be published.

        Raises:
            Refusal: 429: they are too many for now.
        """
        rate, burst = self.limits.publish_rate, float(self.limits.publish_burst)
        if not rate:
            return
        who = f"address {address}" if subject is None else f"subject {subject}"
        now = self._clock()
        tokens, since = self._buckets.pop(who, (burst, now))
        tokens = min(burst, tokens + (now - since) * rate)
        if tokens < min(count, burst):
            self._buckets[who] = tokens, now
            wait = int((min(count, burst) - tokens) / rate) + 1
            raise _later(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"more than {rate:g} events in a second, or {burst:g} at once",
                wait,
            )
        if len(self._buckets) >= _MOST_BUCKETS:  # the one that has been quiet for longest
            del self._buckets[next(iter(self._buckets))]
        self._buckets[who] = tokens - count, now

    def _is_short_of_memory(self) -> bool:
        now = self._clock()
        if self._most_memory is not None and now - self._looked >= _LOOK_AT_MEMORY:
            self._looked = now
            self._memory = _memory()
        return self._most_memory is not None and self._memory > self._most_memory


def _count_down(counter: "Counter[str]", name: str) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]


def _most_connections() -> int:
    """Four fifths of the descriptors that this process may have."""
    if sys.platform == "win32":  # pragma: no cover - there is no such bound
        return 8192
    import resource  # noqa: PLC0415 - not on Windows

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(1, most * 4 // 5) if most != resource.RLIM_INFINITY else 1_000_000


def _read(path: str) -> bytes:
    """A file of the kernel's, which answers at once: nothing is read from a disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.pread(file, 100, 0)
    finally:
        os.close(file)


def _memory() -> int:
    """Bytes that this process has in memory; 0: not known."""
    try:
        return int(_read(_STATM).split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError, IndexError):  # not on Linux
        return 0


def _most_memory() -> int | None:
    """Four fifths of what this process may have; None: there is no bound."""
    try:
        return int(_read(_GROUP)) * 4 // 5
    except (OSError, ValueError):
        return None


def _later(status: HTTPStatus, reason: str, seconds: int) -> Refusal:
    return Refusal(status, reason, [(b"retry-after", b"%d" % seconds)])
