"""Topics and patterns: what is one, what matches, and the index against looking at everyone."""

import enum
import itertools
import re
import sys
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    rule,
    run_state_machine_as_test,
)

from codomyrmex.events.streaming import Exact, MissingExtra, Pattern, TopicError, UrlPattern
from codomyrmex.events.streaming.topics import (
    Selection,
    TopicIndex,
    check_topic,
    is_pattern,
    matches,
)

LIMIT = 1024  # bytes


class Place(enum.StrEnum):
    KITCHEN = "kitchen"
    ALL = "kitchen.*"


# A topic is few tokens of few letters, so that patterns and topics meet often.
TOKEN = st.sampled_from(["", "a", "b", "é", "a*", "*b", ">a", ">", " "])
TOPIC = (
    st.lists(TOKEN, min_size=1, max_size=4)
    .map(".".join)
    .filter(lambda text: text and not is_pattern(text))
)
FILTER_TEXT = st.lists(TOKEN | st.sampled_from(["*", "*", ">"]), min_size=1, max_size=4).map(
    ".".join
)
ONE_FILTER = (
    FILTER_TEXT.filter(bool)
    | FILTER_TEXT.filter(bool).map(Exact)
    | FILTER_TEXT.filter(bool).map(Pattern)
)
FILTER: st.SearchStrategy[Any] = ONE_FILTER | st.lists(ONE_FILTER, min_size=1, max_size=3)


def naive(topics: Any, topic: str | None) -> bool:
    """What the documentation says, as a regular expression."""
    match topics:
        case list():
            return any(naive(each, topic) for each in topics)
        case Exact(text):
            return text == topic
        case Pattern(text) | str(text):
            if text == "*":
                return True
            if topic is None:
                return False
            *tokens, last = text.split(".")
            if "*" not in tokens and last not in ("*", ">"):
                return text == topic
            parts = ["[^.]*" if token == "*" else re.escape(token) for token in tokens]
            parts.append({"*": "[^.]*", ">": ".*"}.get(last, re.escape(last)))
            return re.fullmatch(r"\.".join(parts), topic, re.DOTALL) is not None
    raise AssertionError(topics)


class TestWhatATopicIs:
    @pytest.mark.parametrize(
        "topic",
        [
            "a",
            "orders.new",
            " ",
            ".",
            "..",
            "a.",
            ".a",
            "a*",
            "*a",
            "a.b*.c",
            ">a",
            "a.>.b",
            ">.a",
            "é",
            "\u2028",  # a line separator, not a control character
            "\xa0",
            "\ue000",
            "a" * LIMIT,
            "é" * (LIMIT // 2),
            "😀" * (LIMIT // 4),
            Place.KITCHEN,
        ],
    )
    def test_one_that_can_be_published_to(self, topic: str) -> None:
        assert check_topic(topic) == topic
        assert matches(topic, topic)
        assert matches("*", topic)

    @pytest.mark.parametrize(
        ("topic", "says"),
        [
            ("", "at least one character"),
            ("a\nb", "control"),
            ("a\r", "control"),
            ("\0", "control"),
            ("\x1f", "control"),
            ("\x7f", "control"),
            ("\x80", "control"),
            ("\x9f", "control"),
            ("a" * (LIMIT + 1), "1025"),
            ("é" * (LIMIT // 2) + "a", "1025"),
            ("\ud800", "surrogate"),
            (5, "a string, not int"),
            (None, "a string, not NoneType"),
            (b"a", "a string, not bytes"),
            (["a"], "a string, not list"),
        ],
    )
    def test_one_that_cannot(self, topic: Any, says: str) -> None:
        with pytest.raises(TopicError, match=says):
            check_topic(topic)
        index = TopicIndex[int]()
        if topic is not None:  # which stands for no topic
            with pytest.raises(TopicError, match=says):
                index.match(topic)
        with pytest.raises(TopicError):
            index.add("key", Exact(topic), 1)  # pyright: ignore[reportArgumentType]
        assert len(index) == 0

    def test_what_is_just_not_a_control_character_can_be_part_of_one(self) -> None:
        assert check_topic(" ~\xa0") == " ~\xa0"

    @pytest.mark.parametrize("pattern", ["*", ">", "a.*", "*.a", "a.*.b", "a.>", Place.ALL])
    def test_a_pattern_is_not_published_to(self, pattern: str) -> None:
        with pytest.raises(TopicError, match="not to a pattern"):
            check_topic(pattern)
        # Not even when somebody asks for it literally.
        index = TopicIndex[int]()
        index.add("key", Exact(pattern), 1)
        with pytest.raises(TopicError, match="not to a pattern"):
            index.match(pattern)


class TestWhatAPatternIs:
    @pytest.mark.parametrize("text", ["*", ">", "a.*", "*.a", "a.*.b", "a.>", ".*", "*."])
    def test_one_is(self, text: str) -> None:
        assert is_pattern(text)

    @pytest.mark.parametrize("text", ["", "a", "a*", "**", "a.b*", ">>", "a>", "a.>.b", ">.a"])
    def test_one_is_not(self, text: str) -> None:
        assert not is_pattern(text)

    @pytest.mark.parametrize(
        "topics",
        [
            None,
            5,
            b"a",
            bytearray(b"a"),
            "",
            [],
            (),
            [""],
            ["a", None],
            [[]],
            Pattern(""),
            Pattern("a\n"),
            Pattern(5),  # type: ignore[arg-type]
            Exact(""),
            "a" * 1025,
            object(),
        ],
    )
    def test_what_cannot_be_subscribed_to(self, topics: Any) -> None:
        with pytest.raises(TopicError):
            matches(topics, "a")
        index = TopicIndex[int]()
        with pytest.raises(TopicError):
            index.add("key", topics, 1)
        assert len(index) == 0
        assert index.match("a") == ()


class TestWhatMatches:
    @pytest.mark.parametrize(
        ("topics", "topic", "expected"),
        [
            ("*", "a", True),
            ("*", "a.b.c", True),
            ("*", None, True),
            (Pattern("*"), None, True),
            (Exact("*"), "a", False),
            (">", "a", True),
            (">", "a.b", True),
            (">", None, False),
            ("a.*", "a.b", True),
            ("a.*", "a", False),
            ("a.*", "a.b.c", False),
            ("a.*", "a.", True),
            ("*.b", "a.b", True),
            ("*.b", "b", False),
            ("a.*.c", "a.b.c", True),
            ("a.*.c", "a.b.d", False),
            ("a.>", "a.b", True),
            ("a.>", "a.b.c", True),
            ("a.>", "a", False),
            ("a.>.c", "a.b.c", False),
            ("a.>.c", "a.>.c", True),
            ("*.>.c", "a.>.c", True),
            ("*.>.c", "a.b.c", False),
            ("*.*", "a.b", True),
            ("*.*", "a", False),
            ("a", "a", True),
            ("a", "b", False),
            ("a", None, False),
            (Exact("a.*"), "a.b", False),
            (Pattern("a.b"), "a.b", True),
            (["a", "b.*"], "b.c", True),
            (["a", "b.*"], "a", True),
            (["a", "b.*"], "c", False),
            (["a", "*"], None, True),
            ({"a", "b"}, "b", True),
            (Place.KITCHEN, "kitchen", True),
            (Place.ALL, "kitchen.oven", True),
            ("a.*", 5, False),
            ("a", 5, False),
            ("*", 5, True),
        ],
    )
    def test_an_example(self, topics: Any, topic: Any, expected: bool) -> None:
        assert matches(topics, topic) is expected

    @given(FILTER, TOPIC | st.none())
    def test_it_is_what_the_documentation_says(self, topics: Any, topic: str | None) -> None:
        assert matches(topics, topic) == naive(topics, topic)

    @given(FILTER, TOPIC | st.none())
    def test_the_index_finds_the_same(self, topics: Any, topic: str | None) -> None:
        index = TopicIndex[int]()
        index.add("key", topics, 1)
        assert index.match(topic) == ((1,) if naive(topics, topic) else ())

    def test_a_long_pattern_takes_no_longer_than_its_length(self) -> None:
        # A matcher that tries every way to place the wildcards would never end.
        topic = ".".join("a" * 500)
        worst = ".".join("*" * 499) + ".b"
        index = TopicIndex[int]()
        for number in range(100):
            index.add(str(number), ".".join("*" * number) + ".b" if number else "b", number)
        started = time.perf_counter()
        assert not matches(worst, topic)
        assert index.match(topic) == ()
        assert time.perf_counter() - started < 1


class TestSelection:
    def test_of_several_topics_one_is_enough(self) -> None:
        selection = Selection(["orders.new", "users.*"])
        assert selection.matches(["nothing", "users.ada"])
        assert selection.matches(["orders.new"])
        assert not selection.matches(["orders.old", "users"])
        assert not selection.matches([])

    def test_everything_is_also_what_has_no_topic(self) -> None:
        assert Selection(["a", "*"]).matches([])
        assert Selection("*").every


class Everyone(RuleBasedStateMachine):
    """The index, beside a list that is looked through."""

    keys = Bundle("keys")

    def __init__(self) -> None:
        super().__init__()
        self.index = TopicIndex[int]()
        self.listed: dict[str, tuple[Any, int]] = {}
        self.asked: set[str | None] = {None, "a", "a.b"}
        self.numbers = itertools.count()

    @rule(target=keys, topics=FILTER)
    def add(self, topics: Any) -> str:
        number = next(self.numbers)
        key = f"key{number}"
        self.index.add(key, topics, number)
        self.listed[key] = topics, number
        return key

    @rule(key=keys, topics=FILTER)
    def add_again(self, key: str, topics: Any) -> None:
        number = next(self.numbers)
        self.index.add(key, topics, number)
        self.listed.pop(key, None)  # to the end of the line
        self.listed[key] = topics, number

    @rule(key=consumes(keys))
    def discard(self, key: str) -> None:
        assert self.index.discard(key) is (self.listed.pop(key, None) is not None)

    @rule(key=keys)
    def discard_and_discard_again(self, key: str) -> None:
        assert self.index.discard(key) is (self.listed.pop(key, None) is not None)
        assert self.index.discard(key) is False

    @rule(topic=TOPIC | st.none())
    def ask(self, topic: str | None) -> None:
        self.asked.add(topic)

    @rule()
    def ask_for_what_cannot_be(self) -> None:
        with pytest.raises(TopicError):
            self.index.match("a.*")
        with pytest.raises(TopicError):
            self.index.match([])  # type: ignore[arg-type]

    @invariant()
    def all_answers_are_true(self) -> None:
        assert len(self.index) == len(self.listed)
        for topic in self.asked:
            expected = tuple(n for each, n in self.listed.values() if naive(each, topic))
            assert self.index.match(topic) == expected
            if topic in self.index.answers:  # what a reader without the lock would see
                assert self.index.answers[topic] == expected
            if topic is not None:
                assert self.index.has_exact(topic) == any(
                    is_exact(each, topic) for each, _ in self.listed.values()
                )

    def teardown(self) -> None:
        for key in list(self.listed):
            assert self.index.discard(key)
        self.listed.clear()
        self.all_answers_are_true()


def is_exact(topics: Any, topic: str) -> bool:
    match topics:
        case list():
            return any(is_exact(each, topic) for each in topics)
        case Exact(text):
            return bool(text == topic)
        case Pattern(text) | str(text):
            return bool(text == topic) and not is_pattern(text)
    raise AssertionError(topics)


class TestTheIndex:
    def test_it_answers_as_if_it_looked_at_everyone(self) -> None:
        run_state_machine_as_test(
            Everyone, settings=settings(max_examples=40, stateful_step_count=25)
        )

    def test_it_does_so_after_every_short_sequence_of_changes(self) -> None:
        filters: list[Any] = ["a", "a.b", "*", ">", "a.>", "a.*", "*.b", ["a", "a.*"]]
        for sequence in itertools.product(filters, repeat=3):
            for gone in range(3):
                index = TopicIndex[int]()
                there: dict[int, Any] = {}

                def agree(index: TopicIndex[int] = index, there: dict[int, Any] = there) -> None:
                    for topic in ("a", "a.b", "c.b", None):
                        expected = [n for n, topics in there.items() if naive(topics, topic)]
                        assert list(index.match(topic)) == expected

                for number, topics in enumerate(sequence):
                    index.add(str(number), topics, number)
                    there[number] = topics
                    agree()
                index.discard(str(gone))
                del there[gone]
                agree()

    def test_values_come_in_the_order_in_which_they_were_added(self) -> None:
        index = TopicIndex[str]()
        for topics in (">", "a.b", "*", "a.*", ["a.b", "*.b"], "a.b"):
            index.add(str(len(index)), topics, str(topics))
        assert index.match("a.b") == (">", "a.b", "*", "a.*", "['a.b', '*.b']", "a.b")
        assert index.match("c") == (">", "*")
        assert index.match(None) == ("*",)

    def test_they_do_so_without_patterns_too(self) -> None:
        index = TopicIndex[str]()
        for topics in ("a", "*", "a", "b", "*"):
            index.add(str(len(index)), topics, f"{len(index)} {topics}")
        assert index.match("a") == ("0 a", "1 *", "2 a", "4 *")
        assert index.match("c") == ("1 *", "4 *")

    def test_each_value_comes_once_however_many_of_its_topics_match(self) -> None:
        index = TopicIndex[int]()
        index.add("key", ["a.b", "a.*", ">", "*", "a.b", Exact("a.b")], 1)
        assert index.match("a.b") == (1,)
        assert index.discard("key")
        assert index.match("a.b") == ()

    def test_answers_is_one_dictionary_for_ever(self) -> None:
        # A stream reads it without the lock, and holds on to it.
        index = TopicIndex[int]()
        answers = index.answers
        for key, topics in enumerate(["a", "*", "a.*", "a.>"]):
            index.add(str(key), topics, key)
            index.match("a.b")
            index.discard(str(key))
        assert index.answers is answers

    def test_a_million_topics_published_to_are_not_kept(self) -> None:
        index = TopicIndex[int]()
        index.add("key", "a.*", 1)
        most = 0
        for number in range(70_000):
            assert index.match(f"a.{number}") == (1,)
            most = max(most, len(index.answers))
        assert 10_000 < most < 70_000

    def test_subscribers_that_come_and_go_leave_nothing(self) -> None:
        index = TopicIndex[int]()

        def come_and_go(times: int) -> None:
            for number in range(times):
                index.add("key", [f"a.{number}", f"b.{number}.*", f"c.{number}.>", "*"], number)
                index.discard("key")

        come_and_go(10)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            come_and_go(3000)
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert grown < 50_000
        assert index.answers == {}

    def test_subscribing_to_many_topics_does_not_fill_the_answers_for_ever(self) -> None:
        index = TopicIndex[int]()
        for number in range(70_000):
            index.add(str(number), f"a.{number}", number)
        assert len(index.answers) < 70_000
        assert index.match("a.69999") == (69_999,)
        assert index.match("a.0") == (0,)


class TestUrlPatterns:
    @pytest.mark.parametrize(
        ("pattern", "base", "topic", "expected"),
        [
            ("https://e.com/books/:id", None, "https://e.com/books/1", True),
            ("https://e.com/books/:id", None, "https://e.com/books/1/2", False),
            ("https://e.com/:rest*", None, "https://e.com/books/1/2", True),
            ("https://e.com/*", None, "no url", False),
            ("https://e.com/*", None, "http://[x", False),
            ("/books/:id", "https://e.com/live", "/books/1", True),
            ("/books/:id", "https://e.com/live", "https://e.com/books/1", True),
            ("/books/:id", "https://e.com/live", "https://other.com/books/1", False),
            ("*", None, "no url", True),
        ],
    )
    def test_select_topics_that_are_urls(
        self, pattern: str, base: str | None, topic: str, expected: bool
    ) -> None:
        selector = UrlPattern(pattern, base)
        assert selector.matches(topic) is expected
        assert matches(selector, topic) is expected
        assert matches(["another", selector], topic) is expected
        assert selector == UrlPattern(pattern, base)
        assert hash(selector) == hash(UrlPattern(pattern, base))

    @pytest.mark.parametrize("pattern", ["(", "", "a\0", "x" * 4097, "https://e.com/{"])
    def test_what_is_none(self, pattern: str) -> None:
        with pytest.raises(TopicError):
            UrlPattern(pattern)

    def test_are_found_with_others_in_the_order_in_which_they_came(self) -> None:
        index: TopicIndex[int] = TopicIndex()
        pattern = UrlPattern("https://e.com/:id")
        index.add("1", pattern, 1)
        index.add("2", "https://e.com/a", 2)
        index.add("3", [pattern, "https://e.com/*"], 3)
        index.add("4", "*", 4)
        assert index.match("https://e.com/a") == (1, 2, 3, 4)
        assert index.match("https://e.com/b") == (1, 3, 4)
        assert index.match("other") == (4,)
        assert index.discard("1")
        assert index.match("https://e.com/b") == (3, 4)
        assert index.discard("3")
        assert index.match("https://e.com/b") == (4,)

    def test_need_a_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "urlpattern", None)
        with pytest.raises(MissingExtra, match="URL patterns"):
            UrlPattern("https://e.com/")
