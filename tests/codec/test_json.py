"""JSON: one table of values, with and without the accelerating extra."""

import dataclasses
import enum
import importlib.machinery
import importlib.util
import json as standard
import math
import sys
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from codomyrmex.events.streaming.codec import json
from codomyrmex.events.streaming.errors import DecodeError, EncodeError

ACCELERATORS = ("msgspec", "orjson")


def imported_without(*hidden: str, c_encoder: bool = True) -> ModuleType:
    """The codec as it is where these packages, or the interpreter's C encoder, do not exist."""
    spec = importlib.util.find_spec(json.__name__)
    assert spec is not None
    assert isinstance(spec.loader, importlib.machinery.SourceFileLoader)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name in hidden:
            patch.setitem(sys.modules, name, None)
        if not c_encoder:
            patch.setattr(standard.encoder, "c_make_encoder", None)
        spec.loader.exec_module(module)
    return module


CODECS = {
    "fast": json,
    "standard": imported_without(*ACCELERATORS),
    "no orjson": imported_without("orjson"),
    "no msgspec": imported_without("msgspec"),
    "pure Python": imported_without(*ACCELERATORS, c_encoder=False),
}


def imported_with_an_orjson_that_has_no_limit() -> ModuleType:
    def dumps(*_: object) -> bytes:
        return b"written"

    options = ("OPT_PASSTHROUGH_DATACLASS", "OPT_PASSTHROUGH_DATETIME", "OPT_PASSTHROUGH_SUBCLASS")
    with pytest.MonkeyPatch.context() as patch:
        fake = SimpleNamespace(dumps=dumps, **dict.fromkeys(options, 0))
        patch.setitem(sys.modules, "orjson", fake)
        return imported_without()


def test_an_orjson_that_does_not_limit_the_depth_of_tuples_is_not_used() -> None:
    assert imported_with_an_orjson_that_has_no_limit().encode({"a": 1}) == '{"a":1}'


EACH = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


def test_the_codecs_under_test_are_different_ones() -> None:
    def ways(codec: Any) -> tuple[bool, bool]:
        return codec.encode is codec._encode_slowly, codec.decode is codec._decode_slowly

    assert {name: ways(codec) for name, codec in CODECS.items()} == {
        "fast": (False, False),
        "standard": (True, True),
        "no orjson": (True, False),
        "no msgspec": (False, True),
        "pure Python": (True, True),
    }


class Colour(enum.Enum):
    RED = "red"
    NOON = time(12)
    POINT = (1, 2)
    NESTED = UUID(int=7)


class Size(enum.IntEnum):
    LARGE = 3


class Kind(enum.StrEnum):
    NEW = "new"


class OldKind(str, enum.Enum):  # noqa: UP042 - as many applications have them
    NEW = "new"


class Flags(enum.Flag):
    ONE = 1
    TWO = 2


@dataclasses.dataclass
class Point:
    x: Any
    y: Any = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    inner: Any


class Text(str):
    __slots__ = ()


class Number(int):
    pass


class Ratio(float):
    pass


class Table(dict[str, Any]):
    pass


class Computed(dict[str, Any]):
    def items(self) -> Any:
        return [(key, value * 2) for key, value in super().items()]


class Row(list[Any]):
    pass


Pair = namedtuple("Pair", "one two")

ODD = timezone(timedelta(seconds=3601))
BERLIN = timezone(timedelta(hours=2))

# What a value is after it was written and read again, where that is not the value itself.
WRITTEN: list[tuple[Any, Any]] = [
    (None, None),
    (True, True),
    (False, False),
    (0, 0),
    (-1, -1),
    (2**53, 2**53),
    (2**63 - 1, 2**63 - 1),
    (-(2**63), -(2**63)),
    (2**64 - 1, 2**64 - 1),
    (2**64, 2**64),
    (-(2**100), -(2**100)),
    (10**4000, 10**4000),
    (0.0, 0.0),
    (-0.0, -0.0),
    (0.1, 0.1),
    (1e16, 1e16),
    (1e-7, 1e-7),
    (1.7976931348623157e308, 1.7976931348623157e308),
    (5e-324, 5e-324),
    ("", ""),
    ("null", "null"),
    ('a"b\\c/d\b\f\n\r\t\x00\x1f\x7f', 'a"b\\c/d\b\f\n\r\t\x00\x1f\x7f'),
    ("é😀\u2028\u2029\ufeff\uffff", "é😀\u2028\u2029\ufeff\uffff"),
    ([], []),
    ({}, {}),
    ((), []),
    ([None, [1, [2, []]], {}], [None, [1, [2, []]], {}]),
    ((1, (2, 3)), [1, [2, 3]]),
    ({"": None, "é": {"a b": [True]}}, {"": None, "é": {"a b": [True]}}),
    # keys, as json.dumps writes them
    ({1: 1, 2.5: 2, None: 4}, {"1": 1, "2.5": 2, "null": 4}),
    ({2: 1, False: 2, True: 3}, {"2": 1, "false": 2, "true": 3}),
    ({Kind.NEW: 1}, {"new": 1}),
    ({OldKind.NEW: 1}, {"new": 1}),
    ({Size.LARGE: 1}, {"3": 1}),
    ({Text("a"): 1}, {"a": 1}),
    # what is not JSON, but has a form
    (datetime(2024, 1, 2, 3, 4, 5, 678, UTC), "2024-01-02T03:04:05.000678+00:00"),
    (datetime(2024, 1, 2, 3, 4, 5), "2024-01-02T03:04:05"),
    (datetime(2024, 1, 2, tzinfo=BERLIN), "2024-01-02T00:00:00+02:00"),
    (datetime(33, 1, 2, tzinfo=ODD), "0033-01-02T00:00:00+01:00:01"),
    (date(2024, 1, 2), "2024-01-02"),
    (time(3, 4), "03:04:00"),
    (time(3, 4, 5, 6, tzinfo=BERLIN), "03:04:05.000006+02:00"),
    (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    (Decimal("1.10"), "1.10"),
    (Decimal("-1E+400"), "-1E+400"),
    (Colour.RED, "red"),
    (Colour.NOON, "12:00:00"),
    (Colour.POINT, [1, 2]),
    (Colour.NESTED, "00000000-0000-0000-0000-000000000007"),
    (Size.LARGE, 3),
    (Kind.NEW, "new"),
    (OldKind.NEW, "new"),
    (Flags.ONE | Flags.TWO, 3),
    (Point(1, 2), {"x": 1, "y": 2}),
    (Point(Point(date(2024, 1, 2)), Kind.NEW), {"x": {"x": "2024-01-02", "y": 0}, "y": "new"}),
    (Slotted([Slotted(UUID(int=2))]), {"inner": [{"inner": str(UUID(int=2))}]}),
    # subclasses of JSON's own types
    (Text("a"), "a"),
    (Number(5), 5),
    (Ratio(0.5), 0.5),
    (Table(a=Row([1])), {"a": [1]}),
    (Computed(a=1), {"a": 2}),
    (Pair(1, "b"), [1, "b"]),
    (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    (defaultdict(list, a=[1]), {"a": [1]}),
]


class Raises:
    """A value whose own code fails when it is looked at."""

    @property
    def __dataclass_fields__(self) -> Any:
        raise ZeroDivisionError("broken")


@dataclasses.dataclass(init=False, slots=True)
class Unfinished:
    missing: int


def cycle(make: Callable[[Any], Any], value: Any) -> Any:
    value.append(make(value))
    return value


def nested(depth: int, make: Callable[[Any], Any] = lambda inner: [inner]) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = make(value)
    return value


# (the value, what the reason says)
REFUSED: list[tuple[Any, str]] = [
    (b"bytes", "bytes has no JSON form"),
    (bytearray(b"b"), "bytearray has no JSON form"),
    (memoryview(b"b"), "memoryview has no JSON form"),
    (set(), "set has no JSON form"),
    (frozenset({1}), "frozenset has no JSON form"),
    (object(), "object has no JSON form"),
    (object, "type has no JSON form"),
    (Point, "type has no JSON form"),
    (1j, "complex has no JSON form"),
    (timedelta(1), "timedelta has no JSON form"),
    (Fraction(1, 2), "Fraction has no JSON form"),
    (range(3), "range has no JSON form"),
    (iter(()), "tuple_iterator has no JSON form"),
    (MappingProxyType({}), "mappingproxy has no JSON form"),
    (SimpleNamespace(), "SimpleNamespace has no JSON form"),
    (ValueError("x"), "ValueError has no JSON form"),
    (print, "builtin_function_or_method has no JSON form"),
    (float("nan"), "nan has no JSON form"),
    (float("inf"), "inf has no JSON form"),
    (-math.inf, "-inf has no JSON form"),
    (Ratio("nan"), "nan has no JSON form"),
    (Decimal("NaN"), "Decimal('NaN') has no JSON form"),
    (Decimal("-Infinity"), "Decimal('-Infinity') has no JSON form"),
    (Decimal("sNaN"), "Decimal('sNaN') has no JSON form"),
    ("\ud800", r"not valid Unicode: '\ud800'"),
    ("a\udfffb", r"not valid Unicode: 'a\udfffb'"),
    (Text("\ud800"), r"not valid Unicode: '\ud800'"),
    ({"\ud800": 1}, r"a key cannot be encoded: '\ud800'"),
    ({float("nan"): 1}, "a key cannot be encoded: nan"),
    ({(1, 2): 1}, "a key is a string or number, not tuple: (1, 2)"),
    ({b"a": 1}, "a key is a string or number, not bytes: b'a'"),
    ({Colour.RED: 1}, "a key is a string or number, not Colour"),
    ({date(2024, 1, 2): 1}, "a key is a string or number, not date"),
    ({UUID(int=1): 1}, "a key is a string or number, not UUID"),
    (10**5000, "digits"),
    (Raises(), "broken"),
    (Unfinished(), "missing"),
]


def numbered(table: list[tuple[Any, Any]]) -> list[str]:
    """Names for the tests of a table: what is in it is too long, or has no text."""
    return [f"{type(value).__name__} {number}" for number, (value, _) in enumerate(table)]


# (how to hide a value in another, where it then is)
HIDING: list[tuple[Callable[[Any], Any], str]] = [
    (lambda value: value, "$"),
    (lambda value: [value], "$[0]"),
    (lambda value: (1, 2, value), "$[2]"),
    (lambda value: {"a": value}, "$.a"),
    (lambda value: {"a": 1, "b c": [0, {"d": value}]}, "$['b c'][1].d"),
    (lambda value: {"é": {"1": value}}, "$.é['1']"),
    (lambda value: {1: value}, "$[1]"),
    (lambda value: {None: value}, "$[None]"),
    (lambda value: Point(0, value), "$.y"),
    (lambda value: Table(a=Row([Slotted(Pair(1, value))])), "$.a[0].inner[1]"),
    (lambda value: {"null": None, "nulls": [None, value]}, "$.nulls[1]"),
]


@EACH
class TestEncode:
    @pytest.mark.parametrize(("value", "expected"), WRITTEN, ids=numbered(WRITTEN))
    def test_what_has_a_form_is_written(self, codec: Any, value: Any, expected: Any) -> None:
        for hide in (lambda v: v, lambda v: {"a": [v]}, lambda v: [None, {"a": v}]):
            text = codec.encode(hide(value))
            assert type(text) is str
            assert exactly(standard.loads(text)) == exactly(hide(expected))
            assert exactly(codec.decode(text)) == exactly(hide(expected))
            assert not {"\n", "\r"} & set(text)

    @pytest.mark.parametrize(("value", "says"), REFUSED, ids=numbered(REFUSED))
    def test_what_has_none_is_refused_wherever_it_is(
        self, codec: Any, value: Any, says: str
    ) -> None:
        for hide, path in HIDING:
            with pytest.raises(EncodeError) as refusal:
                codec.encode(hide(value))
            assert refusal.value.path == path
            assert says in refusal.value.reason
            assert refusal.value.event_id is None
            assert isinstance(refusal.value, TypeError)

    def test_the_first_of_several_is_named(self, codec: Any) -> None:
        with pytest.raises(EncodeError) as refusal:
            codec.encode({"fine": 1, "bad": {1}, "worse": b""})
        assert refusal.value.path == "$.bad"

    @pytest.mark.parametrize(
        "make",
        [
            lambda inner: [inner],
            lambda inner: (inner,),
            lambda inner: {"a": inner},
            Point,
            lambda inner: [Slotted({"a": inner})],
        ],
    )
    def test_what_contains_itself_is_refused(self, codec: Any, make: Callable[[Any], Any]) -> None:
        for value in (cycle(make, []), nested(100_000, make)):
            for hide in (lambda v: v, lambda v: [v], lambda v: {"a": 1, "b": {"c": (v,)}}):
                with pytest.raises(EncodeError, match="nested too deep, or contains itself"):
                    codec.encode(hide(value))
            unravel(value)

    @pytest.mark.parametrize("depth", [10, 100, 300])
    def test_what_is_nested_deeply_is_written(self, codec: Any, depth: int) -> None:
        value = nested(depth)
        assert codec.decode(codec.encode(value)) == value

    def test_it_is_compact_and_escapes_nothing_that_need_not_be(self, codec: Any) -> None:
        value = {"a": [1, 2.5, "é\u2028/<"], "b": {"c": "x"}}
        assert codec.encode(value) == '{"a":[1,2.5,"é\u2028/<"],"b":{"c":"x"}}'

    def test_an_enum_of_nan_or_of_a_set_is_refused(self, codec: Any) -> None:
        class Odd(enum.Enum):
            NAN = float("nan")
            SET = frozenset({1})

        for member, says in ((Odd.NAN, "nan has no JSON form"), (Odd.SET, "frozenset has no")):
            with pytest.raises(EncodeError, match=says):
                codec.encode([member])

    def test_nothing_is_changed(self, codec: Any) -> None:
        value = {"a": [1, {"b": Point(1)}]}
        codec.encode(value)
        assert value == {"a": [1, {"b": Point(1)}]}

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_an_interrupt_is_not_an_error_of_the_data(
        self, codec: Any, error: type[BaseException]
    ) -> None:
        class Interrupts:
            @property
            def __dataclass_fields__(self) -> Any:
                raise error

        with pytest.raises(error):
            codec.encode([Interrupts()])


def exactly(value: Any) -> Any:
    """A value with its types, down to the last zero's sign."""
    match value:
        case dict():
            return [(exactly(key), exactly(item)) for key, item in value.items()]
        case list():
            return [exactly(item) for item in value]
    return type(value), repr(value) if not isinstance(value, int) else value


def unravel(value: Any) -> None:
    """Take a deep value apart: its end by reference counting would overflow some stacks."""
    while isinstance(value, list | dict) and value:
        inner = next(iter(value.values())) if isinstance(value, dict) else value[0]
        value.clear()
        value = inner


READ: list[tuple[str, Any]] = [
    ("null", None),
    (" \t\r\n[1 , 2]\n", [1, 2]),
    ("-0", 0),
    ("-0.0", -0.0),
    ("1E5", 100000.0),
    ("1e-400", 0.0),
    ("123456789012345678901234567890", 123456789012345678901234567890),
    ("9" * 4300, int("9" * 4300)),
    ('"\\u0000\\u00e9\\ud83d\\ude00\\/"', "\0é😀/"),
    ('"\x7f\u2028"', "\x7f\u2028"),
    ('{"a":1,"a":2}', {"a": 2}),
    ("[" * 200 + "]" * 200, nested(199, lambda inner: [inner] if inner else [[]])),
    ('"\\ud83d\\ude00"', "😀"),
    ('"\\\\ud800"', "\\ud800"),
]

NOT_JSON: list[str] = [
    "",
    " ",
    "nul",
    "NaN",
    "Infinity",
    "-Infinity",
    "[NaN]",
    "1e400",
    "-1e400",
    "[1e999]",
    "01",
    "1.",
    ".5",
    "+1",
    "1_0",
    "١",  # noqa: RUF001 - a digit, but not JSON's
    "0x1",
    "'a'",
    '"a',
    '"a\nb"',
    '"a\tb"',
    '"\x00"',
    '"\\x41"',
    '"\\u12"',
    '"\\ud800"',
    '"\\ud800x"',
    '"\\udc00"',
    '"\\uDFFF\\uD800"',
    '{"\\ud800":1}',
    '["é","\\ud800"]',
    '"\ud800"',
    '{"\udfff":1}',
    "[1,]",
    '{"a":1,}',
    "{1:2}",
    "{a:1}",
    "[1] x",
    "[1][2]",
    "\ufeff1",
    "\xa01",
    "\x0c1",
    "// 1\n1",
    "9" * 4301,
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 100_000 + "]" * 100_000,
]

NOT_UTF_8 = [
    b"\xff",
    b'"\xff"',
    b'"\xc0\x80"',
    b'{"\xff":1}',
    b'"\xed\xa0\x80"',
    b'"\xf4\x90\x80\x80"',
    b'"\xc3',
    b"\xef\xbb\xbf1",
    '"é"'.encode("utf-16"),
    '"é"'.encode("latin-1"),
    b"1\x00",
]


@EACH
class TestDecode:
    @pytest.mark.parametrize(("text", "expected"), READ, ids=numbered(READ))
    def test_what_is_json_is_read(self, codec: Any, text: str, expected: Any) -> None:
        encoded = text.encode()
        for form in (text, encoded, bytearray(encoded), memoryview(encoded)):
            assert exactly(codec.decode(form)) == exactly(expected)

    @pytest.mark.parametrize("text", NOT_JSON, ids=lambda text: ascii(text[:20]))
    def test_what_is_not_is_refused(self, codec: Any, text: str) -> None:
        with pytest.raises(DecodeError, match="not JSON"):
            codec.decode(text)
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            return
        with pytest.raises(DecodeError, match="not JSON"):
            codec.decode(encoded)

    @pytest.mark.parametrize("encoded", NOT_UTF_8)
    def test_bytes_that_are_not_utf_8_are_refused(self, codec: Any, encoded: bytes) -> None:
        for form in (encoded, bytearray(encoded), memoryview(encoded)):
            with pytest.raises(DecodeError, match="not JSON"):
                codec.decode(form)

    @pytest.mark.parametrize("value", [None, 5, ["1"], object()])
    def test_what_is_no_text_is_a_mistake_of_the_caller(self, codec: Any, value: Any) -> None:
        with pytest.raises(TypeError):
            codec.decode(value)

    def test_the_reason_is_given(self, codec: Any) -> None:
        for text, says in [
            ("NaN", "NaN is not JSON"),
            ("1e400", "1e400 is out of range"),
            ("[1,]", "line 1 column"),
            ("[" * 100_000, "nested too deep"),
            ('"\\ud800"', "surrogates not allowed"),
        ]:
            with pytest.raises(DecodeError, match=says):
                codec.decode(text)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
    | st.sampled_from(["null", "nullable", "\u2028", "\0"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=15,
)

# Values of every kind, those with a form and those without one.
ANYTHING = st.recursive(
    st.integers(0, len(WRITTEN) - 1).map(lambda number: WRITTEN[number][0])
    | st.integers(0, len(REFUSED) - 1).map(lambda number: REFUSED[number][0])
    | st.floats()
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(
            st.text(max_size=2) | st.integers() | st.floats() | st.booleans() | st.none(),
            inner,
            max_size=3,
        )
        | st.builds(Point, inner, inner)
    ),
    max_leaves=6,
)

JSON_LIKE = st.text(
    st.sampled_from('[]{}",:-+.0123456789eEtrufalsn\\ud8D \n\té\ud800'), max_size=25
)


def outcome(function: Callable[[Any], Any], value: Any) -> Any:
    try:
        return "returned", function(value)
    except (EncodeError, DecodeError) as error:
        return type(error), getattr(error, "path", None), str(error)


class TestAllAlike:
    @given(PLAIN)
    def test_a_value_comes_back_as_it_was(self, value: Any) -> None:
        for codec in CODECS.values():
            text = codec.encode(value)
            assert exactly(codec.decode(text)) == exactly(value)
            assert exactly(codec.decode(text.encode())) == exactly(value)
            assert exactly(standard.loads(text)) == exactly(value)
            assert "\n" not in text
            assert "\r" not in text

    @given(ANYTHING)
    def test_all_accept_the_same_and_mean_the_same(self, value: Any) -> None:
        expected = outcome(CODECS["standard"].encode, value)
        for codec in CODECS.values():
            found = outcome(codec.encode, value)
            if expected[0] == "returned":
                assert found[0] == "returned"
                assert exactly(standard.loads(found[1])) == exactly(standard.loads(expected[1]))
            else:
                assert found == expected

    @given(JSON_LIKE | PLAIN.map(standard.dumps))
    @example('"\\ud800\\udc00"')
    def test_all_read_the_same(self, text: str) -> None:
        expected = outcome(CODECS["standard"].decode, text)
        for codec in CODECS.values():
            found = outcome(codec.decode, text)
            if expected[0] == "returned":
                assert exactly(found[1]) == exactly(expected[1])
                assert codec.decode(codec.encode(found[1])) == found[1]
            else:
                assert found == expected

    @given(st.binary(max_size=12) | PLAIN.map(lambda value: standard.dumps(value).encode()[:-1]))
    def test_all_refuse_the_same_bytes(self, encoded: bytes) -> None:
        expected = outcome(CODECS["standard"].decode, encoded)
        for codec in CODECS.values():
            assert exactly_outcome(outcome(codec.decode, encoded)) == exactly_outcome(expected)


def exactly_outcome(found: Any) -> Any:
    return ("returned", exactly(found[1])) if found[0] == "returned" else found


@EACH
def test_a_container_that_fails_while_it_is_looked_through_is_named(codec: Any) -> None:
    class Shifting(dict[str, Any]):
        def items(self) -> Any:
            raise RuntimeError("dictionary changed size during iteration")

    with pytest.raises(EncodeError, match="dictionary changed size") as refusal:
        codec.encode({"a": [Shifting(b=1)], "b": set()})
    assert refusal.value.path in ("$.a[0]", "$.b")  # the C encoder does not ask items()
