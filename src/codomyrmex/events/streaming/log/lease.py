"""`Lease`: what one holder at a time has, for as long as it renews it.

A lease is a note in a log. Whoever takes it writes when it will be over, and says so anew three
times as often as it would have to. One that was killed says nothing any more, and its lease ends
by itself. One that only was slow finds out by the note: somebody else has changed it since, and
what it would append under its lease is refused.

What is written is written to its end, also when whoever waits for it is cancelled: so a holder
always knows whether it has the lease, and leaves none behind.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from ..errors import StreamClosed, StreamingError
from ..streams.tasks import hold, release, to_the_end
from .base import Change, Log, Note, Superseded
from .record import Record

__all__ = ["LEASE", "Held", "Lease", "LeaseLost", "seconds_left"]

LEASE: Final = 15.0
"""Seconds after which a lease that is not renewed is over, by default."""

_RENEWALS: Final = 3
"""How often it is renewed in that time."""

_OWN: Final = ("holder", "expires", "seconds", "until", "keep")
"""What a lease writes into its note itself."""

_logger = logging.getLogger("codomyrmex.events.streaming")


class Held(StreamingError):
    """Somebody else has the lease.

    Attributes:
        note: what is written there.
        seconds: for how long at least, unless they let go.
    """

    def __init__(self, note: Note, seconds: float) -> None:
        super().__init__(note, seconds)
        self.note = note
        self.seconds = seconds


class LeaseLost(StreamingError):
    """This holder has the lease no more: somebody else has taken it, or it was let go."""


def seconds_left(note: Note, now: int) -> float:
    """For how long a lease that is written in a note is still somebody's; 0: it is nobody's."""
    over = note.value.get("expires")
    return 0.0 if over is None else max(0.0, (over - now) / 1_000_000)


def change_to(note: Note) -> Change:
    """What makes a note be what a lease has made it: it stays as long, and keeps as much."""
    keep = note.value.get("keep")
    return Change(
        note, expires=note.value.get("until"), keep=None if keep is None else (keep[0], keep[1])
    )


def is_doubtful(note: Note, now: int) -> bool:
    """Whether a lease runs for longer than any is given: the clock has been set back since."""
    # How long it runs is its holder's choice, and stands in the note: ours may be another.
    seconds: float = note.value.get("seconds", 0.0)
    return seconds_left(note, now) > 2 * seconds


class Lease:
    """A note that this holder has. Made by `take`.

    Attributes:
        log: where the note is.
        state: what the holder has written into it, beside the lease itself.
        was_held: whether whoever had it before did not let go of it, but was killed, or hung.
        lost: whether somebody else has it now.
        on_loss: called when somebody else has it.
    """

    def __init__(
        self,
        log: Log,
        key: str,
        *,
        duration: float,
        lasts: float | None,
        keep: tuple[str, int] | None,
    ) -> None:
        self.log = log
        self.state: dict[str, Any] = {}
        self.was_held = False
        self.lost = False
        self._key = key
        self._holder = secrets.token_hex(8)
        self._duration = duration
        self._lasts = lasts
        self._keep = keep
        self.on_loss: Callable[[], object] = lambda: None
        self._note = Note(key, {})
        self._turn = asyncio.Lock()
        self._is_held = False
        self._certain_until = 0.0  # by the loop's clock
        self._renewing: asyncio.Task[None] | None = None

    @classmethod
    async def take(
        cls,
        log: Log,
        key: str,
        state: Callable[[Mapping[str, Any]], dict[str, Any]],
        *,
        duration: float = LEASE,
        lasts: float | None = None,
        keep: tuple[str, int] | None = None,
    ) -> "Lease":
        """Take a lease that nobody has, and go on renewing it until `let_go`.

        Args:
            log: where it is written.
            key: name of its note.
            state: what to write beside it, given what is written there.
            duration: seconds after which it is over, if it is not renewed.
            lasts: seconds after that for which the note stays; None: for ever.
            keep: a topic, and a position after which retention spares its records meanwhile.

        Raises:
            Held: somebody else has it.
        """
        lease = cls(log, key, duration=duration, lasts=lasts, keep=keep)
        is_taken = False
        while not is_taken:
            note = await log._note(key)
            if is_doubtful(note, log._now()):
                # Whoever has it renews it by the clock as it is now, unless they are gone.
                await asyncio.sleep(note.value["seconds"])
                if (await log._note(key)).revision != note.revision:
                    continue
            elif left := seconds_left(note, log._now()):
                raise Held(note, left)
            lease._note = note
            lease.was_held = "expires" in note.value
            first = state({k: v for k, v in note.value.items() if k not in _OWN})
            try:
                is_taken = await to_the_end(lease._begin(first))
            except asyncio.CancelledError:
                if lease._is_held:
                    await to_the_end(lease._undo(note))
                raise
        lease._renewing = asyncio.get_running_loop().create_task(
            lease._renew(), name="codomyrmex-streaming lease"
        )
        hold(lease._renewing)
        lease._renewing.add_done_callback(release)
        return lease

    async def _begin(self, state: dict[str, Any]) -> bool:
        self._is_held = await self._write(state)
        return self._is_held

    async def _undo(self, before: Note) -> None:
        """Have the note say what it said before it was taken, for as long as it would have."""
        self._is_held = False
        await self._put(before.value, gone=not before.revision)

    @property
    def is_certain(self) -> bool:
        """Whether nobody else can have taken it: it is not over since it was last renewed.

        By the clock by which others judge it, and by one that nobody sets. What hung may have
        lost it without knowing.
        """
        return (
            self._is_held
            and not self.lost
            and self.log._now() < self._note.value["expires"]
            and asyncio.get_running_loop().time() < self._certain_until
        )

    async def store(self, **state: Any) -> None:
        """Write another state, and renew the lease.

        Cancelled, it has written it or will not any more: `state` tells.

        Raises:
            LeaseLost: somebody else has it, or it was let go.
        """
        async with self._turn:
            self._check()
            await to_the_end(self._store({**self.state, **state}))

    async def _store(self, state: dict[str, Any]) -> None:
        if not await self._write(state):
            self._lose()
            raise LeaseLost

    async def append(self, drafts: Iterable[Record]) -> list[Record]:
        """Append records, if this holder has the lease by then.

        Raises:
            LeaseLost: somebody else has it, or it was let go.
        """
        async with self._turn:
            self._check()
            records = list(drafts)
            while True:
                try:
                    return await self.log._append(records, self._note)
                except Superseded:
                    if not await self._is_mine():
                        self._lose()
                        raise LeaseLost from None

    async def abandon(self) -> None:
        """Renew the lease no more, and let it end by itself. Again does nothing."""
        if self._renewing is not None:
            renewing, self._renewing = self._renewing, None
            renewing.cancel()
            await asyncio.wait([renewing])

    async def let_go(self, *, gone: bool = False, lasts: float | None = None) -> None:
        """Renew the lease no more, and let others take it. Again does nothing.

        Args:
            gone: whether to take away the note; otherwise it stays, with the state.
            lasts: seconds for which it stays; None: for ever.
        """
        if self._renewing is not None:
            await to_the_end(self._let_go(gone, lasts))

    async def _let_go(self, gone: bool, lasts: float | None) -> None:
        self._is_held = False
        await self.abandon()
        async with self._turn:
            if not self.lost:
                await self._put(self.state | self._staying(lasts), gone=gone)

    def _staying(self, seconds: float | None) -> dict[str, Any]:
        """For how long the note stays and what it keeps meanwhile, as is written into it."""
        if seconds is None:
            return {}
        until = {"until": self._in(seconds)}
        return until if self._keep is None else {**until, "keep": self._keep}

    def _in(self, seconds: float) -> int:
        return self.log._now() + int(seconds * 1_000_000)

    def _check(self) -> None:
        if self.lost or not self._is_held:
            raise LeaseLost

    async def _write(self, state: dict[str, Any]) -> bool:
        """Write state and lease. False: somebody else has changed the note."""
        duration = self._duration
        certain_until = asyncio.get_running_loop().time() + duration
        about = {"holder": self._holder, "expires": self._in(duration), "seconds": duration}
        stays = self._staying(None if self._lasts is None else duration + self._lasts)
        if not await self._put({**state, **about, **stays}):
            return False
        self.state = state
        self._certain_until = certain_until
        return True

    async def _put(self, value: dict[str, Any], *, gone: bool = False) -> bool:
        """Change the note. False: somebody else has."""
        while True:
            change = change_to(Note(self._key, value, self._note.revision))
            written = await self.log._change(replace(change, gone=gone))
            if written is not None:
                self._note = written
                return True
            if not await self._is_mine():
                return False

    async def _is_mine(self) -> bool:
        """Whether it was this holder who changed the note, in a call that said it had failed."""
        note = await self.log._note(self._key)
        if note.value.get("holder") != self._holder:
            return False
        self._note = note
        return True

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._duration / _RENEWALS)
            try:
                await self.store()
            except (LeaseLost, StreamClosed):
                return
            except Exception:  # the disk is full, perhaps: it is tried again
                _logger.exception("the lease %s could not be renewed", self._key)

    def _lose(self) -> None:
        self.lost = True
        self.on_loss()
