"""Who may do what: the hub's one place to ask.

A *visitor* is whoever is at the other end of a request: a subject with a name, or an anonymous one.
What it may do is up to its access token and to a function of the application; where there are both,
both have to allow it. Public events are for whoever is let in; a
private event is for who may subscribe to one of its topics. The function is asked about topics
that there are, never about patterns, and what it says is remembered for a minute.
"""

import asyncio
import inspect
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

from ..log import Record
from ..topics import Selection, TopicFilter
from .http import Refusal, Request, Scope

if TYPE_CHECKING:
    from .tokens import Token, Tokens

__all__ = ["TICKET_SECONDS", "Action", "Authorize", "Gate", "Identify", "Visitor", "everyone"]

logger = logging.getLogger(__name__)

Action: TypeAlias = Literal["subscribe", "publish"]

Authorize: TypeAlias = Callable[[str | None, Action, str], bool | Awaitable[bool]]
"""Whether a subject (None: an anonymous visitor) may do something with a topic."""

Identify: TypeAlias = Callable[[Scope], str | Awaitable[str | None] | None]
"""The subject behind an ASGI scope, such as the user of the application's session; None: nobody."""

_REMEMBERED: Final = 60.0
"""Seconds for which an answer is good."""

TICKET_SECONDS: Final = 30.0
"""Seconds in which a ticket has to be used."""

_MOST_TICKETS: Final = 10_000
_MOST_REMEMBERED: Final = 100_000
_ASKED_ANEW: Final = 5
"""How often it is asked again what is forgotten each time before there is an answer."""

_PATIENCE: Final = 10.0
"""Seconds in which an application has to answer."""


def everyone(subject: str | None, action: Action, topic: str) -> bool:
    """Whoever reaches the hub may read and publish everything: for `Hub(authorize=everyone)`."""
    return True


class InvalidToken(Exception):
    """A token that is not accepted; says why."""


class Visitor(NamedTuple):
    """Who is at the other end.

    Attributes:
        subject: its name; None: it is anonymous.
        token: the access token that it came with.
    """

    subject: str | None = None
    token: "Token | None" = None


class _Answer(NamedTuple):
    """What the application says, or is about to."""

    task: "asyncio.Task[bool]"
    until: float


class Gate:
    """Lets visitors in, and says what they may do.

    Args:
        tokens: the access tokens that are accepted; None: none are.
        authorize: what the application says of a subject, an action and a topic; None: nobody may
            do anything with private events, or publish.
        identify: who is behind a request; None: everyone is anonymous.
        anonymous: whether those may come in who have no name, to read public events; None: if there
            is an `authorize` that can be asked about them.
        public: topics whose events are public, unless it is said of one that it is private.

    Raises:
        TopicError: `public` cannot be a topic filter.
    """

    def __init__(
        self,
        authorize: Authorize | None = None,
        tokens: "Tokens | None" = None,
        identify: Identify | None = None,
        anonymous: bool | None = None,
        public: TopicFilter = (),
    ) -> None:
        self._public = Selection(public) if public else None
        self._authorize = authorize
        self._tokens = tokens
        self._identify = identify
        if anonymous is None:
            anonymous = authorize is not None and tokens is None and identify is None
        self._lets_anonymous_in = anonymous
        self._tickets = _Tickets()
        self._revoked: dict[str, float] = {}
        self._answers: dict[tuple[str | None, Action, str], _Answer] = {}

    @property
    def is_open(self) -> bool:
        """Whether everyone may do everything, so that there is nothing to ask."""
        return self._authorize is everyone and self._tokens is None

    @property
    def tokens(self) -> "Tokens | None":
        """The access tokens that are accepted."""
        return self._tokens

    def is_public(self, topic: str) -> bool:
        """Whether the events of a topic are public unless it is said of one that it is not."""
        return self._public is not None and self._public.matches((topic,))

    async def admit(self, request: Request) -> Visitor:
        """Who asks for this.

        A token comes in the header ``Authorization`` or in a cookie (RFC 6750; the header counts),
        a ticket in the query.

        Raises:
            Refusal: 400, 401 or 403: this one is not let in.
        """
        if (ticket := request.value("ticket")) is not None:
            return self.check_valid(self._tickets.use(ticket))
        if self._tokens is not None:
            token = await self._token_of(request, self._tokens)
            if token is not None:
                return self.check_valid(Visitor(token.subject, token))
        subject = None
        if self._identify is not None:
            try:
                async with asyncio.timeout(_PATIENCE):
                    subject = await _answer_of(self._identify(request.scope))
                if not isinstance(subject, str | None):
                    raise TypeError(f"a subject is a str, not {type(subject).__name__}")
            except Exception:
                subject = None
                logger.exception("identify failed; nobody is let in by it")
        if subject is None and not self._lets_anonymous_in:
            reason = "this hub wants to know who you are"
            if self._authorize is None and self._identify is None and self._tokens is None:
                reason = "this hub lets nobody in: give it authorize=, tokens= or anonymous=True"
            raise Refusal(HTTPStatus.UNAUTHORIZED, reason, [(b"www-authenticate", b"Bearer")])
        return Visitor(subject)

    async def _token_of(self, request: Request, tokens: "Tokens") -> "Token | None":
        """The token that a request comes with; None: there is none.

        Raises:
            Refusal: 400, 401 or 403.
        """
        text = _bearer_of(request)
        if text is None:
            text = _cookie_of(request, tokens.cookie)
            if text is not None and request.method not in ("GET", "HEAD"):
                _check_same_site(request)
        return None if text is None else await self.check_token(text)

    async def check_token(self, text: str) -> "Token":
        """The token that a text is.

        Raises:
            Refusal: 400: none are taken here; 401: it is not accepted.
        """
        if self._tokens is None:
            raise Refusal(HTTPStatus.BAD_REQUEST, "this hub takes no tokens")
        try:
            return await self._tokens.check(text)
        except InvalidToken as error:
            raise _invalid(str(error)) from None

    def check_valid(self, visitor: Visitor) -> Visitor:
        """Refuse a token that has expired, or was made before its subject was revoked.

        Raises:
            Refusal: 401.
        """
        token = visitor.token
        if token is not None and token.expires <= time.time():
            raise _invalid("the token has expired")
        revoked = self._revoked.get(visitor.subject or "")
        if revoked is not None and token is not None and (token.issued or 0.0) <= revoked:
            raise _invalid("it has been revoked")
        return visitor

    def renewed(self, visitor: Visitor, token: "Token") -> Visitor:
        """The visitor with another token of the same subject.

        Raises:
            Refusal: 403: it is another's; 401: it has been revoked.
        """
        if token.subject != visitor.subject:
            raise Refusal(HTTPStatus.FORBIDDEN, "the token is another subject's")
        return self.check_valid(Visitor(token.subject, token))

    def make_ticket(self, visitor: Visitor) -> str:
        """A ticket by which a visitor comes in once, in the next seconds.

        Raises:
            Refusal: 403: it needs none; 503: there are too many that have not been used.
        """
        if visitor.subject is None and visitor.token is None:
            raise Refusal(HTTPStatus.FORBIDDEN, "a ticket is for who has a name or a token")
        return self._tickets.make(visitor)

    async def may(self, visitor: Visitor, action: Action, topic: str) -> bool:
        """Whether a visitor may do something with a topic."""
        if self.is_open:
            return True
        if self._tokens is not None:
            if visitor.token is None or not visitor.token.allows(action, topic):
                return False
            if self._authorize is None:
                return True
        if self._authorize is None:
            return False
        key = (visitor.subject, action, topic)
        for _ in range(_ASKED_ANEW):
            answer = self._answer(key)
            try:
                # Whoever waits here may be called off; others wait for the same.
                verdict = await asyncio.shield(answer.task)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if answer.task.cancelled() and not (task and task.cancelling()):
                    return False  # the hub closes
                raise
            if self._answers.get(key) is answer:
                return verdict
            # It has been forgotten meanwhile: what was said may not be so any more.
        return False

    def _answer(self, key: tuple[str | None, Action, str]) -> _Answer:
        answer = self._answers.get(key)
        loop = asyncio.get_running_loop()
        if answer is None or answer.until <= loop.time() or answer.task.get_loop() is not loop:
            if len(self._answers) >= _MOST_REMEMBERED:
                del self._answers[next(iter(self._answers))]
            task = loop.create_task(self._ask(*key))
            self._answers.pop(key, None)
            answer = self._answers[key] = _Answer(task, loop.time() + _REMEMBERED)
        return answer

    async def _ask(self, subject: str | None, action: Action, topic: str) -> bool:
        assert self._authorize is not None
        try:
            async with asyncio.timeout(_PATIENCE):
                said: Any = await _answer_of(self._authorize(subject, action, topic))
        except Exception:
            logger.exception("authorize failed for %r, %s, %r: denied", subject, action, topic)
            return False
        return said is True

    async def check(self, visitor: Visitor, action: Action, topic: str) -> None:
        """Raise unless a visitor may do something with a topic.

        Raises:
            Refusal: 403.
        """
        if not await self.may(visitor, action, topic):
            raise Refusal(HTTPStatus.FORBIDDEN, f"you may not {_VERBS[action]} {topic!r:.200}")

    async def check_readable(self, visitor: Visitor, selection: Selection) -> None:
        """Raise if a visitor asks for nothing but topics that it may not read.

        Of a pattern nothing can be said beforehand.

        Raises:
            Refusal: 403.
        """
        if self.is_open or not selection.is_exact:
            return
        for topic in selection.exact:
            if self.is_public(topic) or await self.may(visitor, "subscribe", topic):
                return
        raise Refusal(HTTPStatus.FORBIDDEN, f"you may not read {', '.join(selection.exact)!r:.200}")

    async def readable(self, visitor: Visitor, records: Sequence[Record]) -> list[Record]:
        """Those of the records that a visitor may read, in their order."""
        if self.is_open:
            return list(records)
        return [
            record
            for record in records
            if not record.private or await self._may_read(visitor, record)
        ]

    async def _may_read(self, visitor: Visitor, record: Record) -> bool:
        for topic in record.topics:
            if await self.may(visitor, "subscribe", topic):
                return True
        return False

    async def aclose(self) -> None:
        """Ask no more."""
        tasks = [answer.task for answer in self._answers.values() if not answer.task.done()]
        self._answers.clear()
        loop = asyncio.get_running_loop()
        tasks = [task for task in tasks if task.get_loop() is loop]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def forget(self) -> None:
        """Ask anew about everyone."""
        self._answers.clear()

    def revoke(self, subject: str) -> None:
        """Ask anew about a subject, and accept no token of it that was made until now."""
        for key in [key for key in self._answers if key[0] == subject]:
            del self._answers[key]
        if self._tokens is not None:
            self._revoked.pop(subject, None)
            self._revoked[subject] = time.time()
            if len(self._revoked) > _MOST_REMEMBERED:
                del self._revoked[next(iter(self._revoked))]


_VERBS: Final = {"subscribe": "read", "publish": "publish to"}


async def _answer_of(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer


class _Tickets:
    """Who may come in once, for those that cannot send headers: a browser's EventSource."""

    def __init__(self) -> None:
        self._visitors: dict[str, tuple[Visitor, float]] = {}

    def make(self, visitor: Visitor) -> str:
        now = time.monotonic()
        while self._visitors:
            oldest = next(iter(self._visitors))
            if self._visitors[oldest][1] > now:
                break
            del self._visitors[oldest]
        if len(self._visitors) >= _MOST_TICKETS:
            raise Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many tickets", [(b"retry-after", b"30")]
            )
        ticket = secrets.token_urlsafe(24)
        self._visitors[ticket] = visitor, now + TICKET_SECONDS
        return ticket

    def use(self, ticket: str) -> Visitor:
        visitor, until = self._visitors.pop(ticket, (None, 0.0))
        if visitor is None or until <= time.monotonic():
            raise _invalid("the ticket is not known, has been used, or is too old")
        return visitor


def _invalid(reason: str) -> Refusal:
    """The answer to a token or ticket that is not accepted (RFC 6750, section 3)."""
    shown = "".join(each if " " <= each <= "~" and each not in '"\\' else "?" for each in reason)
    challenge = f'Bearer error="invalid_token", error_description="{shown:.200}"'
    return Refusal(
        HTTPStatus.UNAUTHORIZED, reason, [(b"www-authenticate", challenge.encode("ascii"))]
    )


def _bearer_of(request: Request) -> str | None:
    """The token in the header; None: there is none.

    Raises:
        Refusal: 400: there is a header, but no token in it.
    """
    header = request.header(b"authorization")
    scheme, _, token = (header or "").partition(" ")
    if scheme.lower() != "bearer":
        return None
    token = token.strip(" ")
    if not token or any(character.isspace() for character in token):
        challenge = b'Bearer error="invalid_request"'
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            "the Authorization header has no token",
            [(b"www-authenticate", challenge)],
        )
    return token


def _cookie_of(request: Request, name: str) -> str | None:
    # HTTP/2 may cut the header at each cookie (RFC 9113, 8.2.3).
    lines = [value for key, value in request.scope["headers"] if key == b"cookie"]
    for pair in b"; ".join(lines).decode("latin-1").split(";"):
        key, _, value = pair.partition("=")
        if key.strip() == name:
            return value.strip().strip('"')
    return None


def _check_same_site(request: Request) -> None:
    """Refuse what a page of another site may have sent with a visitor's cookie.

    A browser says in `Origin` whose page it is, which has been checked where it is there.

    Raises:
        Refusal: 403.
    """
    if request.header(b"origin") is None:
        raise Refusal(
            HTTPStatus.FORBIDDEN,
            "with a cookie, a page has to say whose it is: no Origin header",
        )
