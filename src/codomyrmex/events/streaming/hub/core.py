"""What all endpoints of a hub have in common."""

from collections.abc import Mapping
from typing import NamedTuple

from ..log import Log
from .authorize import Gate
from .frames import Frames

__all__ = ["Core"]


class Core(NamedTuple):
    """What a hub serves, and its settings.

    Attributes:
        log: what is published to and read.
        gate: says who may do what.
        frames: makes frames of Server-Sent Events, by format.
        events: makes whole events, as JSON.
        keep_alive: after how many seconds without an event a subscriber is told so.
        max_event_bytes: the largest body of a request, or message of a WebSocket, that is taken.
        write_timeout: how long, in seconds, a client may take to read before it is cut off.
        reconnect_seconds: lower and upper bound of the reconnection time told to a reader.
    """

    log: Log
    gate: Gate
    frames: Mapping[str, Frames[bytes]]
    events: Frames[str]
    keep_alive: float
    max_event_bytes: int
    write_timeout: float
    reconnect_seconds: tuple[float, float]
