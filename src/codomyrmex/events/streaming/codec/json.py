"""Values to strict JSON text and back (RFC 8259), with or without the extra ``fast``.

Written: what JSON has (dict, list, tuple, str, int, float, bool, None), datetimes, dates and
times as ISO 8601, UUIDs and Decimals as strings, enums as their value, dataclasses as objects of
their fields. Keys are what `json.dumps` takes: str, and int, float, bool and None as strings.
Refused: everything else; NaN and the infinities, which a browser could not parse; lone
surrogates, which have no UTF-8. A refusal names the path to the value.

orjson writes and msgspec reads, where they are there. Neither ever decides what is accepted:
orjson is only asked for values that are plain JSON already, and what either refuses, or might do
differently, goes the way of the standard library.
"""

import dataclasses
import enum
import json
import math
from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from json.encoder import encode_basestring
from typing import Any, NoReturn
from uuid import UUID

from ..errors import DecodeError, EncodeError, shown

__all__ = ["decode", "encode"]

_TOO_DEEP = "nested too deep, or contains itself"


def _to_json(value: object) -> object:
    """What the encoder writes for a value that is not JSON itself; it is asked again for that."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Decimal):
        if value.is_finite():
            return str(value)
        raise ValueError(f"{value!r} has no JSON form")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _standard_encoder() -> Callable[[object], str]:
    options: dict[str, Any] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "check_circular": False,  # nesting is limited by the recursion limit in any case
        "separators": (",", ":"),
        "default": _to_json,
    }
    encoder = json.JSONEncoder(**options)
    c_make_encoder = getattr(json.encoder, "c_make_encoder", None)
    if c_make_encoder is None:
        return encoder.encode
    # JSONEncoder.encode makes one of these anew at every call, which is half of its time.
    write = c_make_encoder(None, _to_json, encode_basestring, None, ":", ",", False, False, False)

    def encode_standard(value: object) -> str:
        return "".join(write(value, 0))

    return encode_standard


_encode_standard = _standard_encoder()


def _encode_slowly(value: object) -> str:
    """Encode anything that can be encoded, and explain what cannot.

    Raises:
        EncodeError: with the path to the value.
    """
    try:
        text = _encode_standard(value)
        if not text.isascii():
            text.encode()
    except RecursionError:
        raise EncodeError(_TOO_DEEP) from None
    except Exception as error:
        _explain(value, error)
    return text


def _explain(value: object, error: Exception) -> NoReturn:
    """Find the part that cannot be encoded and raise the error that names it."""
    path = "$"
    while True:
        try:
            if not isinstance(value, str | int | float | dict | list | tuple | None):
                value = _to_json(value)
                continue
            parts = _parts(value)
        except Exception as refusal:
            raise EncodeError(str(refusal), path) from refusal
        for step, item in parts:
            if not _encodes(item):
                path += step
                value = item
                break
        else:
            raise EncodeError(_reason(value, error), path) from error


def _parts(value: object) -> list[tuple[str, object]]:
    """The values in a JSON value, each with the step of the path that leads to it.

    Raises:
        TypeError: a key cannot be one.
    """
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str | int | float | None):
                kind = type(key).__name__
                raise TypeError(f"a key is a string or number, not {kind}: {shown(key)}")
            if not _encodes(key):
                raise TypeError(f"a key cannot be encoded: {shown(key)}")
        return [(_step(key), item) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    return []


def _step(key: object) -> str:
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


def _encodes(value: object) -> bool:
    try:
        _encode_standard(value).encode()
    except Exception:
        return False
    return True


def _reason(value: object, error: Exception) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value!r} has no JSON form"
    if isinstance(value, str):
        return f"not valid Unicode: {shown(value)}"
    return str(error)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is out of range")
    return number


_decode_standard = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite).decode


def _decode_slowly(text: str | bytes | bytearray | memoryview) -> Any:
    """Decode anything that can be decoded, and explain what cannot.

    Raises:
        DecodeError: with the reason.
    """
    try:
        if not isinstance(text, str):
            text = str(text, "utf-8")
        elif not text.isascii():
            text.encode()  # a str can hold a lone surrogate
        value = _decode_standard(text)
        if "\\u" in text:
            _encode_standard(value).encode()  # an escape can spell one
    except RecursionError:
        raise DecodeError("not JSON that can be read: nested too deep") from None
    except UnicodeError as error:
        raise DecodeError(f"not JSON: not valid Unicode: {error}") from error
    except ValueError as error:
        raise DecodeError(f"not JSON: {error}") from error
    return value


def _fast_encoder() -> Callable[[Any], str]:
    """`encode` with orjson, which writes what is plain JSON and refuses the rest.

    msgspec would write bytes, sets and more without being asked, and looking for those first
    takes longer than the writing.

    Raises:
        ImportError: it is not installed, or not one that can be trusted with what is nested deeply.
    """
    import orjson  # noqa: PLC0415

    write = orjson.dumps
    nested: tuple[Any, ...] = ()
    for _ in range(300):
        nested = (nested,)
    try:
        write(nested)
    except TypeError:
        pass
    else:
        # 3.12 and 3.13 limit the depth of dicts and lists, but not of tuples: some thousands of
        # them, one in the other, overwrite their memory. Looking for those takes too long.
        raise ImportError("this orjson does not limit the depth of tuples")
    plain_only = (
        orjson.OPT_PASSTHROUGH_DATACLASS
        | orjson.OPT_PASSTHROUGH_DATETIME
        | orjson.OPT_PASSTHROUGH_SUBCLASS
    )

    def encode_fast(value: Any) -> str:
        try:
            text = write(value, None, plain_only).decode()
        except Exception:
            return _encode_slowly(value)
        # A null may be a NaN. A text that has one is written again: looking at every float
        # instead would cost all the others more than that.
        return text if "null" not in text else _encode_slowly(value)

    return encode_fast


def _fast_decoder() -> Callable[[str | bytes | bytearray | memoryview], Any]:
    """`decode` with msgspec, which reads strictly, and integers of any size.

    Raises:
        ImportError: it is not installed.
    """
    import msgspec  # noqa: PLC0415

    read = msgspec.json.Decoder().decode

    def decode_fast(text: str | bytes | bytearray | memoryview) -> Any:
        try:
            return read(text)
        except Exception:
            return _decode_slowly(text)

    return decode_fast


encode: Callable[[Any], str] = _encode_slowly
"""The compact JSON text of a value: one line, no character escaped that need not be.

Raises `EncodeError` when the value, or a part of it, has no JSON form; it says where and why.
"""

decode: Callable[[str | bytes | bytearray | memoryview], Any] = _decode_slowly
"""The value of a JSON text; anything like bytes is UTF-8 without a byte order mark.

Raises `DecodeError` when it is not JSON, NaN and the infinities included, or holds a number or a
nesting that Python cannot.
"""

# Names bound to the function in use, not functions that look it up: this is the hot path.
with suppress(ImportError):
    encode = _fast_encoder()
with suppress(ImportError):
    decode = _fast_decoder()
