"""The live page's files, read with this module and served from memory.

Only what was read can be asked for, by its name: no path of a request reaches the file system.
"""

import hashlib
from importlib.resources import files
from typing import Final, NamedTuple

from .http import Headers, Request

__all__ = ["ASSETS", "INDEX", "Asset"]

INDEX: Final = "index.html"
_TYPES: Final = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
# Nothing from elsewhere, nothing inline, nobody's frame.
_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';"
    b" base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Asset(NamedTuple):
    """One file of the page."""

    body: bytes
    content_type: bytes
    etag: bytes

    def headers(self) -> Headers:
        """Return the headers of an answer with this file, but for its length."""
        return [
            (b"content-type", self.content_type),
            (b"etag", self.etag),
            (b"cache-control", b"no-cache"),
            (b"content-security-policy", _POLICY),
            (b"referrer-policy", b"no-referrer"),
        ]

    def is_current(self, request: Request) -> bool:
        """Whether the client has this very file already (RFC 9110, section 13.1.2)."""
        known = request.header(b"if-none-match")
        if known is None:
            return False
        tags = {tag.strip().removeprefix("W/") for tag in known.split(",")}
        return "*" in tags or self.etag.decode() in tags


def _load() -> dict[str, Asset]:
    assets: dict[str, Asset] = {}
    for file in (files("codomyrmex.events.streaming.hub") / "page").iterdir():
        content_type = _TYPES.get(file.name[file.name.rfind(".") :])
        if content_type is not None:
            body = file.read_bytes()
            etag = b'"%s"' % hashlib.sha256(body).hexdigest()[:32].encode()
            assets[file.name] = Asset(body, content_type, etag)
    return assets


ASSETS: Final = _load()
"""The page's files by their names."""
