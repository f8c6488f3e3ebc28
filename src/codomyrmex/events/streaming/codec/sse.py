"""Server-Sent Events: frames to text, bytes to frames.

`encode` and `comment` write an event stream, `Decoder` reads one in whatever pieces it arrives.
Neither does any I/O. Both follow the WHATWG HTML standard, section 9.2 "Server-sent events"
(https://html.spec.whatwg.org/multipage/server-sent-events.html); "the standard" below is that
section. What the decoder promises:

- The same bytes give the same frames, however they are cut into chunks.
- Only CR, LF and CRLF end a line; U+0085, U+2028 and the like are ordinary characters.
- A frame is returned by the `feed` that receives its blank line, also when that ends in a CR of
  which nobody can tell yet whether an LF follows.
- Time is linear in the bytes fed. Memory is bounded by the limits on a line and on an event.

The encoder writes what the decoders in use agree about: LF only, no byte order mark, no frame
without data, no `id` that a client would send back altered.
"""

from typing import Final, NamedTuple

from codomyrmex.events.streaming.errors import FrameError

__all__ = [
    "DEFAULT_MAX_EVENT",
    "MAX_RETRY",
    "Decoder",
    "Frame",
    "check_field",
    "comment",
    "encode",
]

DEFAULT_MAX_EVENT: Final = 2 * 1024 * 1024
"""Bytes of data in one event that a `Decoder` accepts unless told otherwise: 2 MiB.

That is a hub's largest event (1 MiB) in an envelope, with room for JSON's escapes.
"""

MAX_RETRY: Final = 2**53 - 1
"""Largest reconnection time, in milliseconds: the largest integer that a JavaScript client holds.

The decoder takes a longer time for this one; the encoder refuses it.
"""

# Bytes cut into lines at a time, so that a chunk of any size costs little memory beyond itself.
_SLICE: Final = 64 * 1024
# How much longer than an event's data a line may be by default: a field name, a colon, a space.
_LINE_OVERHEAD: Final = 1024
_BOM: Final = b"\xef\xbb\xbf"
_FIELDS: Final = frozenset((b"data", b"event", b"id", b"retry"))


class Frame(NamedTuple):
    """One event as it was received, with the attributes of a browser's `MessageEvent`.

    Attributes:
        event: the event's type; `"message"` when the stream named none or an empty one.
        data: the `data` fields of the event, joined by LF; may be empty.
        id: the last event ID in force at this frame, like `MessageEvent.lastEventId`: from this
            frame or from an earlier one, `""` when none was given or the latest was reset.
        retry: milliseconds, when this very frame set the reconnection time, else None.
    """

    event: str = "message"
    data: str = ""
    id: str = ""
    retry: int | None = None


# tuple.__new__ skips the generated constructor: less than half the time of Frame(...).
_new_tuple = tuple.__new__


def encode(
    data: str,
    *,
    event: str | None = None,
    id: str | None = None,  # noqa: A002 - the field's name
    retry: int | None = None,
) -> str:
    r"""Write one frame: the fields given, in the order id, event, retry, data, and a blank line.

    Every line of `data` gets a `data:` line of its own; only CR, LF and CRLF end a line, and all
    three arrive as LF. Whatever else is in it arrives unchanged, leading spaces and a final line
    end included. Empty data gives an empty `data:` line, which readers dispatch as an event with
    empty data. A lone surrogate is not looked for: `str.encode` refuses it when the frame becomes
    bytes.

    Args:
        data: The event's data.
        event: The event's type. None and `""` write no line: the standard reads both as `message`.
        id: The event's id, which the reader keeps as its last event ID. None writes no line, so
            that the reader keeps what it has; `""` resets it.
        retry: The reader's new reconnection time in milliseconds, 0 to `MAX_RETRY`.

    Returns:
        The frame as text; encode it as UTF-8.

    Raises:
        FrameError: `event` or `id` is refused by `check_field`, or `retry` is not an int in range.

    >>> encode('{"n":1}', event="tick", id="7")
    'id: 7\nevent: tick\ndata: {"n":1}\n\n'
    """
    if "\r" in data:
        data = data.replace("\r\n", "\n").replace("\r", "\n")
    if "\n" in data:
        data = data.replace("\n", "\ndata: ")
    if id is not None and event and retry is None:
        # What a hub writes all day: check_field's tests on both at once, one string built.
        both = id + event
        if (
            "\n" in both
            or "\r" in both
            or "\0" in both
            or not both.isascii()
            or id.strip(" \t") != id
        ):
            check_field("id", id)
            check_field("event", event)
        return f"id: {id}\nevent: {event}\ndata: {data}\n\n"
    fields = ""
    if id is not None:
        check_field("id", id)
        fields = f"id: {id}\n"
    if event:
        check_field("event", event)
        fields += f"event: {event}\n"
    if retry is not None:
        if not isinstance(retry, int) or isinstance(retry, bool) or not 0 <= retry <= MAX_RETRY:
            raise FrameError(f"SSE retry must be an int from 0 to {MAX_RETRY}, in milliseconds")
        fields += f"retry: {retry:d}\n"
    return f"{fields}data: {data}\n\n"


def check_field(name: str, value: str) -> None:
    """Refuse a value that could not be an `event` or `id` field, or would arrive altered.

    CR and LF would forge other fields. NUL makes readers ignore an id. Spaces and tabs at the ends
    of an id are lost, to some clients at once and to all of them when they send it back in the
    `Last-Event-ID` header. A lone surrogate has no UTF-8 form.

    Args:
        name: `"event"` or `"id"`; the message begins with it.
        value: What is to stand in that field. An empty one passes.

    Raises:
        FrameError: `value` is refused; the message says why.
    """
    if "\n" in value or "\r" in value or "\0" in value:
        raise FrameError(f"SSE {name} must not contain CR, LF or NUL: {value[:60]!r}")
    if name == "id" and value.strip(" \t") != value:
        raise FrameError(f"SSE id must not begin or end with a space or tab: {value[:60]!r}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise FrameError(
                f"SSE {name} must not contain a lone surrogate: {value[:60]!r}"
            ) from None


def comment(text: str = "") -> str:
    r"""Write a comment, which readers ignore: what keeps an idle connection from being cut.

    There is no blank line after it: it would end an event, and at least one client in use makes
    an empty event of it.

    Args:
        text: The comment; each of its lines (as in `encode`) becomes a line of comment.

    Returns:
        Text that can stand between any two frames.

    >>> comment(), comment("still here")
    (':\n', ': still here\n')
    """
    if not text:
        return ":\n"
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\n: ")
    return f": {text}\n"


class Decoder:
    r"""Reads an event stream that arrives in chunks.

    A frame is made by a blank line that ends at least one `data` field. Other blocks make no
    frame but count: an `id` alone sets `last_event_id`, a `retry` alone sets `retry`. An event
    that the stream's end cuts off is never returned.

    A line or event over its limit stops the decoder. The frames before it are returned as always;
    then, in that `feed` if there were none and else in the next, a `FrameError` is raised, and
    again by every later `feed` until `reset`. `error` tells at once.

    Args:
        last_event_id: The id to begin with, when a reader resumes from one it has kept: frames
            belong to it until the stream sets another. Default none.
        max_event: Most bytes of data in one event, joining LFs included. Default
            `DEFAULT_MAX_EVENT`.
        max_line: Most bytes in one line without its end, of whatever kind (and with the byte order
            mark, on the first). Default `max_event` and 1 KiB for the rest of the line.

    Raises:
        ValueError: A limit is less than 1.

    >>> decoder = Decoder()
    >>> decoder.feed(b"id: 7\nevent: tick\nda")
    []
    >>> decoder.feed(b"ta: 1\n\n")
    [Frame(event='tick', data='1', id='7', retry=None)]
    """

    __slots__ = (
        "_after_cr",
        "_at_start",
        "_data",
        "_error",
        "_event",
        "_event_retry",
        "_id",
        "_last_event_id",
        "_max_event",
        "_max_line",
        "_pending",
        "_retry",
        "_slice",
    )

    _after_cr: bool  # the bytes so far end in a CR: an LF that comes next belongs to it
    _at_start: bool  # no line is complete yet: the first may begin with a byte order mark
    _data: bytes | bytearray | None  # the block's data, a bytearray from its second line on
    _event: str  # the standard's event type buffer
    _event_retry: int | None  # the retry field of this block
    _id: str  # the standard's last event ID buffer
    _pending: bytearray  # the line that is not complete
    _error: FrameError | None

    def __init__(
        self,
        *,
        last_event_id: str = "",
        max_event: int = DEFAULT_MAX_EVENT,
        max_line: int | None = None,
    ) -> None:
        if max_line is None:
            max_line = max_event + _LINE_OVERHEAD
        if max_event < 1 or max_line < 1:
            raise ValueError(f"limits must be at least 1 byte: {max_event=}, {max_line=}")
        self._max_event = max_event
        self._max_line = max_line
        # No line that lies within one slice can be too long: only those in two or more are checked.
        self._slice = min(_SLICE, max_line)
        self._last_event_id = last_event_id
        self._retry: int | None = None
        self.reset()

    @property
    def last_event_id(self) -> str:
        """The id to resume from: of the last complete block that gave one, with or without data.

        It is `""` when there was none or when the latest was empty. Send it back as the
        `Last-Event-ID` header, if it is not empty. In the standard it is the event source's "last
        event ID string".
        """
        return self._last_event_id

    @property
    def retry(self) -> int | None:
        """The reconnection time in milliseconds, as the stream set it last; None when it did not.

        A `retry` line counts as soon as it is complete, and is ignored unless it is all ASCII
        digits. Never more than `MAX_RETRY`.
        """
        return self._retry

    @property
    def error(self) -> FrameError | None:
        """The error that stopped this decoder, if any: the next `feed` raises it."""
        return self._error

    def reset(self) -> None:
        """Begin a new stream: forget an unfinished event, an unfinished line and an error.

        `last_event_id` and `retry` stay: they belong to the reader, not to the connection. (By the
        letter of the standard an id that was received before a reconnection is not given to the
        frames after it; Chromium and Firefox do give it, and so does this.)
        """
        self._after_cr = False
        self._at_start = True
        self._pending = bytearray()
        self._clear_block()
        self._error = None

    def feed(self, data: bytes | bytearray | memoryview) -> list[Frame]:
        """Take the next bytes of the stream and return the frames that they complete, in order.

        Args:
            data: Any number of bytes, cut anywhere. They are not kept.

        Raises:
            FrameError: A line or an event is over its limit, here or in what was fed before.
        """
        if self._error is not None:
            raise self._error.with_traceback(None)
        frames: list[Frame] = []
        step = self._slice
        try:
            for start in range(0, len(data), step):
                self._split(bytes(data[start : start + step]), frames)
        except FrameError as error:
            self._error = error
            self._pending = bytearray()
            self._clear_block()
            if not frames:
                raise
        return frames

    def _clear_block(self) -> None:
        self._data = None
        self._event = ""
        self._event_retry = None
        self._id = self._last_event_id

    def _split(self, part: bytes, frames: list[Frame]) -> None:
        """Cut `part` into lines, interpret the complete ones and keep the rest."""
        if self._after_cr and part.startswith(b"\n"):
            part = part[1:]
        self._after_cr = part.endswith(b"\r")
        lines = part.splitlines()  # unlike str.splitlines: at CR, LF and CRLF only
        rest = lines.pop() if lines and not part.endswith((b"\n", b"\r")) else b""
        if lines:
            if self._pending:
                self._pending += lines[0]
                self._check_line()
                lines[0] = bytes(self._pending)
                self._pending.clear()
            if self._at_start:
                self._at_start = False
                lines[0] = lines[0].removeprefix(_BOM)
            self._interpret(lines, frames)
        self._pending += rest
        self._check_line()

    def _check_line(self) -> None:
        if len(self._pending) > self._max_line:
            raise FrameError(f"a line of the event stream is longer than {self._max_line} bytes")

    def _interpret(self, lines: list[bytes], frames: list[Frame]) -> None:
        """Do what the standard's "Interpreting an event stream" says for each line.

        Lines are bytes until here, and values are decoded one by one: no UTF-8 sequence contains
        CR or LF, and an invalid one ends before them, so that this gives what decoding the whole
        stream would.
        """
        data, event, retry, id_ = self._data, self._event, self._event_retry, self._id
        max_event = self._max_event
        for line in lines:
            if not line:
                self._last_event_id = id_
                if data is not None:
                    text = data.decode("utf-8", "replace")
                    frames.append(_new_tuple(Frame, (event or "message", text, id_, retry)))
                    data = None
                event = ""
                retry = None
                continue
            # The name ends at the first colon, and one space after that is not in the value. Most
            # lines have it; where the first b": " is not at the first colon, the name is unknown.
            name, _, value = line.partition(b": ")
            if name not in _FIELDS:
                name, _, value = line.partition(b":")
            if name == b"data":
                if data is None:
                    data = value
                else:
                    if isinstance(data, bytes):
                        data = bytearray(data)
                    data += b"\n"
                    data += value
                if len(data) > max_event:
                    raise FrameError(f"the data of an event is longer than {max_event} bytes")
            elif name == b"event":
                event = value.decode("utf-8", "replace")
            elif name == b"id":
                if b"\0" not in value:
                    id_ = value.decode("utf-8", "replace")
            elif name == b"retry" and value.isdigit():
                retry = self._retry = _milliseconds(value)
        self._data, self._event, self._event_retry, self._id = data, event, retry, id_


def _milliseconds(digits: bytes) -> int:
    """Return what ASCII digits say, up to `MAX_RETRY`, without `int`'s cost for very many."""
    digits = digits.lstrip(b"0")
    if len(digits) > len(str(MAX_RETRY)):
        return MAX_RETRY
    return min(int(digits or b"0"), MAX_RETRY)
