"""Ten thousand subscriptions, of which each event finds its own: exact topics, and patterns.

Patterns are written in each contender's own syntax; every topic published matches two of them. Most
programs publish to the same topics again and again, which caches of results make use of; a line of
its own publishes to topics that never come back.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from random import Random
from typing import Any

import blinker
import pyee
from paho.mqtt.matcher import MQTTMatcher

from benchmarks.fanout import Handler, counting_handlers
from benchmarks.harness import Contender, Line, Run, at_least
from benchmarks.model import PlainEvent, now
from codomyrmex.events.streaming import Event, InMemoryStream

SUBSCRIPTIONS = 10_000
SITES = SUBSCRIPTIONS // 2
CACHED_RESULTS = 4096

EXACT = [f"site.{number}.temperature" for number in range(SUBSCRIPTIONS)]
PATTERNS = [
    pattern for site in range(SITES) for pattern in (f"site.{site}.*.temperature", f"site.{site}.>")
]


def every_exact_topic(_units: int) -> list[str]:
    return EXACT


def repeated_topics(_units: int) -> list[str]:
    return topics_of_rooms(2000)


def topics_that_never_come_back(units: int) -> list[str]:
    return topics_of_rooms(units)


def topics_of_rooms(number: int) -> list[str]:
    site = Random(2).randrange
    return [f"site.{site(SITES)}.room-{room}.temperature" for room in range(number)]


def events_for(run: Run, event_class: type, topics: Callable[[int], list[str]]) -> Iterator[Any]:
    moment = now()
    events = [
        event_class(id=topic, metadata={"topic": topic}, timestamp=moment)
        for topic in topics(run.units)
    ]
    return islice(cycle(events), run.units)


def dictionary_of_lists(run: Run) -> None:
    handlers, delivered = counting_handlers(SUBSCRIPTIONS)
    subscribed: dict[str, list[Handler]] = defaultdict(list)
    for topic, handler in zip(EXACT, handlers, strict=True):
        subscribed[topic].append(handler)
    events = events_for(run, PlainEvent, every_exact_topic)
    with run.timed():
        for event in events:
            for handler in subscribed.get(event.metadata["topic"], ()):
                handler(event)
    run.delivered = delivered()


def pyee_emitter(run: Run) -> None:
    handlers, delivered = counting_handlers(SUBSCRIPTIONS)
    emitter = pyee.EventEmitter()
    for topic, handler in zip(EXACT, handlers, strict=True):
        emitter.on(topic, handler)
    events = events_for(run, PlainEvent, every_exact_topic)
    with run.timed():
        for event in events:
            emitter.emit(event.metadata["topic"], event)
    run.delivered = delivered()


def blinker_namespace(run: Run) -> None:
    handlers, delivered = counting_handlers(SUBSCRIPTIONS)
    signals = blinker.Namespace()
    for topic, handler in zip(EXACT, handlers, strict=True):
        signals.signal(topic).connect(handler, weak=False)
    events = events_for(run, PlainEvent, every_exact_topic)
    with run.timed():
        for event in events:
            signals.signal(event.metadata["topic"]).send(event)
    run.delivered = delivered()


class TrieNode:
    __slots__ = ("any_token", "children", "here", "rest")

    def __init__(self) -> None:
        self.children: dict[str, TrieNode] = {}
        self.any_token: TrieNode | None = None
        self.here: list[Handler] = []
        self.rest: list[Handler] = []


class CachingTrie:
    """Patterns in a trie, and what it said about topics already seen."""

    def __init__(self) -> None:
        self._root = TrieNode()
        self._cache: dict[str, list[Handler]] = {}

    def subscribe(self, pattern: str, handler: Handler) -> None:
        self._cache.clear()
        node = self._root
        for token in pattern.split("."):
            if token == ">":
                node.rest.append(handler)
                return
            if token == "*":
                node.any_token = node.any_token or TrieNode()
                node = node.any_token
            else:
                node = node.children.setdefault(token, TrieNode())
        node.here.append(handler)

    def match(self, topic: str) -> list[Handler]:
        found = self._cache.get(topic)
        if found is None:
            if len(self._cache) >= CACHED_RESULTS:
                self._cache.clear()
            found = self._cache[topic] = self._walk(topic.split("."))
        return found

    def _walk(self, tokens: list[str]) -> list[Handler]:
        found: list[Handler] = []
        nodes = [self._root]
        for token in tokens:
            following = []
            for node in nodes:
                found += node.rest
                if token in node.children:
                    following.append(node.children[token])
                if node.any_token:
                    following.append(node.any_token)
            nodes = following
        for node in nodes:
            found += node.here
        return found


def caching_trie(topics: Callable[[int], list[str]]) -> Contender:
    def publish_to_patterns(run: Run) -> None:
        handlers, delivered = counting_handlers(SUBSCRIPTIONS)
        trie = CachingTrie()
        for pattern, handler in zip(PATTERNS, handlers, strict=True):
            trie.subscribe(pattern, handler)
        events = events_for(run, PlainEvent, topics)
        with run.timed():
            for event in events:
                for handler in trie.match(event.metadata["topic"]):
                    handler(event)
        run.delivered = delivered()

    return publish_to_patterns


def paho_matcher(topics: Callable[[int], list[str]]) -> Contender:
    def publish_to_patterns(run: Run) -> None:
        handlers, delivered = counting_handlers(SUBSCRIPTIONS)
        matcher = MQTTMatcher()
        for pattern, handler in zip(PATTERNS, handlers, strict=True):
            matcher[as_mqtt(pattern)] = handler
        events = events_for(
            run, PlainEvent, lambda units: [as_mqtt(topic) for topic in topics(units)]
        )
        with run.timed():
            for event in events:
                for handler in matcher.iter_match(event.metadata["topic"]):
                    handler(event)
        run.delivered = delivered()

    return publish_to_patterns


def as_mqtt(topic: str) -> str:
    return topic.replace(".", "/").replace("*", "+").replace(">", "#")


def ours(subscribed: list[str], topics: Callable[[int], list[str]]) -> Contender:
    async def publish_to_subscriptions(run: Run) -> None:
        handlers, delivered = counting_handlers(SUBSCRIPTIONS)
        stream = InMemoryStream()
        for topic, handler in zip(subscribed, handlers, strict=True):
            await stream.subscribe(handler, topic)
        events = events_for(run, Event, topics)
        with run.timed():
            for event in events:
                await stream.publish(event)
        run.delivered = delivered()

    return publish_to_subscriptions


LINES = [
    Line(
        name="topics",
        work=f"{SUBSCRIPTIONS:,} topics, exact",
        floor=("dictionary of lists", dictionary_of_lists),
        peers={"pyee": pyee_emitter, "blinker": blinker_namespace},
        ours=ours(EXACT, every_exact_topic),
        reach=(at_least(2.0, "peer"),),
    ),
    Line(
        name="patterns",
        work=f"{SUBSCRIPTIONS:,} patterns, topics come back",
        floor=("trie and a cache of results", caching_trie(repeated_topics)),
        peers={"paho matcher": paho_matcher(repeated_topics)},
        ours=ours(PATTERNS, repeated_topics),
        reach=(at_least(2.0, "peer"),),
        deliveries=2,
    ),
    Line(
        name="patterns-new",
        work=f"{SUBSCRIPTIONS:,} patterns, topics never come back",
        floor=("trie and a cache of results", caching_trie(topics_that_never_come_back)),
        peers={"paho matcher": paho_matcher(topics_that_never_come_back)},
        ours=ours(PATTERNS, topics_that_never_come_back),
        deliveries=2,
        units=20_000,
    ),
]
