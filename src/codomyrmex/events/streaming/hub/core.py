"""What all endpoints of a hub have in common."""

from collections.abc import Mapping
from typing import NamedTuple

from ..log import Log
from .authorize import Gate
from .frames import Frames
from .limits import Limits, Meter

__all__ = ["Core"]


class Core(NamedTuple):
    """What a hub serves, and its settings.

    Attributes:
        log: what is published to and read.
        gate: says who may do what.
        frames: makes frames of Server-Sent Events, by format.
        events: makes whole events, as JSON.
        keep_alive: after how many seconds without an event a subscriber is told so.
        meter: counts what is under way, and knows the limits.
        reconnect_seconds: lower and upper bound of the reconnection time told to a reader.
    """

    log: Log
    gate: Gate
    frames: Mapping[str, Frames[bytes]]
    events: Frames[str]
    keep_alive: float
    meter: Meter
    reconnect_seconds: tuple[float, float]

    @property
    def limits(self) -> Limits:
        """What is taken at most."""
        return self.meter.limits
