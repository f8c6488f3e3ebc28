"""`SQLiteLog`: a log in a file, with the standard library's sqlite3.

One thread writes: it takes everything that waits to be appended and commits it together. Two
threads read, and never wait for the one that writes. The latest records are in memory besides,
where readers that are up to date find them without asking a thread.
"""

import asyncio
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self, TypeAlias, TypeVar
from urllib.parse import SplitResult, unquote

from ..errors import IdConflict, StreamClosed
from ..forks import follow_forks
from ..topics import Selection
from .base import (
    EARLIEST,
    LATEST,
    MAX_SIZE,
    Capabilities,
    Gap,
    Location,
    Log,
    LogStatistics,
    Page,
    Retention,
    retention_of,
)
from .followers import Follower, Followers, notify_all
from .record import Record
from .ring import Ring
from .sqlite_file import SQLiteFile

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

_READERS: Final = 2
"""Threads that read."""

T = TypeVar("T")

_Answer: TypeAlias = "tuple[_Job, list[Record] | None, BaseException | None]"


def _microseconds() -> int:
    return time.time_ns() // 1000


class _Job:
    """Records to be appended, and who waits for that."""

    __slots__ = ("drafts", "future")

    def __init__(self, drafts: list[Record], future: "asyncio.Future[list[Record]]") -> None:
        self.drafts = drafts
        self.future = future


def _resolve_all(answers: list[_Answer]) -> None:
    """Tell who waits, in their loops. From any thread."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Answer]] = {}
    for answer in answers:
        by_loop.setdefault(answer[0].future.get_loop(), []).append(answer)
    # One call to a loop: each is a system call, and gives up the interpreter lock.
    for loop, its_answers in by_loop.items():
        with suppress(RuntimeError):  # it is closed
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
    use it, but only one process at a time.

    Args:
        path: the file. Beside it stand SQLite's own (``-wal``, ``-shm``) and one that says that it
            is in use (``-lock``).
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

    capabilities: ClassVar = Capabilities(durable=True, shared=False)

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
                self._writing = ThreadPoolExecutor(1, "codomyrmex-streaming log writer")
                self._reading = ThreadPoolExecutor(_READERS, "codomyrmex-streaming log reader")
        await self._write(self._open_file)

    def _set_start(self, first: Record | None, before: int) -> None:
        """Remember where what is retained begins. The lock is held."""
        if first is not None:
            self._first, self._first_id, self._first_time = first.position, first.id, first.time
            self._trimmed_bytes = before

    async def _write(self, function: Callable[[], T]) -> T:
        """Call a function in the thread that writes."""
        return await self._call(self._writing, function)

    async def _read(self, function: Callable[[SQLiteFile], T]) -> T:
        """Call a function with the file in a thread that reads."""

        def call() -> T:
            file: SQLiteFile | None = getattr(self._files, "file", None)
            if file is None:
                file = self._files.file = SQLiteFile(self.path, writes=False)
                with self._lock:
                    self._all_files.append(file)
            return function(file)

        return await self._call(self._reading, call)

    async def _call(self, threads: ThreadPoolExecutor | None, function: Callable[[], T]) -> T:
        with self._lock:  # under which the log is closed before its threads are told to end
            self._check_open()
            result = asyncio.get_running_loop().run_in_executor(threads, function)
        return await result

    def _open_file(self) -> None:
        """In the writer's thread."""
        if self._file is not None:
            return
        file = SQLiteFile(self.path, writes=True, durability=self.durability)
        first, last, before_first, before_last = file.extent()
        with self._lock:
            self._all_files.append(file)
            self._set_start(first, before_first)
            if last is not None:
                self._last, self._last_id = last.position, last.id
                self._appended_bytes = before_last + last.size
            self._ring = Ring(self._last + 1)
            self._file = file

    # Appending.

    async def _append(self, drafts: list[Record]) -> list[Record]:
        if self._file is None or not drafts:
            await self._open()
        if not drafts:
            return []
        job = _Job(drafts, asyncio.get_running_loop().create_future())
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
                self._commit(jobs)
            except Exception as error:
                _resolve_all([(job, None, error) for job in jobs])

    def _commit(self, jobs: list[_Job]) -> None:
        file = self._file
        assert file is not None
        now = self._clock()
        # As a rule, none of the ids is there; otherwise the file says so.
        answers, records = self._place_all(jobs, {}, now)
        if records and not file.insert(records, self._appended_bytes):
            known = file.find_records([draft.id for job in jobs for draft in job.drafts])
            answers, records = self._place_all(jobs, known, now)
            if records:
                file.insert(records, self._appended_bytes)
        repeated = sum(len(stored) for _, stored, _ in answers if stored) - len(records)
        self._show(records, repeated=repeated)
        _resolve_all(answers)
        self._trim_some(2 * len(records) + 100)

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
            ring = self._ring
            self._appended_bytes += ring.add(records)
            if records:
                if self._first_id is None:
                    self._first_id, self._first_time = records[0].id, records[0].time
                self._last, self._last_id = records[-1].position, records[-1].id
            ring.drop(ring.excess(_RECENT, _RECENT_BYTES))
            self._appended += len(records)
            self._repeated += repeated
            followers = self._followers.of(records)
        notify_all(followers)

    # Trimming.

    @property
    def _held_bytes(self) -> int:
        return self._appended_bytes - self._trimmed_bytes

    def _trim_some(self, most: int) -> int:
        """Take the oldest as retention says, so many at most; the last stays. The writer's."""
        keep, file = self.retention, self._file
        assert file is not None
        excess = 0 if keep.count is None else self._last - self._first + 1 - keep.count
        too_many_bytes = 0 if keep.bytes is None else self._held_bytes - keep.bytes
        since = None if keep.age is None else self._clock() - int(keep.age * 1_000_000)
        # Whether any is aged, the first one says: what it said is remembered, not read each time.
        if excess <= 0 and too_many_bytes <= 0 and (since is None or self._first_time > since):
            return 0
        gone: list[Record] = []
        freed = 0
        for record in file.page(self._first - 1, min(most, self._last - self._first)):
            aged = since is not None and record.time <= since
            if len(gone) >= excess and freed >= too_many_bytes and not aged:
                break
            gone.append(record)
            freed += record.size
        if not gone:
            return 0
        with file.transaction():
            file.trim(gone)
        first, _, before_first, _ = file.extent()
        with self._lock:
            self._set_start(first, before_first)
            self._trimmed += len(gone)
            self._ring.drop(min(len(self._ring), max(0, self._first - self._ring.first)))
        return len(gone)

    async def _trim_step(self) -> int:
        await self._open()
        return await self._write(lambda: self._trim_some(_TRIMMED_AT_ONCE))

    # Reading.

    async def _locate(self, cursor: str, selection: Selection) -> Location:
        await self._open()
        if cursor == LATEST:
            with self._lock:
                return Location("found", self._last, 0, self._first_id, self._last_id)
        return await self._read(lambda file: file.locate(cursor, selection))

    async def _begin(self, after: str, selection: Selection) -> tuple[int, Gap | None]:
        await self._open()
        if after == LATEST:
            return self._last, None
        return await self._read(lambda file: file.begin(after, selection))

    async def _page(self, after: int, selection: Selection, limit: int) -> Page:
        with self._lock:
            self._check_open()
            ring = self._ring
            if after >= max(ring.first, self._first) - 1:
                found, reached = ring.page(after, selection, limit)
                # The last id is there even where the ring is empty, since the last stays.
                cursor = ring.at(reached).id if reached >= ring.first else self._last_id
                return Page(found, reached, cursor or EARLIEST, reached == self._last, 0)
            last = self._last
        return await self._read(lambda file: file.page_of(after, selection, limit, last))

    async def _before_last(
        self, count: int, after: int, selection: Selection
    ) -> tuple[int, int | None]:
        await self._open()
        with self._lock:
            last = self._last
        return await self._read(lambda file: file.before_last(count, after, selection, last))

    async def _end(self) -> int:
        await self._open()
        with self._lock:
            return self._last

    def _follow(self, selection: Selection) -> Follower:
        follower = Follower(selection)
        with self._lock:
            self._check_open()
            self._followers.add(follower)
        return follower

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

    def _after_fork(self) -> None:  # pragma: no cover - in the child, where nothing is measured
        """Threads and connections are the parent's; the child opens the file anew, if it may."""
        self._lock = threading.Lock()
        self._writing = self._reading = self._ending = self._file = None
        self._files = threading.local()
        self._kept_for_ever = self._all_files, self._files  # closing one here harms the parent
        self._all_files = []
        self._jobs.clear()
        self._committing = False
