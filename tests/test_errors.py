"""The errors: what they are besides, what they carry, and that they survive a process boundary."""

import copy
import pickle
import re
from collections.abc import Iterator

import pytest

from codomyrmex.events.streaming import errors
from codomyrmex.events.streaming.errors import (
    AlreadyConsumed,
    EncodeError,
    IdConflict,
    MissingExtra,
    StreamingError,
    TooLarge,
    UnknownSubscription,
)

CLASSES = [getattr(errors, name) for name in errors.__all__]

EXAMPLES = {
    "no place": EncodeError("set has no JSON form"),
    "a place": EncodeError("set has no JSON form", "$.tags[3]"),
    "an event": EncodeError("set has no JSON form", "$.tags[3]", "event-7"),
    "unknown": UnknownSubscription("abc"),
    "consumed": AlreadyConsumed("abc"),
    "extra": MissingExtra("serve", "server"),
    "conflict": IdConflict("event-7"),
    "large": TooLarge("event-7", 11, 10),
    **{cls.__name__: cls("what went wrong") for cls in CLASSES if "__init__" not in vars(cls)},
}


def drawn() -> Iterator[tuple[str, list[str]]]:
    """The tree in the module's documentation: each class and the builtins it is said to be."""
    assert errors.__doc__ is not None
    for line in errors.__doc__.splitlines():
        if found := re.match(r"    (?:[├└]── )(\w+) \(([\w, ]+)\)", line):
            yield found[1], found[2].split(", ")


def test_the_tree_in_the_documentation_is_the_tree() -> None:
    tree = dict(drawn())
    assert tree.keys() == set(errors.__all__) - {"StreamingError"}
    for name, builtins in tree.items():
        bases = [base.__name__ for base in getattr(errors, name).__bases__]
        assert bases == ["StreamingError", *builtins]


def test_every_class_is_public_and_a_streaming_error() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)
    assert all(issubclass(cls, StreamingError) for cls in CLASSES)
    assert sorted(errors.__all__) == errors.__all__


@pytest.mark.parametrize("error", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_an_error_is_the_same_after_pickle_and_copy(error: StreamingError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin) == vars(error)


def test_an_encode_error_says_where_and_whose() -> None:
    assert str(EXAMPLES["no place"]) == "$: set has no JSON form"
    assert str(EXAMPLES["a place"]) == "$.tags[3]: set has no JSON form"
    assert str(EXAMPLES["an event"]) == "$.tags[3] of event event-7: set has no JSON form"
    error = EncodeError("set has no JSON form", "$.tags[3]", "event-7")
    assert (error.reason, error.path, error.event_id) == (
        "set has no JSON form",
        "$.tags[3]",
        "event-7",
    )
    assert EncodeError("why").event_id is None


def test_the_errors_of_subscriptions_carry_the_id() -> None:
    unknown, consumed = UnknownSubscription("abc"), AlreadyConsumed("abc")
    assert unknown.subscription_id == consumed.subscription_id == "abc"
    assert str(unknown) == "no subscription has the id 'abc'"
    assert str(consumed) == "subscription 'abc' has a reader already; subscribe once per reader"


def test_the_errors_of_logs_carry_what_is_wrong() -> None:
    conflict, large = IdConflict("event-7"), TooLarge("event-7", 11, 10)
    assert conflict.event_id == large.event_id == "event-7"
    assert (large.size, large.limit) == (11, 10)
    assert str(conflict) == "the log holds another event with the id 'event-7'"
    assert str(large) == "event 'event-7' has 11 bytes; this log takes up to 10"


def test_a_missing_extra_says_what_to_type() -> None:
    error = MissingExtra("serve", "server")
    assert (error.needed_for, error.extra) == ("serve", "server")
    assert (
        str(error) == "serve needs the extra 'server': pip install 'codomyrmex-streaming[server]'"
    )
