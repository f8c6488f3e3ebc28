"""Where the keys are that access tokens are checked with, and how they change while a hub runs."""

import asyncio
import json
import logging
import os
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

__all__ = ["Key", "Keys", "keys_of"]

logger = logging.getLogger(__name__)

_FRESH: Final = 300.0
"""Seconds for which keys of a URL are good."""

_PAUSE: Final = 10.0
"""Seconds between two questions to a URL."""

_LOOK: Final = 1.0
"""Seconds between two looks at a file."""

_MOST_BYTES: Final = 1 << 20
_SHORTEST_SECRET: Final = 32
_SMALLEST_RSA: Final = 2048


class Key(NamedTuple):
    """A key, and the one algorithm that it is for: another would be a confusion.

    Attributes:
        id: its ``kid``; None: it has none.
        algorithm: ``HS256``, ``RS256``, ``ES256`` or ``EdDSA``.
        value: what `jwt.decode` takes.
    """

    id: str | None
    algorithm: str
    value: Any


def keys_of(text: str, *, is_secret: bool = True) -> list[Key]:
    """The keys in a text: PEM, a JWK or a set of them (RFC 7517), or a secret.

    Args:
        is_secret: whether nobody else sees the text, so that it may hold secrets.

    Raises:
        ValueError: it has none that can be used; says why, without the text.
    """
    stripped = text.strip()
    if stripped.startswith("{"):
        return _keys_of_json(stripped, is_secret=is_secret)
    if "-----BEGIN " in stripped:
        blocks = stripped.split("-----BEGIN ")[1:]
        return [_key_of_pem(f"-----BEGIN {block}") for block in blocks]
    if not is_secret:
        raise ValueError("it has no JSON Web Keys")
    if len(stripped.encode()) < _SHORTEST_SECRET:
        raise ValueError(f"a secret has at least {_SHORTEST_SECRET} bytes (RFC 7518, 3.2)")
    return [Key(None, "HS256", stripped.encode())]


def _key_of_pem(text: str) -> Key:
    data = text.encode()
    try:
        if "PRIVATE KEY-----" in text:
            public: Any = load_pem_private_key(data, None).public_key()
        else:
            public = load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError("a PEM key of it cannot be read") from error
    return Key(None, _algorithm_of(public), public)


def _algorithm_of(public: Any) -> str:
    if isinstance(public, RSAPublicKey):
        if public.key_size < _SMALLEST_RSA:
            raise ValueError(f"an RSA key has at least {_SMALLEST_RSA} bits (RFC 7518, 3.3)")
        return "RS256"
    if isinstance(public, EllipticCurvePublicKey) and isinstance(public.curve, SECP256R1):
        return "ES256"
    if isinstance(public, Ed25519PublicKey):
        return "EdDSA"
    raise ValueError("keys are RSA, P-256 or Ed25519")


def _keys_of_json(text: str, *, is_secret: bool) -> list[Key]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError("it is neither JSON Web Keys nor a secret") from error
    found: list[Key] = []
    for each in value.get("keys", [value]):
        if not isinstance(each, dict) or each.get("use", "sig") != "sig":
            continue
        try:
            found.append(_key_of_jwk(each, is_secret=is_secret))
        except (ValueError, jwt.PyJWTError) as error:
            logger.warning("a key is left out: %s", error)
    if not found:
        raise ValueError("it has no key that can be used")
    return found


def _key_of_jwk(value: dict[str, Any], *, is_secret: bool) -> Key:
    kid = value.get("kid")
    if value.get("kty") == "oct":
        if not is_secret:
            raise ValueError("a secret that everybody can read")
        secret = jwt.PyJWK(value, "HS256").key
        if len(secret) < _SHORTEST_SECRET:
            raise ValueError(f"a secret has at least {_SHORTEST_SECRET} bytes (RFC 7518, 3.2)")
        key = Key(kid, "HS256", secret)
    else:
        public = jwt.PyJWK(
            value, value.get("alg") or _ALGORITHMS.get(value.get("crv", ""), "RS256")
        ).key
        public = public.public_key() if hasattr(public, "public_key") else public
        key = Key(kid, _algorithm_of(public), public)
    if value.get("alg", key.algorithm) != key.algorithm:
        raise ValueError(f"it is not for {key.algorithm}")
    return key


_ALGORITHMS: Final = {"P-256": "ES256", "Ed25519": "EdDSA"}


class Keys:
    """Keys from where they are kept.

    Args:
        source: the keys themselves as `keys_of` takes them, or where they are: ``env:NAME``,
            ``file:PATH``, or the URL of a JSON Web Key Set. A file is read again within a
            second after it has changed, a URL every five minutes, and when a token names a key
            that is not known.

    Raises:
        ValueError: there are none that can be used; says where.
    """

    def __init__(self, source: str) -> None:
        kind, _, rest = source.partition(":")
        self._url = source if kind in ("https", "http") else None
        self._path = Path(rest) if kind == "file" else None
        self._name = rest if kind == "env" else None
        self._source = source
        self._stamp: tuple[int, int, int] | None = None
        self._found: list[Key] = []
        self._asked = float("-inf")
        self._asking: asyncio.Task[None] | None = None
        if self._url is not None:
            parts = urlsplit(source)
            if kind == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
                raise ValueError(f"keys are read over https, not from {source!r:.200}")
        else:
            self.reload()

    def reload(self) -> None:
        """Read them again.

        Raises:
            ValueError: there are none that can be used; those that were there stay.
        """
        if self._url is not None:
            self._asked = float("-inf")
            return
        try:
            self._found = keys_of(self._read())
        except (OSError, ValueError, KeyError) as error:
            where = "the keys given" if self._where is None else self._where
            reason = f"{error} is not set" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{where}: {reason}") from None

    @property
    def _where(self) -> str | None:
        return None if self._path is None and self._name is None else self._source

    def _read(self) -> str:
        if self._path is not None:
            self._stamp = self._stamp_of(self._path)
            return self._path.read_text()
        return self._source if self._name is None else os.environ[self._name]

    @staticmethod
    def _stamp_of(path: Path) -> tuple[int, int, int]:
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size

    async def find(self, kid: str | None, algorithm: str) -> list[Key]:
        """The keys that a token may have been signed with."""
        if self._url is not None:
            age = time.monotonic() - self._asked
            is_unknown = kid is not None and all(key.id != kid for key in self._found)
            if age > _FRESH or (age > _PAUSE and (is_unknown or not self._found)):
                await self._ask()
        elif self._path is not None and time.monotonic() - self._asked >= _LOOK:
            self._asked = time.monotonic()
            await asyncio.to_thread(self._look)
        return [
            key
            for key in self._found
            if key.algorithm == algorithm and (kid is None or key.id in (None, kid))
        ]

    def _look(self) -> None:
        """Read the file again if it has changed. One that is damaged changes nothing."""
        assert self._path is not None
        try:
            if self._stamp_of(self._path) != self._stamp:
                self.reload()
        except (OSError, ValueError):
            logger.exception("the keys that are known are used on")

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        asking = self._asking
        if asking is None or asking.done() or asking.get_loop() is not loop:
            asking = self._asking = loop.create_task(self._fetch())
        await asyncio.shield(asking)

    async def _fetch(self) -> None:
        self._asked = time.monotonic()
        assert self._url is not None
        try:
            text = await asyncio.to_thread(_get, self._url)
            self._found = keys_of(text, is_secret=False)
        except (OSError, ValueError, TypeError, AttributeError, HTTPException):
            logger.exception("%s cannot be read; the keys that are known are used on", self._url)


def _get(url: str) -> str:
    request = urllib.request.Request(url, headers={"accept": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        data: bytes = answer.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError("the answer is too large")
    return data.decode()
