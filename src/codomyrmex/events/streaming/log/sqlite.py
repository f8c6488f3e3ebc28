"""`SQLiteLog`: a log in a file, with the standard library's sqlite3.

One thread writes: it takes everything that waits to be appended and commits it together. Two
threads read, and never wait for the one that writes. The latest records are in memory besides,
where readers that are up to date find them without asking a thread. Other processes may do the
same with the same file; see `Peers`.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self, TypeAlias, TypeVar
from urllib.parse import SplitResult, unquote

from ..errors import IdConflict, LogUnusable, StreamClosed, StreamingError
from ..forks import follow_forks
from ..topics import Selection
from .base import (
    EARLIEST,
    LATEST,
    MAX_SIZE,
    Capabilities,
    Change,
    Location,
    Log,
    LogStatistics,
    Note,
    Page,
    Retention,
    Start,
    Superseded,
    retention_of,
)
from .followers import Follower, Followers, Signal, notify_all
from .peers import Peers
from .record import Record
from .ring import Ring
from .sqlite_file import Extent, SQLiteFile

__all__ = ["SQLiteLog"]

_RETENTION: Final = Retention(bytes=1 << 30, age=7 * 86_400)

_MOST_AT_ONCE: Final = 5000
"""Records that are committed together, about."""

_RECENT: Final = 10_000
"""Records that are kept in memory as well."""

_RECENT_BYTES: Final = 16 << 20
"""Bytes of records that are kept in memory as well."""

_TRIMMED_AT_ONCE: Final = 500
"""Records that go at a time, so that nobody waits long to append."""

_NOTHING: Final[Mapping[int, int]] = {}
_READERS: Final = 2
"""Threads that read."""

_open_at_fork: Final[set[tuple[int, int]]] = set()
"""Files that were open in the parent when this process was forked."""

T = TypeVar("T")

_Answer: TypeAlias = "tuple[_Job, list[Record] | None, BaseException | None]"


def _microseconds() -> int:
    return time.time_ns() // 1000


def _ignore_broken_pipes() -> None:
    """Have no signal end the process when this thread rings the bell of one that was killed."""
    if hasattr(signal, "pthread_sigmask"):  # pragma: no branch - not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})


def _calls(method: Callable[..., T]) -> Callable[..., T | None]:
    """What calls a method for as long as its object is there, and does not keep it."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any) -> T | None:
        bound = reference()
        return None if bound is None else bound(*args)

    return call


def _identity(path: Path) -> tuple[int, int]:
    """Which file it is, whatever its name."""
    found = path.stat()
    return found.st_dev, found.st_ino


def _trace(path: Path) -> tuple[int, int]:
    """What is different after somebody has written to the file."""
    try:
        found = os.stat(f"{path}-wal")
    except OSError:  # nobody has written
        return 0, 0
    return found.st_mtime_ns, found.st_size


class _Job:
    """Records to be appended, and who waits for that."""

    __slots__ = ("drafts", "future", "guard")

    def __init__(
        self, drafts: list[Record], guard: Note | None, future: "asyncio.Future[list[Record]]"
    ) -> None:
        self.drafts = drafts
        self.guard = guard
        self.future = future


def _resolve_all(answers: list[_Answer]) -> None:
    """Tell who waits, in their loops. From any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Answer]] = {}
    for answer in answers:
        by_loop.setdefault(answer[0].future.get_loop(), []).append(answer)
    # One call to a loop: each is a system call, and gives up the interpreter lock.
    for loop, its_answers in by_loop.items():
        with contextlib.suppress(RuntimeError):  # it is closed
            loop.call_soon_threadsafe(_resolve_here, its_answers)


def _resolve_here(answers: list[_Answer]) -> None:
    for job, stored, error in answers:
        if job.future.done():
            continue
        if error is not None:
            job.future.set_exception(error)
        else:
            assert stored is not None
            job.future.set_result(stored)


class SQLiteLog(Log):
    """A log in a file. Events survive a crash of the process, and of the machine.

    The file is opened when the log is first used, and made if there is none. Any event loop may
    use it, and so may several processes of one machine: they take turns to write, and whoever waits
    for an event is woken, whichever process it comes from.

    Args:
        path: the file, on a disk of this machine. Beside it stand SQLite's own (``-wal``,
            ``-shm``) and what processes take turns with (``-lock``, ``-bells``).
        retention: how much is kept; by default 7 days or 1 GiB. It is applied as events are
            appended.
        durability: ``full``: when `append` returns, the event is on the disk. ``normal``: it is
            with the operating system: it survives a crash of the process, but a power failure may
            take the last moments.
        max_size: bytes that an event may have, by `Record.size`.
        clock: microseconds since 1970.

    Raises:
        LogUnusable: at the first use: the file cannot be opened, or is not such a log.
    """

    capabilities: ClassVar = Capabilities(durable=True, shared=True)

    def __init__(
        self,
        path: "str | os.PathLike[str]",
        retention: Retention = _RETENTION,
        *,
        durability: Literal["full", "normal"] = "full",
        max_size: int = MAX_SIZE,
        clock: Callable[[], int] = _microseconds,
    ) -> None:
        if durability not in ("full", "normal"):
            raise ValueError(f"durability is 'full' or 'normal', not {durability!r}")
        self.path = Path(path)
        self.retention = retention
        self.durability = durability
        self.max_size = max_size
        self._clock = clock
        self._lock = threading.Lock()
        self._closed = False
        self._writing: ThreadPoolExecutor | None = None
        self._reading: ThreadPoolExecutor | None = None
        self._ending: Future[None] | None = None
        self._file: SQLiteFile | None = None  # the writer's
        self._which: tuple[int, int] | None = None  # file it is, while it is open
        self._peers = self._new_peers()
        self._files = threading.local()  # the readers'
        self._all_files: list[SQLiteFile] = []
        self._jobs: deque[_Job] = deque()
        self._committing = False
        # What is retained is from `_first` to `_last`; of that the ring has the end.
        self._first = 1
        self._last = 0
        self._first_id: str | None = None
        self._last_id: str | None = None
        self._first_time = 0
        # All bytes there ever were, and those that have gone.
        self._appended_bytes = 0
        self._trimmed_bytes = 0
        self._ring = Ring()
        self._followers = Followers()
        self._appended = 0
        self._repeated = 0
        self._trimmed = 0
        self._notes_changed = Signal(_calls(self._attend))
        self._changes = 0  # of notes, that are known of
        self._trace = (0, 0)
        self._trim_asked = False
        # Topics whose records notes keep, after which position; and until when at least.
        self._keeps: dict[str, int] = {}
        self._kept_until = 0
        self._next_end = 0
        self._is_stale = True  # whether that has to be read again
        follow_forks(self)

    @classmethod
    def from_url(cls, url: SplitResult, **options: Any) -> Self:
        """The log of a URL ``sqlite:///events.db?age=3600`` or ``sqlite:////var/lib/events.db``.

        Raises:
            ValueError: the URL says more than a file and limits of retention.
        """
        if url.netloc or url.fragment or len(url.path) < 2:
            raise ValueError(f"sqlite:/// is followed by the name of a file: {url.geturl()!r:.100}")
        if url.query:
            options["retention"] = retention_of(url.query)
        return cls(unquote(url.path[1:]), **options)

    # Opening.

    async def _open(self) -> None:
        """Open the file, unless it is."""
        with self._lock:
            self._check_open()
            if self._file is not None:
                return
            if self._writing is None:
                self._writing = ThreadPoolExecutor(
                    1, "codomyrmex-streaming log writer", _ignore_broken_pipes
                )
                self._reading = ThreadPoolExecutor(_READERS, "codomyrmex-streaming log reader")
        await self._write(self._open_file)

    async def _write(self, function: Callable[[], T]) -> T:
        """Call a function in the thread that writes."""
        return await self._call(self._writing, function)

    async def _read(self, function: Callable[[SQLiteFile], T]) -> T:
        """Call a function with the file in a thread that reads."""

        return await self._call(self._reading, partial(self._with_file, function))

    def _with_file(self, function: Callable[[SQLiteFile], T]) -> T:
        """In a thread that reads."""
        file: SQLiteFile | None = getattr(self._files, "file", None)
        if file is None:
            file = self._files.file = SQLiteFile(self.path)
            file.read_only()
            with self._lock:
                self._all_files.append(file)
        with file.errors():
            return function(file)

    async def _call(self, threads: ThreadPoolExecutor | None, function: Callable[[], T]) -> T:
        with self._lock:  # under which the log is closed before its threads are told to end
            self._check_open()
            result = asyncio.get_running_loop().run_in_executor(threads, function)
        return await result

    def _open_file(self) -> None:
        """In the writer's thread."""
        if self._file is not None:
            return
        if (  # pragma: no cover - in a forked child, where nothing is measured
            _open_at_fork and self.path.exists() and _identity(self.path) in _open_at_fork
        ):
            raise LogUnusable(
                self.path,
                "it was open when this process was forked, and SQLite cannot go on with it: open it"
                " after forking only, or start processes by spawn",
            )
        file = SQLiteFile(self.path)
        self._which = _identity(self.path)
        peers = self._peers
        try:
            peers.join()
            peers.take_turn()
            file.prepare(self.durability)
            with file.errors():
                extent = file.extent()
                until = file.bytes_until(extent.last)
        except BaseException:
            file.close()
            self._which = None
            peers.leave()
            self._peers = self._new_peers()
            raise
        with self._lock:
            self._all_files.append(file)
            self._set_extent(extent)
            self._appended_bytes = until
            self._ring = Ring(self._last + 1)
            self._file = file
        weakref.finalize(self, peers.leave_soon)
        peers.end_turn()

    def _set_extent(self, extent: Extent) -> None:
        """Remember what there is. The lock is held."""
        self._first, self._first_id, self._first_time, self._trimmed_bytes = extent[:4]
        self._last, self._last_id = extent[4:]

    # Other processes.

    def _new_peers(self) -> Peers:
        age = self.retention.age
        heard, attentive = _calls(self._heard), _calls(self._is_attentive)
        return Peers(self.path, heard, attentive, age and min(60.0, age / 10))

    def _is_attentive(self) -> bool:
        """Whether anybody waits for what other processes do."""
        return bool(self._followers) or self._notes_changed.is_awaited

    @contextlib.contextmanager
    def _turn(self) -> Iterator[SQLiteFile]:
        """The file, which no other process writes meanwhile. In the writer's thread."""
        file = self._file
        assert file is not None
        is_new = self._peers.take_turn()
        try:
            with file.errors():
                if is_new:
                    self._see_changes()
                    peers = self._peers
                    self._catch_up(file, {peers.last: peers.bytes_until})
                yield file
        finally:
            self._peers.end_turn()

    def _look(self, file: SQLiteFile) -> None:
        """Learn what other processes have written, while they may write. In a reader's thread."""
        with file.one_state():
            self._catch_up(file)

    def _catch_up(self, file: SQLiteFile, known: Mapping[int, int] = _NOTHING) -> None:
        """Learn what other processes have written. In any thread but an event loop's.

        Args:
            known: how many bytes there are until a position, where that has not to be asked.
        """
        last = self._last
        extent = file.extent()
        if (extent.first, extent.last) == (self._first, last):
            return
        records: list[Record] = []
        if self._followers:  # otherwise they need not be in memory
            # Of what is only kept there are not all: the ring has none of it.
            records = file.latest(max(last, extent.first - 1), extent.last, _RECENT)
        is_all = extent.last == last or (bool(records) and records[0].position == last + 1)
        until = None if is_all else known.get(extent.last)
        if until is None and not is_all:
            until = file.bytes_until(extent.last)
        with self._lock:
            if extent.last < self._last or extent.first < self._first:
                return  # this process has written since, or trimmed
            # The ring has all there is from some position to the last, or nothing.
            fresh = [each for each in records if each.position > self._last]
            if extent.last > self._last and (not fresh or fresh[0].position > self._last + 1):
                self._ring = Ring(fresh[0].position if fresh else extent.last + 1)
            added = self._add_recent(fresh)
            self._appended_bytes = self._appended_bytes + added if until is None else until
            self._set_extent(extent)
            self._drop_trimmed()
            # Who follows some topics is told of these, where all is known that came.
            followers = self._followers.of(fresh) if is_all else list(self._followers)
        notify_all(followers)

    def _see_changes(self) -> None:
        """Learn that other processes have changed notes."""
        changes = self._peers.changes
        if changes != self._changes:
            self._changes = changes
            self._is_stale = True
            self._notes_changed.set_off()

    async def _be_up_to_date(self) -> None:
        """Know all that others have been told is stored, whichever process stored it."""
        if self._peers.last > self._last:
            await self._read(self._look)

    def _heard(self, is_lull: bool) -> None:
        """Another process rang; or none did for a while. In a thread of its own."""
        with self._lock:
            if self._closed or self._file is None:
                return
            assert self._writing is not None
            assert self._reading is not None
            with contextlib.suppress(RuntimeError):  # the program ends, and its threads with it
                if self._peers.changed:
                    self._writing.submit(self._peers.end_turn)
                is_behind = self._peers.last > self._last
                if is_lull:
                    # One that was killed after it wrote and before it could ring left its trace.
                    trace = _trace(self.path)
                    is_behind |= trace != self._trace
                    self._trace = trace
                    if self.retention.age is not None and not self._trim_asked:
                        self._trim_asked = True
                        self._writing.submit(self._trim_the_aged)
                if is_behind and self._followers:  # where nobody waits, whoever reads will look
                    self._reading.submit(self._with_file, self._look)
        self._see_changes()

    # Appending.

    async def _append(self, drafts: list[Record], guard: Note | None = None) -> list[Record]:
        if self._file is None or not drafts:
            await self._open()
        if not drafts:
            return []
        job = _Job(drafts, guard, asyncio.get_running_loop().create_future())
        with self._lock:
            self._check_open()
            self._jobs.append(job)
            if not self._committing:
                self._committing = True
                assert self._writing is not None
                self._writing.submit(self._commit_all)
        return await job.future

    def _commit_all(self) -> None:
        """Commit what waits, until nothing does. In the writer's thread."""
        while True:
            jobs: list[_Job] = []
            count = 0
            with self._lock:
                while self._jobs and count < _MOST_AT_ONCE:
                    job = self._jobs.popleft()
                    if not job.future.cancelled():
                        jobs.append(job)
                        count += len(job.drafts)
                if not jobs:
                    self._committing = False
                    return
            try:
                with self._turn() as file:
                    self._commit(jobs, file)
            except Exception as error:
                _resolve_all([(job, None, error) for job in jobs])

    def _commit(self, jobs: list[_Job], file: SQLiteFile) -> None:
        now = self._clock()
        jobs = [job for job in jobs if job.guard is None or self._is_guarded(job, file, now)]
        # As a rule, none of the ids is there; otherwise the file says so.
        answers, records = self._place_all(jobs, {}, now)
        if records and not file.insert(records, self._appended_bytes):
            known = file.find_records([draft.id for job in jobs for draft in job.drafts])
            answers, records = self._place_all(jobs, known, now)
            if records and not file.insert(records, self._appended_bytes):
                raise LogUnusable(self.path, "something else has written to it out of turn")
        repeated = sum(len(stored) for _, stored, _ in answers if stored) - len(records)
        self._show(records, repeated=repeated)
        if records:
            self._peers.say_last(self._last, self._appended_bytes)
        _resolve_all(answers)
        self._trim_some(file, 2 * len(records) + 100)

    def _is_guarded(self, job: _Job, file: SQLiteFile, now: int) -> bool:
        """Whether a job's note is as it has to be; it is told if not."""
        assert job.guard is not None
        if file.note(job.guard.key, now).revision == job.guard.revision:
            return True
        _resolve_all([(job, None, Superseded())])
        return False

    def _place_all(
        self, jobs: list[_Job], known: dict[str, Record], now: int
    ) -> tuple[list[_Answer], list[Record]]:
        """What each job is to be told, and the records that are to be stored for that."""
        answers: list[_Answer] = []
        fresh: dict[str, Record] = {}
        for job in jobs:
            try:
                answers.append((job, self._place(job.drafts, known, fresh, now), None))
            except IdConflict as conflict:
                answers.append((job, None, conflict))
        return answers, list(fresh.values())

    def _place(
        self, drafts: list[Record], known: dict[str, Record], fresh: dict[str, Record], now: int
    ) -> list[Record]:
        """The records of one batch as they are or will be stored; new ones are added to `fresh`."""
        others = len(fresh)
        stored: list[Record] = []
        for draft in drafts:
            id_ = draft.id
            record = known.get(id_) or fresh.get(id_)
            if record is None:
                record = fresh[id_] = draft.placed(self._last + len(fresh) + 1, now)
            elif not record.says_the_same(draft):
                while len(fresh) > others:
                    fresh.popitem()  # the latest: nothing of this batch is stored
                raise IdConflict(id_)
            stored.append(record)
        return stored

    def _show(self, records: list[Record], *, repeated: int) -> None:
        """Let everybody see what has been committed. In the writer's thread."""
        with self._lock:
            # A reader's thread may have seen them in the file before this one came to say so.
            self._appended_bytes += self._add_recent(
                [each for each in records if each.position > self._last]
            )
            if records:
                if self._first_id is None:
                    self._first_id, self._first_time = records[0].id, records[0].time
                self._last, self._last_id = records[-1].position, records[-1].id
            self._appended += len(records)
            self._repeated += repeated
            followers = self._followers.of(records)
        notify_all(followers)

    def _add_recent(self, records: list[Record]) -> int:
        """Have the next records in memory as well; returns their bytes. The lock is held."""
        ring = self._ring
        added = ring.add(records)
        ring.drop(ring.excess(_RECENT, _RECENT_BYTES))
        return added

    def _drop_trimmed(self) -> None:
        """Have nothing in memory that has gone. The lock is held."""
        self._ring.drop(min(len(self._ring), max(0, self._first - self._ring.first)))

    # Trimming.

    @property
    def _held_bytes(self) -> int:
        return self._appended_bytes - self._trimmed_bytes

    def _trim_some(self, file: SQLiteFile, most: int) -> bool:
        """Take some of what retention does not allow. The writer's; in its turn.

        Returns:
            Whether there was anything to take.
        """
        now = self._clock()
        if self._is_stale:
            self._see_keeps(file)
        if self._kept_until <= now and self._trim_kept(file, now, most):
            return True
        return self._trim_oldest(file, now, most)

    def _trim_oldest(self, file: SQLiteFile, now: int, most: int) -> bool:
        """Take the oldest, but for what notes keep and for the last."""
        keep = self.retention
        excess = 0 if keep.count is None else self._last - self._first + 1 - keep.count
        too_many_bytes = 0 if keep.bytes is None else self._held_bytes - keep.bytes
        since = None if keep.age is None else now - int(keep.age * 1_000_000)
        # Whether any is aged, the first one says: what it said is remembered, not read each time.
        is_aged = since is not None and not since < self._first_time <= now
        if excess <= 0 and too_many_bytes <= 0 and not is_aged:
            return False
        page = file.page(self._first - 1, min(most, self._last - self._first))
        # What comes before an aged one is as old, whatever the clock said when it came.
        aged = 0
        if since is not None:
            aged = max((n for n, record in enumerate(page, 1) if record.time <= since), default=0)
        gone: list[Record] = []
        kept: list[int] = []
        freed = 0
        for number, record in enumerate(page):
            if number >= excess and freed >= too_many_bytes and number >= aged:
                break
            freed += record.size
            if self._is_kept(record):
                kept.append(record.position)
            else:
                gone.append(record)
        if freed:
            self._trim(file, gone, kept, self._first + len(gone) + len(kept))
        return freed > 0

    def _trim_kept(self, file: SQLiteFile, now: int, most: int) -> bool:
        """Take what notes keep no more, and the notes whose time is over."""
        file.forget_notes(now)
        self._see_keeps(file)
        gone: list[Record] = []
        kept: list[int] = []
        position = 0
        while position < self._first - 1 and not gone:
            kept.clear()
            page = [each for each in file.page(position, most) if each.position < self._first]
            for record in page:
                if self._is_kept(record):
                    kept.append(record.position)
                else:
                    gone.append(record)
            if not page:
                break
            position = page[-1].position
        if gone:
            self._trim(file, gone, kept, self._first)
            return True
        self._kept_until = self._next_end
        return False

    def _see_keeps(self, file: SQLiteFile) -> None:
        """See what notes keep, and whether any of it is kept no more."""
        self._is_stale = False
        before, self._keeps = self._keeps, {}
        ends = [sys.maxsize]
        for topic, after, until in file.kept():
            if topic is not None:
                self._keeps[topic] = min(after, self._keeps.get(topic, after))
            if until is not None:
                ends.append(until)
        self._next_end = min(ends)
        is_less = any(
            after < self._keeps.get(topic, sys.maxsize) for topic, after in before.items()
        )
        self._kept_until = 0 if is_less else min(self._kept_until, self._next_end)

    def _is_kept(self, record: Record) -> bool:
        keeps = self._keeps
        return any(keeps.get(topic, sys.maxsize) < record.position for topic in record.topics)

    def _trim(self, file: SQLiteFile, gone: list[Record], kept: list[int], first: int) -> None:
        with file.transaction():
            file.trim(gone, kept, first)
        extent = file.extent()
        with self._lock:
            self._set_extent(extent)
            self._trimmed += len(gone)
            self._drop_trimmed()

    def _trim_the_aged(self) -> None:
        """Apply the retention, though nothing is appended. In the writer's thread."""
        is_done = True
        with contextlib.suppress(StreamingError), self._turn() as file:
            is_done = not self._trim_some(file, _TRIMMED_AT_ONCE)
        with self._lock:
            self._trim_asked = not is_done and not self._closed
            if self._trim_asked:
                assert self._writing is not None
                self._writing.submit(self._trim_the_aged)

    async def _trim_step(self) -> bool:
        await self._open()

        def trim() -> bool:
            with self._turn() as file:
                return self._trim_some(file, _TRIMMED_AT_ONCE)

        return await self._write(trim)

    # Notes.

    async def _note(self, key: str) -> Note:
        await self._open()
        return await self._read(lambda file: file.note(key, self._clock()))

    async def _notes(self, prefix: str) -> list[Note]:
        await self._open()
        return await self._read(lambda file: file.notes(prefix, self._clock()))

    async def _change(self, change: Change) -> Note | None:
        await self._open()
        revision = secrets.randbits(62) + 1

        def write() -> bool:
            with self._turn() as file:
                if not file.set_note(change, revision, self._clock()):
                    return False
                self._peers.say_changed()
                self._changes = self._peers.changes
                if change.keep or change.gone or change.expires is not None:
                    self._is_stale = True
            self._notes_changed.set_off()
            return True

        is_changed = await self._write(write)
        return Note(change.note.key, change.note.value, revision) if is_changed else None

    def _now(self) -> int:
        return self._clock()

    # Reading.

    async def _locate(self, cursor: str, selection: Selection) -> Location:
        await self._open()
        if cursor == LATEST:
            await self._be_up_to_date()
            with self._lock:
                return Location("found", self._last, 0, self._first_id, self._last_id)
        return await self._read(lambda file: file.locate(cursor, selection))

    async def _cursor_at(self, time: int) -> str:
        await self._open()
        return await self._read(lambda file: file.cursor_at(time))

    async def _begin(self, after: str, selection: Selection) -> Start:
        await self._open()
        if after == LATEST:
            await self._be_up_to_date()
            return Start(self._last, self._last, None)
        return await self._read(lambda file: file.begin(after, selection))

    async def _page(self, after: int, selection: Selection, limit: int, told: int) -> Page:
        if self._peers.last > self._last:
            await self._be_up_to_date()
        with self._lock:
            self._check_open()
            ring = self._ring
            if after >= max(ring.first, self._first) - 1:
                found, reached = ring.page(after, selection, limit)
                # The last id is there even where the ring is empty, since the last stays.
                cursor = ring.at(reached).id if reached >= ring.first else self._last_id
                is_last = reached == self._last
                return Page(found, reached, cursor or EARLIEST, is_last, 0, max(told, after))
            last = self._last
        return await self._read(lambda file: file.page_of(after, selection, limit, last, told))

    async def _before_last(
        self, count: int, after: int, selection: Selection
    ) -> tuple[int, int | None]:
        last = await self._end()
        return await self._read(lambda file: file.before_last(count, after, selection, last))

    async def _end(self) -> int:
        await self._open()
        await self._be_up_to_date()
        return self._last

    def _follow(self, selection: Selection) -> Follower:
        follower = Follower(selection)
        with self._lock:
            self._check_open()
            self._followers.add(follower)
        self._attend()
        return follower

    def _attend(self) -> None:
        """Somebody waits for what other processes do."""
        self._peers.attend()

    def _unfollow(self, follower: Follower) -> None:
        with self._lock:
            self._followers.discard(follower)

    # The rest.

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosed("the log has been closed")

    def statistics(self) -> LogStatistics:  # noqa: D102  (as in the base)
        with self._lock:
            return LogStatistics(
                appended=self._appended,
                repeated=self._repeated,
                trimmed=self._trimmed,
                records=self._last - self._first + 1,
                bytes=self._held_bytes,
                earliest=self._first_id,
                latest=self._last_id,
                readers=len(self._followers),
            )

    async def close(self) -> None:  # noqa: D102  (as in the base)
        self._peers.wait_no_more()
        with self._lock:
            self._closed = True
            followers = tuple(self._followers)
            if self._ending is None and self._writing is not None:
                self._ending = self._writing.submit(self._close_files)
        for follower in followers:
            follower.end()
        if self._ending is not None:
            # Whoever waits here may be called off; what is done there is not.
            await asyncio.shield(asyncio.wrap_future(self._ending))

    def _close_files(self) -> None:
        """In the writer's thread, after all that was to be appended."""
        assert self._writing is not None
        assert self._reading is not None
        self._writing.shutdown(wait=False)
        self._reading.shutdown()
        for file in self._all_files:
            file.close()
        self._all_files.clear()
        self._which = None
        self._peers.leave()

    def _after_fork(self) -> None:  # pragma: no cover - in the child, where nothing is measured
        """Threads and connections are the parent's, and SQLite in the child takes them for its own.

        It would neither lock the file nor notice that the parent has closed it: what the child
        wrote would be lost. So it may have other files, but not this one.
        """
        if self._which is not None:
            _open_at_fork.add(self._which)
        self._lock = threading.Lock()
        self._writing = self._reading = self._ending = self._file = None
        self._files = threading.local()
        self._kept_for_ever = self._all_files, self._files  # closing one here harms the parent
        self._all_files = []
        self._jobs.clear()
        self._committing = self._trim_asked = False
        self._peers.abandon()
        self._peers = self._new_peers()
