"""Who may do what: the hub's one place to ask.

A *visitor* is whoever is at the other end of a request: a subject with a name, or an anonymous one.
What it may do is up to a function of the application. Public events are for whoever is let in; a
private event is for who may subscribe to one of its topics. The function is asked about topics
that there are, never about patterns, and what it says is remembered for a minute.
"""

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from ..log import Record
from ..topics import Selection, TopicFilter
from .http import Refusal, Request, Scope

__all__ = ["Action", "Authorize", "Gate", "Identify", "Visitor", "everyone"]

logger = logging.getLogger(__name__)

Action: TypeAlias = Literal["subscribe", "publish"]

Authorize: TypeAlias = Callable[[str | None, Action, str], bool | Awaitable[bool]]
"""Whether a subject (None: an anonymous visitor) may do something with a topic."""

Identify: TypeAlias = Callable[[Scope], str | Awaitable[str | None] | None]
"""The subject behind an ASGI scope, such as the user of the application's session; None: nobody."""

_REMEMBERED: Final = 60.0
"""Seconds for which an answer is good."""

_MOST_REMEMBERED: Final = 100_000
_PATIENCE: Final = 10.0
"""Seconds in which an application has to answer."""


def everyone(subject: str | None, action: Action, topic: str) -> bool:
    """Whoever reaches the hub may read and publish everything: for `Hub(authorize=everyone)`."""
    return True


class Visitor(NamedTuple):
    """Who is at the other end.

    Attributes:
        subject: its name; None: it is anonymous.
    """

    subject: str | None = None


class _Answer(NamedTuple):
    """What the application says, or is about to."""

    task: "asyncio.Task[bool]"
    until: float


class Gate:
    """Lets visitors in, and says what they may do.

    Args:
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
        identify: Identify | None = None,
        anonymous: bool | None = None,
        public: TopicFilter = (),
    ) -> None:
        self._public = Selection(public) if public else None
        self._authorize = authorize
        self._identify = identify
        if anonymous is None:
            anonymous = authorize is not None and identify is None
        self._lets_anonymous_in = anonymous
        self._answers: dict[tuple[str | None, Action, str], _Answer] = {}

    @property
    def is_open(self) -> bool:
        """Whether everyone may do everything, so that there is nothing to ask."""
        return self._authorize is everyone

    def is_public(self, topic: str) -> bool:
        """Whether the events of a topic are public unless it is said of one that it is not."""
        return self._public is not None and self._public.matches((topic,))

    async def admit(self, request: Request) -> Visitor:
        """Who asks for this.

        Raises:
            Refusal: 401: this one is not let in.
        """
        subject = None
        if self._identify is not None:
            try:
                subject = await _answer_of(self._identify(request.scope))
            except Exception:
                logger.exception("identify failed; nobody is let in by it")
        if subject is None and not self._lets_anonymous_in:
            reason = "this hub wants to know who you are"
            if self._authorize is None and self._identify is None:
                reason = "this hub lets nobody in: give it authorize=, or anonymous=True"
            raise Refusal(HTTPStatus.UNAUTHORIZED, reason, [(b"www-authenticate", b"Bearer")])
        return Visitor(subject)

    async def may(self, visitor: Visitor, action: Action, topic: str) -> bool:
        """Whether a visitor may do something with a topic."""
        if self._authorize is None:
            return False
        if self.is_open:
            return True
        key = (visitor.subject, action, topic)
        answer = self._answers.get(key)
        loop = asyncio.get_running_loop()
        if answer is None or answer.until <= loop.time() or answer.task.get_loop() is not loop:
            if len(self._answers) >= _MOST_REMEMBERED:
                self._answers.clear()
            task = loop.create_task(self._ask(*key))
            answer = self._answers[key] = _Answer(task, loop.time() + _REMEMBERED)
        # Whoever waits here may be called off; others wait for the same.
        return await asyncio.shield(answer.task)

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
        if self.is_open or selection.every or selection.patterns:
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

    def forget(self, subject: str | None = None) -> None:
        """Ask anew about a subject, or about everyone."""
        if subject is None:
            self._answers.clear()
        else:
            for key in [key for key in self._answers if key[0] == subject]:
                del self._answers[key]


_VERBS: Final = {"subscribe": "read", "publish": "publish to"}


async def _answer_of(answer: Any) -> Any:
    return await answer if inspect.isawaitable(answer) else answer
