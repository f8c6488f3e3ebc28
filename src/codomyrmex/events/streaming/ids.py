"""Time-ordered ids: UUID version 7 (RFC 9562, section 5.7).

An id is made in two steps, so that the second can wait until somebody reads it: drawing two
integers (a clock reading and a number from a sequence), and formatting them.

Layout of the 74 bits that RFC 9562 leaves to the implementation: the nanoseconds within the
millisecond (20 bits, section 6.2 method 3, unscaled), then 54 bits of a sequence that starts at
a random number. Ids of one process sort in the order they were drawn, as far as its clock does
not go back. Ids of two processes differ unless both drew the same nanosecond and the same
number out of 2**54. They are unique, not secret: do not use one as a password.
"""

import itertools
import secrets
import time
from collections.abc import Callable

__all__ = ["format_uuid7", "new_sequence", "uuid7"]

_SEQUENCE_BITS = 54
_SEQUENCE_MASK = (1 << _SEQUENCE_BITS) - 1
_VERSION = 7 << 76
_VARIANT = 2 << 62


def new_sequence() -> Callable[[], int]:
    """A function that returns the next number of a sequence with a random start.

    The start is in the lower half of the range, so that no process lives to see it wrap. Calls
    from several threads never return the same number. A child process needs a sequence of its
    own: see `os.register_at_fork`.
    """
    return itertools.count(secrets.randbits(_SEQUENCE_BITS - 1)).__next__


def format_uuid7(nanoseconds: int, sequence: int) -> str:
    """The UUIDv7 of a time since the epoch and a number from `new_sequence`.

    Args:
        nanoseconds: time since 1970-01-01T00:00Z in nanoseconds, as of `time.time_ns`.
        sequence: a number from a function that `new_sequence` returned.

    Returns:
        36 characters, lower case, with hyphens.
    """
    milliseconds, rest = divmod(nanoseconds, 1_000_000)
    bits = (
        (milliseconds & 0xFFFFFFFFFFFF) << 80
        | _VERSION
        | (rest >> 8) << 64
        | _VARIANT
        | (rest & 0xFF) << _SEQUENCE_BITS
        | (sequence & _SEQUENCE_MASK)
    )
    digits = f"{bits:032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def uuid7() -> str:
    """A new id of now, independent of any sequence."""
    return format_uuid7(time.time_ns(), secrets.randbits(_SEQUENCE_BITS))
