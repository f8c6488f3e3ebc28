"""Which topics a token or a subscription of the Mercure protocol means."""

from collections.abc import Callable
from typing import Final

from ..topics import Pattern, Selection, UrlPattern

__all__ = ["MAX_PATTERN_BYTES", "Matcher", "matcher"]

MAX_PATTERN_BYTES: Final = 4096

Matcher = Callable[[str], bool]


def matcher(kind: str, pattern: str, base: str) -> Matcher:
    """What says whether a topic is meant.

    Args:
        kind: ``exact``; ``urlpattern``: a pattern of the WHATWG URL Pattern standard, matched in
            linear time; ``pattern``: one of this library, such as ``orders.*``.
        pattern: the topic or pattern. ``*`` is every topic, whatever the kind.
        base: the hub's URL, against which relative URL patterns and topics are resolved.

    Raises:
        ValueError: there is no such kind, or the pattern cannot be one (`TopicError`).
        MissingExtra: URL patterns need the package urlpattern.
    """
    if len(pattern.encode("utf-8", "surrogatepass")) > MAX_PATTERN_BYTES:
        raise ValueError(f"a pattern has up to {MAX_PATTERN_BYTES} bytes")
    if pattern == "*":
        return lambda _: True
    if kind == "exact":
        return pattern.__eq__
    if kind == "pattern":
        selection = Selection(Pattern(pattern))
        return lambda topic: selection.matches((topic,))
    if kind == "urlpattern":
        return UrlPattern(pattern, base).matches
    raise ValueError(f"there is no match type {kind!r:.60}")
