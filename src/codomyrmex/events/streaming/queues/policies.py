"""What a subscriber's queue may do when it is full, and what it counts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

__all__ = ["Overflow", "QueueStatistics", "check_overflow"]

Overflow: TypeAlias = Literal["block", "drop_oldest", "drop_newest", "latest_by_key", "disconnect"]
"""What happens when a subscriber is slower than its stream."""


def check_overflow(policy: str, allowed: Iterable[str] = get_args(Overflow)) -> Overflow:
    """The policy itself, if it is one of those allowed here.

    Raises:
        ValueError: it is not; names those that are.
    """
    allowed = tuple(allowed)
    if policy not in allowed:
        raise ValueError(f"overflow is one of {', '.join(allowed)} here, not {policy!r}")
    return cast("Overflow", policy)


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """What has passed through one subscriber's queue.

    Attributes:
        size: items in the queue now.
        maxsize: its bound; 0: none.
        overflow: its policy.
        received: items that were taken into the queue; those that took another's place are not
            among them.
        dropped: items lost to the policy.
        replaced: items that a newer one with the same key took the place of.
    """

    size: int
    maxsize: int
    overflow: str
    received: int
    dropped: int
    replaced: int
