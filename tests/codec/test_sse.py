"""The Server-Sent Events codec: against the standard, against another decoder, at its limits."""

import doctest
import re
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import httpx
import httpx_sse
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codomyrmex.events.streaming.codec import sse
from codomyrmex.events.streaming.codec.sse import (
    MAX_RETRY,
    Decoder,
    Frame,
    check_field,
    comment,
    encode,
)
from codomyrmex.events.streaming.errors import FrameError, StreamingError

KIB = 1024
MIB = 1024 * 1024
BOM = b"\xef\xbb\xbf"


def decode(stream: bytes) -> list[Frame]:
    return Decoder().feed(stream)


def one_by_one(stream: bytes) -> list[bytes]:
    return [stream[i : i + 1] for i in range(len(stream))]


Outcome = tuple[list[Frame], str, str, int | None]


def outcome(decoder: Decoder, chunks: Iterable[bytes]) -> Outcome:
    """Everything a reader can tell: frames, what stopped it, last event ID, reconnection time."""
    frames: list[Frame] = []
    error = ""
    try:
        for chunk in chunks:
            frames += decoder.feed(chunk)
        decoder.feed(b"")
    except FrameError as stopped:
        error = str(stopped)
    return frames, error, decoder.last_event_id, decoder.retry


def by_the_standard(stream: bytes) -> Outcome:
    """The steps of the standard's sections 9.2.5 and 9.2.6 on the whole stream, one for one."""
    text = stream.decode("utf-8", "replace").removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    *lines, _unfinished = re.split("\r\n|\n|\r", text)
    frames = []
    data_buffer = event_type_buffer = last_event_id_buffer = ""
    last_event_id_string = ""
    reconnection_time = retry_in_block = None
    for line in lines:
        if line == "":
            last_event_id_string = last_event_id_buffer
            if data_buffer != "":
                if data_buffer[-1] == "\n":
                    data_buffer = data_buffer[:-1]
                event_type = "message"
                if event_type_buffer != "":
                    event_type = event_type_buffer
                frames.append(Frame(event_type, data_buffer, last_event_id_string, retry_in_block))
            data_buffer = event_type_buffer = ""
            retry_in_block = None
            continue
        if line[0] == ":":
            continue
        if ":" in line:
            colon = line.index(":")
            field, value = line[:colon], line[colon + 1 :]
            if value[:1] == " ":
                value = value[1:]
        else:
            field, value = line, ""
        if field == "event":
            event_type_buffer = value
        elif field == "data":
            data_buffer += value
            data_buffer += "\n"
        elif field == "id":
            if "\0" not in value:
                last_event_id_buffer = value
        elif field == "retry" and re.fullmatch("[0-9]+", value):
            reconnection_time = retry_in_block = int(value)
    return frames, "", last_event_id_string, reconnection_time


def cut(stream: bytes, places: Iterable[int]) -> list[bytes]:
    bounds = [0, *sorted(min(place, len(stream)) for place in places), len(stream)]
    return [stream[start:end] for start, end in pairwise(bounds)]


# Pieces that make the cases of the grammar likely, and arbitrary bytes between them.
pieces = st.one_of(
    st.sampled_from(
        [b"\n", b"\n\n", b"\r", b"\r\n", b"\r\n\r\n", b"\n\r", b":", b" ", b": ", b"\0", BOM]
        + [b"data", b"data:", b"data: ", b"event", b"event: ", b"id", b"id: ", b"retry", b"retry: "]
        + [b"Data: ", b" data: ", b"data : ", b"12", b"0", b"-1", b"+1", "\u0663".encode(), b"1_0"]
        + [f"x{end}y".encode() for end in "\u2028\u2029\x85\v\f\x1c\x1d\x1e"]
        + ["é€😀".encode()[:n] for n in range(1, 9)]  # and cut within a sequence
        + [b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xff"]
    ),
    st.binary(max_size=4),
)
streams = st.lists(pieces, max_size=40).map(b"".join)
cuts = st.lists(st.integers(0, 200), max_size=12)
no_line_ends = st.text(max_size=20).map(lambda text: re.sub("[\r\n]", "", text))
# What an id or an event type may be.
fields = no_line_ends.map(lambda text: text.replace("\0", "").strip(" \t"))


# The decoder, against the standard


@settings(max_examples=300)
@given(stream=streams)
def test_decodes_as_the_standard_says(stream: bytes) -> None:
    assert outcome(Decoder(), [stream]) == by_the_standard(stream)


@settings(max_examples=300)
@given(stream=streams, places=cuts)
def test_any_chunking_gives_the_same(stream: bytes, places: list[int]) -> None:
    whole = outcome(Decoder(), [stream])
    assert outcome(Decoder(), cut(stream, places)) == whole
    assert outcome(Decoder(), one_by_one(stream)) == whole


@settings(max_examples=300)
@given(
    stream=streams,
    places=cuts,
    max_line=st.integers(1, 20),
    max_event=st.integers(1, 20),
)
def test_any_chunking_gives_the_same_up_to_a_limit(
    stream: bytes, places: list[int], max_line: int, max_event: int
) -> None:
    def decoder() -> Decoder:
        return Decoder(max_line=max_line, max_event=max_event)

    whole = outcome(decoder(), [stream])
    assert outcome(decoder(), cut(stream, places)) == whole
    assert outcome(decoder(), one_by_one(stream)) == whole


blocks = st.lists(
    st.one_of(
        st.tuples(st.just("data"), no_line_ends),
        st.tuples(st.just("event"), no_line_ends),
        st.tuples(st.just("id"), no_line_ends),
        st.tuples(st.just("retry"), st.integers(0, MAX_RETRY).map(str)),
        st.tuples(st.just(""), no_line_ends),
        st.tuples(st.sampled_from(["Data", "data ", "x"]), no_line_ends),
    ),
    max_size=6,
)


@given(
    stream=st.lists(st.tuples(blocks, no_line_ends), max_size=5),
    line_end=st.sampled_from(["\n", "\r", "\r\n"]),
    places=cuts,
)
def test_agrees_with_httpx_sse(
    stream: list[tuple[list[tuple[str, str]], str]], line_end: str, places: list[int]
) -> None:
    # Every block has data: httpx-sse makes events of some that have none.
    text = "".join(
        line + line_end
        for fields, last in stream
        for line in [*(f"{name}: {value}" for name, value in fields), f"data:{last}", ""]
    )
    response = httpx.Response(
        200, headers={"content-type": "text/event-stream"}, content=text.encode()
    )
    theirs = [
        Frame(event.event, event.data, event.id, event.retry)
        for event in httpx_sse.EventSource(response).iter_sse()
    ]
    assert outcome(Decoder(), cut(text.encode(), places))[0] == theirs


# The decoder, case by case


@pytest.mark.parametrize(
    ("stream", "frames"),
    [
        # The standard's own examples.
        (
            b"data: YHOO\ndata: +2\ndata: 10\n\n",
            [Frame(data="YHOO\n+2\n10")],
        ),
        (
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n"
            b"data:  third event\n\n",
            [
                Frame(data="first event", id="1"),
                Frame(data="second event", id=""),
                Frame(data=" third event", id=""),
            ],
        ),
        (b"data\n\ndata\ndata\n\ndata:", [Frame(data=""), Frame(data="\n")]),
        (b"data:test\n\ndata: test\n\n", [Frame(data="test"), Frame(data="test")]),
        # Fields.
        (b"event: a\ndata: 1\n\ndata: 2\n\n", [Frame("a", "1"), Frame("message", "2")]),
        (b"event: a\nevent: b\ndata: 1\n\n", [Frame("b", "1")]),
        (b"event: a\nevent:\ndata: 1\n\n", [Frame("message", "1")]),
        (b"event: a\n\ndata: 1\n\n", [Frame("message", "1")]),
        (
            b"data: a: b\n\ndata:a: b\n\ndata::  b\n\n",
            [Frame(data="a: b")] * 2 + [Frame(data=":  b")],
        ),
        (b"data:  \n\ndata: \t\n\n", [Frame(data=" "), Frame(data="\t")]),
        (b"Data: 1\n data: 2\ndata : 3\ndatax: 4\nda: ta: 5\ndata\0: 6\n\n", []),
        (b":\n: \n:data: 1\n: data: 2\n\n", []),
        (b"data: 1\n:\ndata: 2\n\n", [Frame(data="1\n2")]),
        (b"data: 1\0\nevent: e\0\n\n", [Frame("e\0", "1\0")]),
        # What is not complete is not returned.
        (b"data: 1\n\ndata: 2\n", [Frame(data="1")]),
        (b"data: 1\n\ndata: 2", [Frame(data="1")]),
        (b"", []),
        (b"\n\n\r\r\r\n", []),
    ],
)
def test_interpretation(stream: bytes, frames: list[Frame]) -> None:
    assert decode(stream) == frames
    assert outcome(Decoder(), one_by_one(stream))[0] == frames


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n"])
def test_cr_lf_and_crlf_end_a_line(end: str) -> None:
    stream = f"event: a{end}data: 1{end}data: 2{end}{end}data: 3{end}{end}".encode()
    frames = [Frame("a", "1\n2"), Frame("message", "3")]
    for size in range(1, len(stream) + 1):
        chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert outcome(Decoder(), chunks)[0] == frames


def test_line_ends_mix() -> None:
    assert decode(b"data: 1\rdata: 2\n\rdata: 3\r\n\ndata: 4\n\r\n") == [
        Frame(data="1\n2"),
        Frame(data="3"),
        Frame(data="4"),
    ]


def test_a_frame_does_not_wait_for_what_follows_its_last_cr() -> None:
    decoder = Decoder()
    assert decoder.feed(b"data: 1\r\r") == [Frame(data="1")]
    assert decoder.feed(b"\ndata: 2\r\n\r") == [Frame(data="2")]
    assert decoder.feed(b"") == []
    assert decoder.feed(b"\n") == []
    assert decoder.feed(b"data: 3\r") == []
    assert decoder.feed(b"\n") == []  # the same line end, not a blank line
    assert decoder.feed(b"\n") == [Frame(data="3")]


@pytest.mark.parametrize("other", "\u2028\u2029\x85\v\f\x1c\x1d\x1e\x00")
def test_no_other_character_ends_a_line(other: str) -> None:
    data = f"1{other}data: 2{other}{other}3"
    assert decode(f"event: a{other}b\ndata: {data}\n\n".encode()) == [Frame(f"a{other}b", data)]
    assert decode(encode(data).encode()) == [Frame(data=data)]


def test_one_byte_order_mark_is_dropped_at_the_start() -> None:
    for places in ([], [1], [2], [1, 2], [3], [4]):
        assert outcome(Decoder(), cut(BOM + b"data: 1\n\n", places))[0] == [Frame(data="1")]
    assert decode(BOM + b"\ndata: 1\n\n") == [Frame(data="1")]
    assert decode(BOM + BOM + b"data: 1\ndata: 2\n\n") == [Frame(data="2")]
    assert decode(b"\n" + BOM + b"data: 1\n\n") == []
    for later in (b"data: 1\n\n" + BOM + b"data: 2\n\n", b"data: 1\n\n" + BOM * 2 + b"data: 2\n\n"):
        for places in ([], [9], list(range(99))):
            assert outcome(Decoder(), cut(later, places))[0] == [Frame(data="1")]
    assert decode(b"data: " + BOM + b"1\n\n") == [Frame(data="\ufeff1")]
    assert decode(BOM[:2] + b"data: 1\n\n") == []


@pytest.mark.parametrize(
    ("invalid", "shown"),
    [
        (b"\xff", "\ufffd"),
        (b"\xe2\x82", "\ufffd"),  # truncated: one replacement for what there is
        (b"\xf0\x9f\x98x", "\ufffdx"),
        (b"\xc0\x80", "\ufffd\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
    ],
)
def test_invalid_utf8_becomes_replacement_characters(invalid: bytes, shown: str) -> None:
    stream = b"event: " + invalid + b"\nid: " + invalid + b"\ndata: " + invalid + b"\ndata:1\n\n"
    assert decode(stream) == [Frame(shown, f"{shown}\n1", shown)]
    assert outcome(Decoder(), one_by_one(stream))[0] == [Frame(shown, f"{shown}\n1", shown)]


def test_an_id_stays_until_another_one() -> None:
    assert decode(b"id: 1\ndata: a\n\ndata: b\n\nid: 2\ndata: c\n\nid\ndata: d\n\n") == [
        Frame(data="a", id="1"),
        Frame(data="b", id="1"),
        Frame(data="c", id="2"),
        Frame(data="d", id=""),
    ]


def test_an_id_with_nul_is_ignored() -> None:
    assert decode(b"id: 1\nid: 2\0\ndata: a\n\n") == [Frame(data="a", id="1")]


def test_an_id_counts_from_the_blank_line_even_without_data() -> None:
    decoder = Decoder()
    assert decoder.last_event_id == ""
    assert decoder.feed(b"id: 1\n") == []
    assert decoder.last_event_id == ""
    assert decoder.feed(b"\n") == []
    assert decoder.last_event_id == "1"
    assert decoder.feed(b"data: a\n\n") == [Frame(data="a", id="1")]
    assert decoder.feed(b"id:\n\n") == []
    assert decoder.last_event_id == ""


def test_a_reader_can_begin_with_an_id_it_has_kept() -> None:
    decoder = Decoder(last_event_id="41")
    assert decoder.last_event_id == "41"
    assert decoder.feed(b"data: a\n\nid: 42\ndata: b\n\n") == [
        Frame(data="a", id="41"),
        Frame(data="b", id="42"),
    ]


@pytest.mark.parametrize(
    ("value", "milliseconds"),
    [
        ("0", 0),
        ("3000", 3000),
        ("0" * 5000 + "7", 7),
        (str(MAX_RETRY), MAX_RETRY),
        (str(MAX_RETRY + 1), MAX_RETRY),
        ("9" * 10_000, MAX_RETRY),  # int() refuses this many digits
        *((value, None) for value in ("", "-1", "+1", "1.5", "1 ", " 1", "1e3", "1_0", "٣", "²")),
    ],
)
def test_retry_is_ascii_digits_only(value: str, milliseconds: int | None) -> None:
    decoder = Decoder()
    assert decoder.feed(f"retry: {value}\n".encode()) == []
    assert decoder.retry == milliseconds
    assert decoder.feed(b"data: a\n\n") == [Frame(data="a", retry=milliseconds)]


def test_retry_is_the_frames_own_and_the_decoders_latest() -> None:
    decoder = Decoder()
    assert decoder.retry is None
    assert decoder.feed(b"retry: 5\nretry: x\ndata: a\n\ndata: b\n\n") == [
        Frame(data="a", retry=5),
        Frame(data="b"),
    ]
    assert decoder.feed(b"retry: 6\n\ndata: c\n\n") == [Frame(data="c")]
    assert decoder.retry == 6


def test_reset_begins_a_new_stream_and_keeps_what_the_reader_keeps() -> None:
    decoder = Decoder()
    decoder.feed(b"id: 1\nretry: 5\ndata: a\n\nid: 2\nevent: lost\nretry: 6\ndata: lost\nda")
    decoder.reset()
    assert (decoder.last_event_id, decoder.retry) == ("1", 6)
    assert decoder.feed(BOM + b"data: b\n\n") == [Frame(data="b", id="1")]
    decoder.feed(b"data: c\r")
    decoder.reset()
    assert decoder.feed(b"\n" + BOM + b"data: d\n\n") == []  # a blank line, then no field
    assert decoder.feed(b"data: e\n\n") == [Frame(data="e", id="1")]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_feed_takes_any_buffer_and_keeps_none(
    kind: Callable[[bytearray], bytes | bytearray | memoryview],
) -> None:
    decoder = Decoder()
    buffer = bytearray(b"data: 1")
    decoder.feed(kind(buffer))
    buffer[:] = b"xxxxxxx"
    assert decoder.feed(kind(bytearray(b"\n\n"))) == [Frame(data="1")]


def test_feed_refuses_text() -> None:
    with pytest.raises(TypeError):
        Decoder().feed("data: 1\n\n")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_frame_has_the_standards_defaults() -> None:
    assert Frame() == Frame(event="message", data="", id="", retry=None)


# The decoder's limits


def both_ways(stream: bytes) -> Sequence[list[bytes]]:
    return [stream], one_by_one(stream)


def test_a_line_may_be_as_long_as_its_limit() -> None:
    fits = b"data: 3456789\r\n: 23456789012\ndata: 3456789\n\n"
    for chunks in both_ways(fits):
        frames, error, *_ = outcome(Decoder(max_line=13), chunks)
        assert (frames, error) == ([Frame(data="3456789\n3456789")], "")
    for line in (
        b"data: 34567890\n\n",
        b"data: 34567890",
        b": 345678901234\n",
        b"12345678901234\r",
    ):
        for chunks in both_ways(line):
            frames, error, *_ = outcome(Decoder(max_line=13), chunks)
            assert frames == []
            assert error == "a line of the event stream is longer than 13 bytes"


def test_an_event_may_be_as_large_as_its_limit() -> None:
    for chunks in both_ways(b"data: 123\ndata: 56\n\ndata: 123456\n\n"):
        frames, error, *_ = outcome(Decoder(max_event=6), chunks)
        assert (frames, error) == ([Frame(data="123\n56"), Frame(data="123456")], "")
    for event in (b"data: 123\ndata: 567\n", b"data: 1234567\n", b"data\n" * 8):
        for chunks in both_ways(event):
            frames, error, *_ = outcome(Decoder(max_event=6), chunks)
            assert frames == []
            assert error == "the data of an event is longer than 6 bytes"


def test_only_data_counts_as_the_size_of_an_event() -> None:
    decoder = Decoder(max_event=3, max_line=100)
    assert decoder.feed(b":\n" * 1000 + b"x: y\nid: 12345\n" * 1000 + b"data: abc\n\n") == [
        Frame(data="abc", id="12345")
    ]


def test_the_default_limits_hold_an_event_of_a_hub() -> None:
    data = b'"\\' * MIB
    assert Decoder().feed(b"data: " + data + b"\n\n") == [Frame(data=data.decode())]
    with pytest.raises(FrameError, match="the data of an event is longer than 2097152 bytes"):
        Decoder().feed(b"data: " + data + b"1\n\n")
    with pytest.raises(FrameError, match="a line of the event stream is longer than 2098176"):
        Decoder().feed(b": " + data + b" " * KIB)


@pytest.mark.parametrize("limits", [{"max_event": 0}, {"max_line": 0}, {"max_event": -5000}])
def test_a_limit_must_allow_something(limits: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1 byte"):
        Decoder(**limits)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_over_a_limit_a_decoder_refuses_everything_until_reset() -> None:
    decoder = Decoder(max_event=5)
    assert decoder.error is None
    with pytest.raises(FrameError) as first:
        decoder.feed(b"id: 1\nevent: x\nretry: 9\ndata: 123456\n\ndata: a\n\n")
    assert isinstance(first.value, StreamingError)
    for more in (b"data: b\n\n", b""):
        with pytest.raises(FrameError) as again:
            decoder.feed(more)
        assert again.value is first.value is decoder.error
    assert decoder.last_event_id == ""  # of a block that never ended
    decoder.reset()
    assert decoder.error is None
    assert decoder.feed(b"data: c\n\n") == [Frame(data="c")]


def test_frames_before_a_limit_are_returned_first() -> None:
    decoder = Decoder(max_event=5)
    assert decoder.feed(b"id: 1\ndata: a\n\nid: 2\ndata: 123456\n\ndata: b\n\n") == [
        Frame(data="a", id="1")
    ]
    assert str(decoder.error) == "the data of an event is longer than 5 bytes"
    assert decoder.last_event_id == "1"  # resuming from here asks for what was refused
    with pytest.raises(FrameError):
        decoder.feed(b"data: c\n\n")


# The decoder's costs


def peak_memory(decoder: Decoder, chunks: Iterable[bytes]) -> int:
    tracemalloc.start()
    try:
        outcome(decoder, chunks)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_bounded() -> None:
    endless_line = (b"x" * 64 * KIB for _ in range(512))
    assert peak_memory(Decoder(), endless_line) < 6 * MIB
    line_in_one_chunk = b"x" * 32 * MIB
    assert peak_memory(Decoder(), [line_in_one_chunk]) < 6 * MIB
    lines_in_one_chunk = b"::\n" * 256 * KIB
    assert peak_memory(Decoder(), [lines_in_one_chunk]) < 2 * MIB
    tiny_lines_of_data = b"data:ab\n" * 64 * KIB
    assert peak_memory(Decoder(), [tiny_lines_of_data]) < 2 * MIB


@pytest.mark.parametrize(
    "chunks_of",
    [
        pytest.param(lambda size: [b"x" * 64] * (size // 64), id="a line in small chunks"),
        pytest.param(lambda size: [b"data:%58d\n" % 0 * (size // 64)], id="an event of many lines"),
        pytest.param(lambda size: [b"data:%57d\n\n" % 0 * (size // 64)], id="many frames at once"),
        pytest.param(lambda size: [b"retry:" + b"9" * size + b"\n"], id="a long number"),
    ],
)
def test_time_is_linear(chunks_of: Callable[[int], list[bytes]]) -> None:
    def seconds(size: int) -> float:
        chunks = chunks_of(size)
        best = float("inf")
        for _ in range(3):
            decoder = Decoder()
            start = time.thread_time()
            for chunk in chunks:
                decoder.feed(chunk)
            best = min(best, time.thread_time() - start)
        return best

    # 16 times the bytes; a quadratic step takes well over 100 times as long at these sizes.
    assert seconds(MIB) < 64 * max(seconds(64 * KIB), 0.001)


# The encoder


@given(data=st.text())
def test_data_arrives_with_its_line_ends_as_lf(data: str) -> None:
    assert decode(encode(data).encode()) == [Frame(data=re.sub("\r\n?", "\n", data))]


@given(
    frames=st.lists(
        st.tuples(
            st.text(max_size=30),
            st.none() | fields,
            st.none() | fields,
            st.none() | st.integers(0, MAX_RETRY),
            st.none() | st.text(max_size=10),
        ),
        max_size=5,
    ),
    places=cuts,
)
def test_frames_survive_the_wire(
    frames: list[tuple[str, str | None, str | None, int | None, str | None]], places: list[int]
) -> None:
    stream = ""
    expected = []
    last_id = ""
    for data, event, id_, retry, remark in frames:
        if remark is not None:
            stream += comment(remark)
        stream += encode(data, event=event, id=id_, retry=retry)
        last_id = last_id if id_ is None else id_
        expected.append(Frame(event or "message", re.sub("\r\n?", "\n", data), last_id, retry))
    assert "\r" not in stream
    assert not stream.startswith("\ufeff")
    assert outcome(Decoder(), cut(stream.encode(), places))[0] == expected


def test_what_a_frame_looks_like() -> None:
    assert encode("x") == "data: x\n\n"
    assert encode("") == "data: \n\n"
    assert encode("x", id="1") == "id: 1\ndata: x\n\n"
    assert encode("x", id="") == "id: \ndata: x\n\n"
    assert encode("x", event="e") == "event: e\ndata: x\n\n"
    assert encode("x", event="") == "data: x\n\n"
    assert encode("x", event="", id="1") == "id: 1\ndata: x\n\n"
    assert encode("x", event="e", id="1") == "id: 1\nevent: e\ndata: x\n\n"
    assert encode("x", event="e", id="") == "id: \nevent: e\ndata: x\n\n"
    assert encode("x", event=" é", id="é 1") == "id: é 1\nevent:  é\ndata: x\n\n"
    assert encode("x", retry=0) == "retry: 0\ndata: x\n\n"
    assert (
        encode("x", event="e", id="1", retry=MAX_RETRY)
        == f"id: 1\nevent: e\nretry: {MAX_RETRY}\ndata: x\n\n"
    )


def test_each_line_of_data_gets_a_field() -> None:
    assert encode("a\nb") == "data: a\ndata: b\n\n"
    assert (
        encode("a\r\nb\rc\n\rd\n", id="1")
        == "id: 1\ndata: a\ndata: b\ndata: c\ndata: \ndata: d\ndata: \n\n"
    )
    assert encode("a\u2028b") == "data: a\u2028b\n\n"


def test_what_a_comment_looks_like() -> None:
    assert comment() == ":\n"
    assert comment("x") == ": x\n"
    assert comment("a\r\nb\rc\nd") == ": a\n: b\n: c\n: d\n"


@pytest.mark.parametrize("name", ["event", "id"])
@pytest.mark.parametrize("forbidden", ["\n", "\r", "\0", "\ud800"])
@pytest.mark.parametrize("pattern", ["{}", "{}a", "a{}", "a{}b"])
@pytest.mark.parametrize("other", [{}, {"event": "e"}, {"id": "1"}, {"event": "e", "id": "1"}])
def test_characters_that_no_field_may_have(
    name: str, forbidden: str, pattern: str, other: dict[str, str]
) -> None:
    value = pattern.format(forbidden)
    with pytest.raises(FrameError, match=f"SSE {name} must not contain") as direct:
        check_field(name, value)
    with pytest.raises(FrameError, match=f"SSE {name} must not contain") as encoding:
        encode("x", **{**other, name: value})  # type: ignore[arg-type]  # pyright: ignore
    assert str(direct.value) == str(encoding.value)
    assert isinstance(direct.value, ValueError)


@pytest.mark.parametrize("id_", [" ", " a", "a ", "\ta", "a\t"])
def test_an_id_must_not_begin_or_end_with_what_headers_lose(id_: str) -> None:
    for event in (None, "e"):
        with pytest.raises(FrameError, match="SSE id must not begin or end with a space or tab"):
            encode("x", id=id_, event=event)
    check_field("event", id_)


@pytest.mark.parametrize(
    "value", ["", "order.created", "a b", "é", "😀", "\u2028", "a:b", "\ufeff"]
)
def test_fields_that_are_fine(value: str) -> None:
    check_field("id", value)
    check_field("event", value)
    frame = Frame(value or "message", "x", value)
    assert decode(encode("x", event=value, id=value).encode()) == [frame]


def test_a_refusal_does_not_repeat_all_of_a_long_value() -> None:
    with pytest.raises(FrameError) as refused:
        check_field("id", "x" * MIB + "\n")
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    "retry",
    [-1, MAX_RETRY + 1, True, False, 1.0, "1", pytest.param(10**5000, id="more digits than str()")],
)
def test_retry_must_be_an_int_in_range(retry: int) -> None:
    with pytest.raises(FrameError, match=f"SSE retry must be an int from 0 to {MAX_RETRY}"):
        encode("x", retry=retry)


def test_a_lone_surrogate_in_data_is_refused_as_bytes() -> None:
    frame = encode("\ud800")
    with pytest.raises(UnicodeEncodeError):
        frame.encode()


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(sse).failed == 0
    assert doctest.testmod(sse).attempted > 0
