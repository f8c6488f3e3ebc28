"""The Mercure protocol (draft-dunglas-mercure-08) at `/.well-known/mercure`.

    GET, QUERY  subscribe: match, match_exact, match_urlpattern (several), last_event_id
    POST        publish: a form of topic (several), data, private, id, type, retry

It is the log of the hub: what is published here is read elsewhere, and the other way round. Text
goes out as it came, JSON as JSON. What the hub says of itself comes with `control=1` only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, quote

from ..errors import EventError, MissingExtra, StreamingError, TopicError
from ..ids import uuid7
from ..log import EARLIEST, LATEST, Record
from ..models import Event, EventType
from ..topics import Exact, UrlPattern
from .authorize import Visitor
from .core import Core
from .feed import Feed, Wanted
from .http import Headers, Refusal, Request
from .limits import Limits
from .publish import OWN_TYPES, RESERVED, has_unseen, is_reserved, store
from .subscribe import EventStream, last_event_id_of

if TYPE_CHECKING:
    from .tokens import Tokens

__all__ = [
    "METADATA_PATH",
    "PATH",
    "MercureStream",
    "challenges",
    "metadata",
    "publish",
    "wanted_by",
]

PATH: Final = RESERVED
METADATA_PATH: Final = f"/.well-known/oauth-protected-resource{PATH}"
_DETAIL: Final = "https://mercure.rocks/authorization-detail"
_FORM: Final = "application/x-www-form-urlencoded"
_MAX_FIELDS: Final = 1100
_MAX_TOPICS: Final = 1000
_MATCHERS: Final = ("match", "match_exact", "match_urlpattern")


# Subscribing.


async def wanted_by(request: Request, limits: Limits) -> Wanted:
    """What a subscriber asks for.

    Raises:
        Refusal: 400 when it cannot be understood; 413, 415 for the body of a QUERY.
    """
    fields = _fields(request.scope["query_string"])
    body: list[tuple[str, str]] = []
    if request.method == "QUERY":
        body = await _form_of(request, limits.event_bytes)
    topics = [_matcher(request, name, value) for name, value in (*fields, *body)]
    wanted = [topic for topic in topics if topic is not None]
    if not wanted:
        raise _wrong("name what to subscribe to: ?match=https://example.com/books/1, or ?match=*")
    after = last_event_id_of(request)
    if after is None:
        after = _single(fields, "last_event_id")
    if after is None:
        after = _single(body, "last_event_id")
    return Wanted.checked(wanted, after or None, None, limits.topics)


def _matcher(request: Request, name: str, value: str) -> Exact | UrlPattern | str | None:
    """What a field selects; None: it is none that does."""
    if name not in _MATCHERS:
        if name == "topic":
            raise _wrong("topic is what one publishes to: subscribe with match")
        if name.casefold().startswith("match"):
            raise _wrong(f"there is no {name!r:.60}: it is one of {', '.join(_MATCHERS)}")
        return None
    _check_characters(name, value)
    if value == "*":
        return "*"
    try:
        if name == "match_urlpattern":
            return UrlPattern(value, _url_of(request))
        return Exact(value)
    except MissingExtra as error:
        raise Refusal(HTTPStatus.NOT_IMPLEMENTED, str(error)) from None
    except TopicError as error:
        raise _wrong(str(error)) from None


class MercureStream(EventStream):
    """One answer to a subscriber.

    Args:
        request: the request.
        core: what is sent.
    """

    def __init__(self, request: Request, core: Core, wanted: Wanted) -> None:
        tells = request.value("control") == "1"
        super().__init__(request, core, core.frames["data"], tells=tells)
        self._is_asked = wanted.after is not None or (
            request.header(b"last-event-id") is not None
            or request.value("last_event_id") is not None
        )

    async def headers(self, feed: Feed) -> Headers:
        """Where it begins, if the subscriber asks for the past."""
        if not self._is_asked:
            return ()
        id_ = await feed.preceding()
        # One that was published in the program may have characters that no header has.
        id_ = id_ if id_.isprintable() or not has_unseen(id_) else EARLIEST
        return [(b"mercure-last-event-id", id_.encode())]


# Publishing.


async def publish(core: Core, request: Request, visitor: Visitor) -> bytes:
    """Publish what a form says; returns what to answer: the event's id.

    Raises:
        Refusal: 400 when it cannot be an event, 403 when the visitor may not publish to all its
            topics, 413 and 415 for the form, 503 when the log does not take it.
    """
    fields = await _form_of(request, core.limits.event_bytes)
    topics = _topics_of(fields, _url_of(request))
    for topic in topics:
        await core.gate.check(visitor, "publish", topic.topic)
    id_, type_ = _single(fields, "id"), _single(fields, "type")
    retry, data = _single(fields, "retry"), _single(fields, "data")
    for name, value in (("id", id_), ("type", type_)):
        _check_characters(name, value or "")
    if type_ in OWN_TYPES:
        raise _wrong(f"events of the type {type_!r} come from the hub itself")
    if id_ is not None and (id_.startswith("#") or id_ == EARLIEST):
        raise _wrong("an id does not begin with #, and is not earliest")
    about: dict[str, Any] = {"content_type": "text/plain"}
    if retry is not None:
        if not retry.isascii() or not retry.isdecimal() or len(retry) > 15:
            raise _wrong("retry is a number of milliseconds")
        about["retry"] = int(retry)
    if not id_ or id_ == LATEST:
        id_ = f"urn:uuid:{uuid7()}"
    is_private = any(name == "private" for name, _ in fields)
    try:
        event = Event(id_, type_ or EventType.MESSAGE, data or "", about)
        record = Record.of(event, topics=topics, private=is_private)
    except (EventError, StreamingError) as error:
        raise _wrong(str(error)) from None
    core.meter.published(core.meter.address_of(request), visitor.subject, 1)
    with core.meter.publishing():
        [stored] = await store(core.log, [record])
    return stored.id.encode()


def _topics_of(fields: list[tuple[str, str]], base: str) -> list[Exact]:
    topics = [value for name, value in fields if name == "topic"]
    if not topics:
        raise _wrong("there is no topic")
    if len(topics) > _MAX_TOPICS:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an event has up to {_MAX_TOPICS} topics"
        )
    for topic in topics:
        _check_characters("topic", topic)
        if topic in ("", "*"):
            raise _wrong(f"{topic!r} is no topic")
        if is_reserved(topic, base):
            raise _wrong(f"{topic!r:.200} is the hub's own")
    return [Exact(topic) for topic in topics]


# Both.


async def _form_of(request: Request, most: int) -> list[tuple[str, str]]:
    content_type = (request.header(b"content-type") or "").partition(";")[0].strip().lower()
    if content_type != _FORM:
        raise Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"the body is {_FORM}")
    return _fields(await request.body(most))


def _fields(text: bytes) -> list[tuple[str, str]]:
    """The fields of a form, or of a query."""
    try:
        return parse_qsl(
            text.decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=_MAX_FIELDS,
        )
    except UnicodeError:
        raise _wrong("the form is not percent-encoded UTF-8") from None
    except ValueError:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {_MAX_FIELDS} fields"
        ) from None


def _single(fields: list[tuple[str, str]], wanted: str) -> str | None:
    values = [value for name, value in fields if name == wanted]
    if len(values) > 1:
        raise _wrong(f"more than one {wanted!r}")
    return values[0] if values else None


def _check_characters(name: str, value: str) -> None:
    """Refuse characters that are not seen: control (Cc) and format (Cf) characters."""
    if not value.isprintable() and has_unseen(value):
        raise _wrong(f"{name} has control characters")


def _url_of(request: Request) -> str:
    """The hub's URL, as the client has it."""
    scheme = {"ws": "http", "wss": "https"}.get(request.scope.get("scheme", "http"))
    scheme = scheme or request.scope.get("scheme", "http")
    root = quote(request.scope.get("root_path", "").rstrip("/"))
    return f"{scheme}://{request.header(b'host')}{root}{PATH}"


def metadata(request: Request, tokens: "Tokens | None") -> dict[str, Any]:
    """What clients may want to know before they have a token (RFC 9728)."""
    told: dict[str, Any] = {
        "resource": _url_of(request) if tokens is None else tokens.audience,
        "authorization_details_types_supported": [_DETAIL],
        "bearer_methods_supported": ["header"],
        "mercure_matcher_types_supported": ["exact", "urlpattern"],
        "mercure_subscriptions": False,
    }
    if tokens is not None:
        told["mercure_cookie"] = tokens.cookie
        if tokens.issuer.startswith("https://"):
            told["authorization_servers"] = [tokens.issuer]
    return told


@contextmanager
def challenges(request: Request) -> Iterator[None]:
    """Have refusals say where the metadata is (RFC 9728), and what is missing (RFC 6750)."""
    try:
        yield
    except Refusal as refusal:
        headers = dict(refusal.headers)
        if refusal.status == HTTPStatus.FORBIDDEN:
            headers[b"www-authenticate"] = b'Bearer error="insufficient_scope"'
        if b"www-authenticate" in headers:
            where = _url_of(request).removesuffix(PATH) + METADATA_PATH
            challenge = headers[b"www-authenticate"]
            comma = b" " if challenge == b"Bearer" else b", "
            headers[b"www-authenticate"] = (
                challenge + comma + b'resource_metadata="' + where.encode() + b'"'
            )
        raise Refusal(refusal.status, refusal.reason, list(headers.items())) from None


def _wrong(reason: str) -> Refusal:
    return Refusal(HTTPStatus.BAD_REQUEST, reason)
