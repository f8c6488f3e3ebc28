"""Topics, patterns, and the index that finds who matches a topic.

A topic is 1 to 1024 bytes of UTF-8 without control characters. A string that is subscribed to is
a pattern when one of its dot-separated tokens is ``*`` (exactly one token) or its last token is
``>`` (one or more tokens, the rest); ``*`` alone is every event, those without a topic included;
any other string is that exact topic. `Exact` and `Pattern` say outright which is meant.

`TopicIndex` finds the subscribers of a topic in time that depends on the topic's length and on
how many match, not on how many there are; the answer for a topic is kept until a change could
alter it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, Generic, TypeAlias, TypeVar

from .errors import MissingExtra, TopicError, shown

__all__ = [
    "Exact",
    "Pattern",
    "Selection",
    "TopicFilter",
    "TopicIndex",
    "UrlPattern",
    "check_topic",
    "is_pattern",
    "matches",
    "topic_of",
]

MAX_TOPIC_BYTES = 1024
_MAX_URL_PATTERN_BYTES = 4096
_CACHED_TOPICS = 65_536

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Exact:
    """One topic, taken literally: `Exact("a.*")` is the topic whose second token is an asterisk."""

    topic: str


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern, as a string would be read: `Pattern("orders.*")`.

    A pattern without a wildcard matches the one topic it spells.
    """

    pattern: str


@dataclass(frozen=True, slots=True)
class UrlPattern:
    """Topics that are URLs, by a pattern of the WHATWG URL Pattern standard, in linear time.

    Attributes:
        pattern: such as ``https://example.com/books/:id``; ``*`` is every topic, also those that
            are no URLs.
        base: the URL against which a relative pattern, and a relative topic, is resolved.

    Raises:
        TopicError: it is no such pattern.
        MissingExtra: the package urlpattern is missing.
    """

    pattern: str
    base: str | None = None
    _compiled: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            from urlpattern import URLPattern  # noqa: PLC0415 - needs the extra
        except ModuleNotFoundError as error:
            raise MissingExtra("URL patterns", "tokens") from error
        _check_text(self.pattern, "pattern", _MAX_URL_PATTERN_BYTES)
        try:
            # Of `*` itself the standard would make the paths of one host.
            compiled = URLPattern("*://*" if self.pattern == "*" else self.pattern, self.base)
        except ValueError as error:
            raise TopicError(f"{shown(self.pattern)} is no URL pattern: {error}") from None
        object.__setattr__(self, "_compiled", compiled)

    def matches(self, topic: str) -> bool:
        """Whether a topic is meant; one that is no URL is not."""
        if self.pattern == "*":
            return True
        return bool(self._compiled.test(topic, self.base or None))


TopicFilter: TypeAlias = (
    str | Exact | Pattern | UrlPattern | Sequence[str | Exact | Pattern | UrlPattern]
)
"""What one can subscribe to: a topic, a pattern, or several of them (any may match)."""


def is_pattern(topic: str) -> bool:
    """Whether a string given to subscribe would be read as a pattern."""
    if "*" not in topic and ">" not in topic:
        return False
    tokens = topic.split(".")
    return "*" in tokens or tokens[-1] == ">"


def _check_text(topic: object, what: str, most: int = MAX_TOPIC_BYTES) -> str:
    if not isinstance(topic, str):
        raise TopicError(f"a {what} is a string, not {type(topic).__name__}: {shown(topic)}")
    if not topic:
        raise TopicError(f"a {what} has at least one character")
    # What is not printable and not a control character (some spaces, unassigned code points) is
    # allowed, so this quick answer is followed by the exact one.
    if not topic.isprintable() and any(
        character < " " or "\x7f" <= character <= "\x9f" for character in topic
    ):
        raise TopicError(f"a {what} has no control characters: {shown(topic)}")
    try:
        size = len(topic) if topic.isascii() else len(topic.encode())
    except UnicodeEncodeError:
        raise TopicError(
            f"a {what} is valid Unicode, without lone surrogates: {shown(topic)}"
        ) from None
    if size > most:
        raise TopicError(f"a {what} has at most {most} bytes of UTF-8; this one has {size}")
    return topic


def check_topic(topic: object) -> str:
    """The topic itself, if events can be published to it.

    Raises:
        TopicError: not a string, empty, over 1024 bytes, control characters, or a pattern.
    """
    text = _check_text(topic, "topic")
    if is_pattern(text):
        raise TopicError(f"events are published to a topic, not to a pattern: {shown(text)}")
    return text


def topic_of(topic: str | Exact) -> str:
    """A topic that events can be published to; also one that looks like a pattern, if it is exact.

    Raises:
        TopicError: it cannot be one.
    """
    if isinstance(topic, Exact):
        return _check_text(topic.topic, "topic")
    return check_topic(topic)


def _matches_tokens(pattern: Sequence[str], topic: Sequence[str]) -> bool:
    """Whether a pattern's tokens match a topic's. One pass: no token is looked at twice."""
    for index, token in enumerate(pattern):
        if token == ">" and index == len(pattern) - 1:
            return len(topic) > index
        if index == len(topic) or (token not in ("*", topic[index])):
            return False
    return len(pattern) == len(topic)


# A selector is what a TopicFilter means, in one of four forms: every event, one topic, the tokens
# of a pattern, or a pattern of URLs.
_EVERY = "every"
_Selector: TypeAlias = str | Exact | tuple[str, ...] | UrlPattern


def _selectors(topics: object) -> tuple[_Selector, ...]:
    """The selectors a TopicFilter stands for, checked.

    Raises:
        TopicError: one of them cannot be a topic or pattern, or there are none.
    """
    if isinstance(topics, Exact):
        _check_text(topics.topic, "topic")
        return (topics,)
    if isinstance(topics, UrlPattern):
        return (_EVERY,) if topics.pattern == "*" else (topics,)
    if isinstance(topics, Pattern):
        topics = topics.pattern
    if isinstance(topics, str):
        if topics == "*":
            return (_EVERY,)
        _check_text(topics, "topic or pattern")
        return (tuple(topics.split(".")),) if is_pattern(topics) else (Exact(topics),)
    if isinstance(topics, Iterable) and not isinstance(topics, bytes | bytearray):
        found = tuple(dict.fromkeys(s for topic in topics for s in _selectors(topic)))
        if found:
            return found
        raise TopicError("a subscription to several topics names at least one")
    raise TopicError(
        "a topic filter is a string, Exact, Pattern, UrlPattern or several of them,"
        f" not {shown(topics)}"
    )


def matches(topics: TopicFilter, topic: str | None) -> bool:
    """Whether an event with this topic is among what was subscribed to.

    None stands for an event without one. What else is not a string matches only ``*``.

    Raises:
        TopicError: `topics` cannot be a topic filter.
    """
    return Selection(topics).matches((topic,) if isinstance(topic, str) else ())


class Selection:
    """What a topic filter means, taken apart once by who will ask it often.

    Attributes:
        topics: the filter itself.
        every: whether everything matches, what has no topic included.
        exact: the topics that match literally.
        patterns: the tokens of the patterns.
        urls: the patterns of URLs.

    Raises:
        TopicError: `topics` cannot be a topic filter.
    """

    __slots__ = ("every", "exact", "patterns", "topics", "urls")

    def __init__(self, topics: TopicFilter) -> None:
        selectors = _selectors(topics)
        self.topics = topics
        self.every = _EVERY in selectors
        self.exact = tuple(each.topic for each in selectors if isinstance(each, Exact))
        self.patterns = tuple(each for each in selectors if isinstance(each, tuple))
        self.urls = tuple(each for each in selectors if isinstance(each, UrlPattern))

    @property
    def is_exact(self) -> bool:
        """Whether nothing but certain topics is selected."""
        return not (self.every or self.patterns or self.urls)

    def matches(self, topics: Sequence[str]) -> bool:
        """Whether something with these topics, of which there may be none, is selected."""
        if self.every:
            return True
        exact, patterns = self.exact, self.patterns
        for topic in topics:
            if topic in exact:
                return True
            if patterns:
                tokens = topic.split(".")
                if any(_matches_tokens(pattern, tokens) for pattern in patterns):
                    return True
            if self.urls and any(pattern.matches(topic) for pattern in self.urls):
                return True
        return False


class _Node(Generic[T]):
    """A place in the trie of patterns: what follows by token, and what ends here."""

    __slots__ = ("children", "ends", "rest")

    def __init__(self) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.ends: dict[str, tuple[int, T]] = {}
        self.rest: dict[str, tuple[int, T]] = {}  # patterns that end in ">" here

    def leads_anywhere(self) -> bool:
        return bool(self.children or self.rest)


class TopicIndex(Generic[T]):
    """Values under topic filters, found by topic, in the order in which they were added.

    Not thread-safe by itself: a caller holds its lock around every method. `answers` alone may be
    read without.

    Attributes:
        answers: what `match` has found so far, by topic. It is emptied when it gets large, but
            never replaced.
    """

    __slots__ = ("_every", "_exact", "_root", "_selectors", "_serial", "_urls", "answers")

    def __init__(self) -> None:
        self._selectors: dict[str, tuple[_Selector, ...]] = {}
        self._every: dict[str, tuple[int, T]] = {}
        self._exact: dict[str, dict[str, tuple[int, T]]] = {}
        self._root: _Node[T] = _Node()
        self._urls: dict[tuple[str, UrlPattern], tuple[int, T]] = {}
        self._serial = 0
        self.answers: dict[str | None, tuple[T, ...]] = {}

    def __len__(self) -> int:
        return len(self._selectors)

    def add(self, key: str, topics: TopicFilter, value: T) -> None:
        """Put a value under a filter; `key` names it for `discard`, and replaces what has it.

        Raises:
            TopicError: `topics` cannot be a topic filter.
        """
        selectors = _selectors(topics)
        self.discard(key)
        self._serial += 1
        entry = (self._serial, value)
        for selector in selectors:
            if selector == _EVERY:
                self._every[key] = entry
                self.answers.clear()
            elif isinstance(selector, Exact):
                entries = self._exact.setdefault(selector.topic, {})
                entries[key] = entry
                if len(entries) > 1 or self._every or self._has_patterns:
                    self.answers.pop(selector.topic, None)
                elif len(self.answers) < _CACHED_TOPICS and not is_pattern(selector.topic):
                    self.answers[selector.topic] = (value,)  # the usual case, known already
            else:
                if isinstance(selector, UrlPattern):
                    self._urls[key, selector] = entry
                else:
                    self._add_pattern(selector, key, entry)
                self.answers.clear()
        self._selectors[key] = selectors

    @property
    def _has_patterns(self) -> bool:
        return bool(self._urls) or self._root.leads_anywhere()

    def _add_pattern(self, tokens: Sequence[str], key: str, entry: tuple[int, T]) -> None:
        node = self._root
        last = len(tokens) - 1
        for index, token in enumerate(tokens):
            if token == ">" and index == last:
                node.rest[key] = entry
                return
            node = node.children.setdefault(token, _Node())
        node.ends[key] = entry

    def discard(self, key: str) -> bool:
        """Take a value out. False: there is none with this key."""
        selectors = self._selectors.pop(key, None)
        if selectors is None:
            return False
        for selector in selectors:
            if selector == _EVERY:
                del self._every[key]
                self.answers.clear()
            elif isinstance(selector, Exact):
                entries = self._exact[selector.topic]
                del entries[key]
                if not entries:
                    del self._exact[selector.topic]
                self.answers.pop(selector.topic, None)
            else:
                if isinstance(selector, UrlPattern):
                    del self._urls[key, selector]
                else:
                    self._discard_pattern(selector, key)
                self.answers.clear()
        return True

    def _discard_pattern(self, tokens: Sequence[str], key: str) -> None:
        path: list[tuple[_Node[T], str]] = []
        node = self._root
        last = len(tokens) - 1
        for index, token in enumerate(tokens):
            if token == ">" and index == last:
                del node.rest[key]
                break
            path.append((node, token))
            node = node.children[token]
        else:
            del node.ends[key]
        # Branches that lead nowhere go, so that patterns that come and go leave nothing.
        for parent, token in reversed(path):
            child = parent.children[token]
            if child.ends or child.leads_anywhere():
                break
            del parent.children[token]

    def has_exact(self, topic: str) -> bool:
        """Whether there is a value under exactly this topic, not under a pattern."""
        return topic in self._exact

    def match(self, topic: str | None) -> tuple[T, ...]:
        """The values whose filter matches a topic; None stands for an event without one.

        Raises:
            TopicError: events cannot be published to `topic`.
        """
        try:
            answer = self.answers.get(topic)
        except TypeError:
            answer = None
        if answer is None:
            answer = self._find(topic if topic is None else check_topic(topic))
        return answer

    def find(self, topic: str | None) -> tuple[T, ...]:
        """`match`, for a topic that has been checked, or may look like a pattern."""
        answer = self.answers.get(topic)
        return self._find(topic) if answer is None else answer

    def _find(self, topic: str | None) -> tuple[T, ...]:
        answer = self._match(topic)
        if len(self.answers) >= _CACHED_TOPICS:
            self.answers.clear()
        self.answers[topic] = answer
        return answer

    def _match(self, topic: str | None) -> tuple[T, ...]:
        if topic is None:
            return tuple(value for _, value in self._every.values())
        every, exact = self._every, self._exact.get(topic, {})
        if not (every and exact) and not self._has_patterns:  # the usual case: nothing to merge
            return tuple(value for _, value in (every or exact).values())
        found = {**every, **exact}
        self._match_patterns(topic.split("."), found)
        for (key, pattern), entry in self._urls.items():
            if key not in found and pattern.matches(topic):
                found[key] = entry
        return tuple(value for _, value in sorted(found.values(), key=itemgetter(0)))

    def _match_patterns(self, tokens: Sequence[str], found: dict[str, tuple[int, T]]) -> None:
        """Add the patterns that match. Every node of the trie is visited at most once."""
        nodes = [self._root]
        for token in tokens:
            following: list[_Node[T]] = []
            for node in nodes:
                if node.rest:
                    found.update(node.rest)
                children = node.children
                if (child := children.get(token)) is not None:
                    following.append(child)
                # A topic's own token may be "*" only inside another ("a.*b"): no double visit.
                if (child := children.get("*")) is not None:
                    following.append(child)
            if not following:
                return
            nodes = following
        for node in nodes:
            found.update(node.ends)
