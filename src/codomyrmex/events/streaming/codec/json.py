"""Values to strict JSON text and back (RFC 8259), with or without the extra ``fast``.

Written: what JSON has (dict, list, tuple, str, int, float, bool, None), datetimes, dates and
times as ISO 8601, UUIDs and Decimals as strings, enums as their value, dataclasses as objects of
their fields. Keys are what `json.dumps` takes: str, and int, float, bool and None as strings.
Refused: everything else; NaN and the infinities, which a browser could not parse; lone
surrogates, which have no UTF-8. A refusal names the path to the value.

msgspec, when it is there, takes over the values that are plain JSON already. It never decides
what is accepted: whatever it would write differently goes the way of the standard library.
"""

import dataclasses
import enum
import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from json.encoder import encode_basestring
from typing import Any, NoReturn
from uuid import UUID

from ..errors import DecodeError, EncodeError

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
        children: Iterable[tuple[str, object]] = ()
        if not isinstance(value, str | int | float | dict | list | tuple | None):
            try:
                value = _to_json(value)
            except Exception as refusal:
                raise EncodeError(str(refusal), path) from refusal
            continue
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str | int | float | None):
                    reason = f"a key is a string or number, not {type(key).__name__}"
                    raise EncodeError(f"{reason}: {key!r}", path)
                if not _encodes(key):
                    raise EncodeError(f"a key cannot be encoded: {key!r}", path)
            children = ((_step(key), item) for key, item in value.items())
        elif isinstance(value, list | tuple):
            children = ((f"[{index}]", item) for index, item in enumerate(value))
        for step, item in children:
            if not _encodes(item):
                path += step
                value = item
                break
        else:
            raise EncodeError(_reason(value, error), path) from error


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
        return f"not valid Unicode: {value!r}"
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


def _fast() -> tuple[Callable[[Any], str], Callable[[str | bytes | bytearray | memoryview], Any]]:
    """`encode` and `decode` with msgspec.

    Raises:
        ImportError: it is not installed.
    """
    import msgspec  # noqa: PLC0415

    write = msgspec.json.Encoder().encode
    read = msgspec.json.Decoder().decode
    scalars = frozenset({str, int, float, bool, type(None)})

    def is_plain(value: Any) -> bool:
        """Whether a value is made of JSON's own types alone, all the way down."""
        kind = type(value)
        if kind is dict:
            for key, item in value.items():
                if type(key) is not str or (type(item) not in scalars and not is_plain(item)):
                    return False
            return True
        if kind is list or kind is tuple:
            for item in value:  # noqa: SIM110  (a generator would cost more than the rest)
                if type(item) not in scalars and not is_plain(item):
                    return False
            return True
        return kind in scalars

    def encode_fast(value: Any) -> str:
        try:
            # An object of scalars, the most frequent value, is looked at here and not in a call.
            if type(value) is dict:
                for key, item in value.items():
                    if type(item) not in scalars or type(key) is not str:
                        if is_plain(value):
                            break
                        return _encode_slowly(value)
            elif not is_plain(value):
                return _encode_slowly(value)
            text: str = write(value).decode()
        except Exception:
            return _encode_slowly(value)
        # msgspec writes null for NaN, so a text with a null is written again. Looking at every
        # float instead would cost all the others more than that.
        return text if "null" not in text else _encode_slowly(value)

    def decode_fast(text: str | bytes | bytearray | memoryview) -> Any:
        try:
            return read(text)
        except Exception:
            return _decode_slowly(text)

    return encode_fast, decode_fast


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
    encode, decode = _fast()
