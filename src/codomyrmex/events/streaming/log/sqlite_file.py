"""The file of a `SQLiteLog`: its tables, and what is asked of them. For one thread at a time.

sqlite3 gives up the interpreter lock for every row it steps to, and takes it again when a busy
event loop lets it. So a batch is written by as few statements as can be.
"""

import contextlib
import json
import shutil
import sqlite3
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..errors import LogFull, LogUnusable
from ..topics import Selection
from .base import EARLIEST, Change, Gap, Location, Note, Page, Start
from .record import Record

__all__ = ["SQLiteFile"]

_APPLICATION_ID: Final = 0x636D7978  # "cmyx"

_SCHEMA: Final = f"""
CREATE TABLE records (
    position INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    -- The first topic, by its number; and all of them as JSON where there are several.
    topic INTEGER,
    topics TEXT,
    type TEXT NOT NULL,
    private INTEGER NOT NULL,
    body BLOB NOT NULL,
    metadata BLOB NOT NULL,
    timestamp INTEGER NOT NULL,
    time INTEGER NOT NULL,
    -- How many bytes all records before this one had.
    before INTEGER NOT NULL
);
CREATE INDEX records_by_topic ON records (topic) WHERE topic IS NOT NULL;
-- Which records a topic has that is not their first.
CREATE TABLE places (
    topic INTEGER NOT NULL, position INTEGER NOT NULL, PRIMARY KEY (topic, position)
) WITHOUT ROWID;
-- The topics there ever were, and the last record of each that retention took.
CREATE TABLE topics (
    number INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    trimmed INTEGER NOT NULL DEFAULT 0,
    trimmed_id TEXT
);
CREATE INDEX topics_by_trimmed ON topics (trimmed) WHERE trimmed > 0;
CREATE INDEX topics_by_trimmed_id ON topics (trimmed_id) WHERE trimmed_id IS NOT NULL;
-- The latest that retention took, so that a reader's place is known for a while after.
CREATE TABLE trimmed (position INTEGER PRIMARY KEY, id TEXT NOT NULL);
CREATE INDEX trimmed_by_id ON trimmed (id);
PRAGMA application_id = {_APPLICATION_ID};
"""

_NOTES: Final = """
-- From where on everything is there. Before that there is only what notes keep.
CREATE TABLE retained (one INTEGER PRIMARY KEY CHECK (one = 1), first INTEGER NOT NULL);
INSERT INTO retained SELECT 1, coalesce(min(position), 1) FROM records;
CREATE TABLE notes (
    key TEXT PRIMARY KEY,
    value BLOB NOT NULL,
    revision INTEGER NOT NULL,
    -- When it goes, in microseconds since 1970; and the topic whose records it keeps until then.
    expires INTEGER,
    topic TEXT,
    after INTEGER
) WITHOUT ROWID;
CREATE INDEX notes_by_expires ON notes (expires) WHERE expires IS NOT NULL;
"""

_STEPS: Final = (_SCHEMA, _NOTES)
"""What makes each version of the schema out of the one before, of which the first is no file."""

_COLUMNS: Final = "position, id, topic, topics, type, private, body, metadata, timestamp, time"
_PAGE: Final = f"SELECT {_COLUMNS}, NULL FROM records WHERE position > ? ORDER BY position"

_REMEMBERED: Final = 10_000
"""Trimmed ids whose positions are remembered, besides the last one of each topic."""

_MOST_LINES: Final = 50
"""Topics that are read each by its index, and merged; more are found by looking at all records."""

_AT_ONCE: Final = 256
"""Rows that go into one statement whatever their number, which is prepared for just that many."""

_MORE_AT_ONCE: Final = (1000, 512, _AT_ONCE)
"""Numbers of more rows than that which go into one statement, descending."""

_SCANNED_AT_ONCE: Final = 1000

_FETCHED_AT_ONCE: Final = 16

_PAGE_BYTES: Final = 16 << 20
"""Bytes of bodies after which a page has enough, however many records were asked for."""

_LITTLE: Final = 65_536
"""Bytes that are too few for a database to grow."""

_KNOWN_TOPICS: Final = 100_000
"""Topics whose numbers are kept in memory."""


class Extent(NamedTuple):
    """What there is.

    Attributes:
        first: the position from which on everything is there.
        first_id: id of the first record, which may have been kept from before that.
        first_time: when the record at `first` was taken.
        before: bytes of all records before that.
        last: the position of the last record; the one before `first`, if there is none.
        last_id: its id.
    """

    first: int
    first_id: str | None
    first_time: int
    before: int
    last: int
    last_id: str | None


class SQLiteFile:
    """A connection to the file.

    Args:
        path: the file.

    Raises:
        LogUnusable: it cannot be opened, or is not such a log.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.parent.is_dir():
            raise LogUnusable(path, f"there is no directory {path.parent}: make it first")
        try:
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, cached_statements=512
            )
        except sqlite3.Error as error:
            raise LogUnusable(path, _explain(error)) from error
        self._numbers: dict[str, int] = {}
        self._names: dict[int, tuple[str, ...]] = {}
        with self._closed_if_unusable():
            self._connection.execute("PRAGMA busy_timeout = 5000")
            self._version()

    @contextlib.contextmanager
    def _closed_if_unusable(self) -> Iterator[None]:
        try:
            with self.errors():
                yield
        except BaseException:
            self.close()
            raise

    def _version(self) -> int:
        """The version of its schema; 0: it is empty."""
        run = self._connection.execute
        # In this order: another process may be making them all, at once.
        (tables,) = run("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = run("PRAGMA application_id").fetchone()
        (version,) = run("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID and tables:
            raise LogUnusable(self.path, "it is another program's database: choose another file")
        if version > len(_STEPS):
            raise LogUnusable(
                self.path,
                f"its schema is version {version} and this release knows {len(_STEPS)}: upgrade it",
            )
        return int(version)

    def read_only(self) -> None:
        """Have this connection write nothing."""
        self._connection.execute("PRAGMA query_only = 1")

    def prepare(self, durability: str) -> None:
        """Make this the connection that writes, and the schema what it is in this release.

        Args:
            durability: ``full`` or ``normal``: whether a commit waits for the disk.
        """
        run = self._connection.execute
        with self._closed_if_unusable():
            run("PRAGMA journal_mode = WAL")
            run(f"PRAGMA synchronous = {'FULL' if durability == 'full' else 'NORMAL'}")
            for number, step in enumerate(_STEPS[self._version() :], self._version() + 1):
                self._connection.executescript(
                    f"BEGIN IMMEDIATE; {step} PRAGMA user_version = {number}; COMMIT;"
                )
            run("BEGIN IMMEDIATE")  # so that a file that cannot be written is known now
            run("UPDATE topics SET trimmed = trimmed WHERE number = 0")
            run("COMMIT")

    def close(self) -> None:
        """Close the connection. Again does nothing."""
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written inside, or nothing of it.

        Raises:
            LogFull: there is no room on the disk.
            LogUnusable: it could not be written for another reason.
        """
        run = self._connection.execute
        with self.errors():
            try:
                run("BEGIN IMMEDIATE")
                yield
                run("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    run("ROLLBACK")
                raise

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """SQLite's errors as those of this library, except for the one of an id that is there."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.Error as error:
            text = str(error)
            # Where it cannot grow what its processes share, it does not say that the disk is full.
            if "is full" in text or ("I/O error" in text and _is_full(self.path.parent)):
                raise LogFull(self.path) from error
            raise LogUnusable(self.path, _explain(error)) from error

    # Writing.

    def find_records(self, ids: Sequence[str]) -> dict[str, Record]:
        """The records with these ids, by id, as far as there are any."""
        found: dict[str, Record] = {}
        for some in _pieces(ids):
            rows = self._connection.execute(
                f"SELECT {_COLUMNS}, NULL FROM records WHERE id IN ({_marks(len(some))})", some
            )
            found.update((record.id, record) for record in self._records(rows))
        return found

    def insert(self, records: Sequence[Record], before: int) -> bool:
        """Store records, all or none, the first of which has so many bytes before it.

        Returns:
            False: none, for there are others with their ids.
        """
        together = dict.fromkeys(record.topics for record in records)  # few different ones
        numbers = self._number([topic for topics in together for topic in topics])
        rows: list[Any] = []  # one row's values after the other's
        places: list[int] = []
        for record in records:
            position, id_, topics, type_, private, body, metadata, timestamp, time = record
            topic = all_topics = None
            if topics:
                topic = numbers[topics[0]]
                if len(topics) > 1:
                    all_topics = json.dumps(topics)
                    for other in topics[1:]:
                        places += (numbers[other], position)
            rows += (
                *(position, id_, topic, all_topics, type_, private),
                *(body, metadata, timestamp, time, before),
            )
            before += record.size
        statement = "INSERT INTO records VALUES "
        try:
            if _fits(len(records)) and not places:
                with self.errors():  # one statement is a transaction of its own
                    self._insert(statement, 11, rows)
            else:
                with self.transaction():
                    self._insert(statement, 11, rows)
                    self._insert("INSERT INTO places VALUES ", 2, places)
        except sqlite3.IntegrityError:
            return False
        return True

    def _number(self, topics: Iterable[str]) -> dict[str, int]:
        """The numbers of these topics, and of others; who has none is given one."""
        numbers = self._numbers
        if len(numbers) > _KNOWN_TOPICS:
            numbers.clear()
        missing = list(dict.fromkeys(topic for topic in topics if topic not in numbers))
        if missing:
            numbers.update(self._numbers_of(missing))
            new = [topic for topic in missing if topic not in numbers]
            if new:
                with self.errors():
                    self._insert("INSERT INTO topics (name) VALUES ", 1, new)
                numbers.update(self._numbers_of(missing))
        return numbers

    def _insert(self, statement: str, columns: int, values: Sequence[Any]) -> None:
        """Insert rows of so many columns, many to a statement."""
        marks = f"({_marks(columns)})"
        for some in _pieces(range(len(values) // columns)):
            self._connection.execute(
                statement + ",".join([marks] * len(some)),
                values[some[0] * columns : (some[-1] + 1) * columns],
            )

    def trim(self, gone: Sequence[Record], kept: Sequence[int], first: int) -> None:
        """Take some records, and remember where they were.

        Args:
            gone: the records, in their order.
            kept: positions of those in between which stay.
            first: from where on everything is there.
        """
        last = {topic: record for record in gone for topic in record.topics}
        numbers = self._number(last)
        run = self._connection.execute
        for some in _pieces(
            [(numbers[topic], record.position) for record in gone for topic in record.topics[1:]]
        ):
            run(
                "DELETE FROM places WHERE (topic, position) IN (VALUES "
                + ",".join(["(?,?)"] * len(some))
                + ")",
                list(chain.from_iterable(some)),
            )
        for some in _pieces(
            [(numbers[topic], topic, record.position, record.id) for topic, record in last.items()]
        ):
            run(
                "INSERT INTO topics VALUES "
                + ",".join(["(?,?,?,?)"] * len(some))
                + " ON CONFLICT (number) DO UPDATE"
                " SET trimmed = excluded.trimmed, trimmed_id = excluded.trimmed_id"
                " WHERE excluded.trimmed > trimmed",
                list(chain.from_iterable(some)),
            )
        run("UPDATE retained SET first = ?", (first,))
        if gone:
            these = "position BETWEEN ? AND ?"
            given = [gone[0].position, gone[-1].position]
            if kept:
                these += f" AND position NOT IN ({_marks(len(kept))})"
                given += kept
            run(
                "INSERT INTO trimmed SELECT position, id FROM records"
                f" WHERE position > {first - 1 - _REMEMBERED:d} AND {these}",
                given,
            )
            run(f"DELETE FROM records WHERE {these}", given)
        run("DELETE FROM trimmed WHERE position < ?", (first - _REMEMBERED,))

    # Notes.

    def note(self, key: str, now: int) -> Note:
        """The note of this name; with revision 0, if there is none."""
        row = self._connection.execute(
            "SELECT value, revision FROM notes WHERE key = ? AND (expires IS NULL OR expires > ?)",
            (key, now),
        ).fetchone()
        return Note(key, {}) if row is None else Note(key, json.loads(row[0]), row[1])

    def notes(self, prefix: str, now: int) -> list[Note]:
        """The notes whose names begin so."""
        rows = self._connection.execute(
            "SELECT key, value, revision FROM notes WHERE key >= ? AND key < ?"
            " AND (expires IS NULL OR expires > ?)",
            (prefix, prefix + "\U0010ffff", now),
        ).fetchall()
        return [Note(key, json.loads(value), revision) for key, value, revision in rows]

    def set_note(self, change: Change, revision: int, now: int) -> bool:
        """Write a note, or take it away; False: it is not what it was thought to be."""
        run = self._connection.execute
        key, given = change.note.key, (change.note.revision, now)
        with self.errors():
            if change.gone:
                changed = run(
                    "DELETE FROM notes WHERE key = ? AND revision = ?", (key, change.note.revision)
                )
                return changed.rowcount > 0
            value = json.dumps(change.note.value).encode()
            keep = change.keep or (None, None)
            row = (value, revision, change.expires, *keep)
            if change.note.revision:
                changed = run(
                    "UPDATE notes SET value = ?, revision = ?, expires = ?, topic = ?, after = ?"
                    " WHERE key = ? AND revision = ? AND (expires IS NULL OR expires > ?)",
                    (*row, key, *given),
                )
            else:
                changed = run(
                    "INSERT INTO notes (key, value, revision, expires, topic, after)"
                    " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET"
                    " value = excluded.value, revision = excluded.revision,"
                    " expires = excluded.expires, topic = excluded.topic, after = excluded.after"
                    " WHERE expires <= ?",
                    (key, *row, now),
                )
            return changed.rowcount > 0

    def forget_notes(self, now: int) -> None:
        """Take away the notes whose time is over."""
        with self.errors():
            self._connection.execute("DELETE FROM notes WHERE expires <= ?", (now,))

    def kept(self) -> list[tuple[str | None, int, int | None]]:
        """The notes that keep a topic's records after a position, or go at a time."""
        return self._connection.execute(
            "SELECT topic, after, expires FROM notes WHERE topic IS NOT NULL OR expires IS NOT NULL"
        ).fetchall()

    # Reading.

    def extent(self) -> Extent:
        """What there is."""
        found = self._connection.execute(
            "SELECT first, coalesce(time, 0), coalesce(before, 0),"
            " (SELECT id FROM records ORDER BY position LIMIT 1),"
            " (SELECT max(position) FROM records),"
            " (SELECT id FROM records ORDER BY position DESC LIMIT 1)"
            " FROM retained LEFT JOIN records ON position = first"
        ).fetchone()
        first, first_time, before, first_id, last, last_id = found
        return Extent(first, first_id, first_time, before, last or first - 1, last_id)

    def bytes_until(self, position: int) -> int:
        """How many bytes all records up to one there is had, by `Record.size`."""
        rows = self._connection.execute(
            f"SELECT {_COLUMNS}, before FROM records WHERE position = ?", (position,)
        ).fetchall()
        return rows[0][-1] + self._records(rows)[0].size if rows else 0

    def _first(self) -> int:
        """From where on everything is there."""
        (first,) = self._connection.execute("SELECT first FROM retained").fetchone()
        return int(first)

    def latest(self, after: int, last: int, most: int) -> list[Record]:
        """All records after a position, or the last so many; none, if these are too many bytes."""
        after = max(after, last - most)
        rows, is_cut = self._fetch(f"{_PAGE} LIMIT ?", (after, most))
        return [] if is_cut else self._records(rows)

    def page(self, after: int, limit: int) -> list[Record]:
        """Records after a position: so many, or fewer if they are large."""
        rows, _ = self._fetch(f"{_PAGE} LIMIT ?", (after, limit))
        return self._records(rows)

    def _fetch(self, question: str, given: Sequence[Any]) -> tuple[list[Any], bool]:
        """Rows of `_COLUMNS` and more; and whether there may be others, for these are large."""
        cursor = self._connection.execute(question, given)
        rows: list[Any] = []
        size = 0
        while some := cursor.fetchmany(_FETCHED_AT_ONCE):
            rows += some
            size += sum([len(row[6]) for row in some])
            if size > _PAGE_BYTES:
                cursor.close()
                return rows, True
        return rows, False

    def page_of(self, after: int, selection: Selection, limit: int, last: int, told: int) -> Page:
        """Selected records after a position and up to another: as many as asked for, or all."""
        page = self._page_of(after, selection, limit, last, told)
        if page is None:
            with self.one_state():
                page = self._page_of(after, selection, limit, last, told)
                assert page is not None
        return page

    def _page_of(
        self, after: int, selection: Selection, limit: int, last: int, told: int
    ) -> Page | None:
        """`page_of`; None: something may be missing, which has to be asked of one state."""
        question, given = self._question(after, selection, limit, last)
        if question is None:
            is_cut = False
            first = self._first()
            records, reached = self._scan(after, selection, limit, last)
        else:
            # The first position comes with each row: one question sees one state of the file.
            rows, is_cut = self._fetch(
                f"SELECT {_COLUMNS}, (SELECT first FROM retained) FROM records {question}"
                " ORDER BY position LIMIT ?",
                (*given, limit),
            )
            first = rows[0][-1] if rows else self._first()
            records = self._records(rows)
            reached = records[-1].position if is_cut or len(records) == limit else last
        if len(records) < limit and not is_cut:
            reached = max(reached, first - 1)
        # Of what comes after this page, the next one tells.
        until = min(first - 1, reached)
        if max(after, told) < until and not self._connection.in_transaction:
            return None
        missed = self._missed(max(after, told), selection, until)
        is_last = reached >= last
        if records and records[-1].position == reached:
            cursor: str | None = records[-1].id
        else:
            cursor = self._id_at(reached)
        told = max(told, until)
        return Page(records, reached, cursor or EARLIEST, is_last, missed, told)

    def _question(
        self, after: int, selection: Selection, limit: int, until: int
    ) -> tuple[str | None, Sequence[int]]:
        """What asks for a page, and its values. None: too many topics, look at every record."""
        if selection.every:
            return "WHERE position > ? AND position <= ?", (after, until)
        numbers = self._selected(selection)
        if len(numbers) > _MOST_LINES:
            return None, ()
        lines = [
            f"SELECT * FROM (SELECT position FROM {table} WHERE topic = ? AND position > ?"
            " AND position <= ? ORDER BY position LIMIT ?)"
            for table in ("records", "places")
        ] * len(numbers)
        given = [value for n in numbers for value in (n, after, until, limit) * 2]
        return f"WHERE position IN ({' UNION '.join(lines) or 'NULL'})", given

    def _scan(
        self, after: int, selection: Selection, limit: int, until: int
    ) -> tuple[list[Record], int]:
        """A page, found by looking at every record."""
        found: list[Record] = []
        while after < until:
            for record in self.page(after, _SCANNED_AT_ONCE):
                after = record.position
                if after > until:
                    break
                if selection.matches(record.topics):
                    found.append(record)
                    if len(found) == limit:
                        return found, after
        return found, until

    def before_last(
        self, count: int, after: int, selection: Selection, until: int
    ) -> tuple[int, int]:
        """The position after which come the last `count` selected records, not before `after`.

        Returns:
            That position, and how many selected records there are between the two.
        """
        run = self._connection.execute
        with self.one_state():
            first = self._first()
            if selection.every:
                start = max(after, until - count)
                if after >= first - 1:
                    return start, start - after
                lines = ["records WHERE true"]
            else:
                numbers = ",".join(map(str, self._selected(selection)))
                lines = [f"{table} WHERE topic IN ({numbers})" for table in ("records", "places")]
            wanted = " UNION ".join(
                f"SELECT position FROM {line} AND position > {after:d} AND position <= {until:d}"
                for line in lines
            )
            found = run(
                f"SELECT position FROM ({wanted}) ORDER BY position DESC LIMIT 1 OFFSET ?",
                (count,),
            ).fetchone()
            if found is None:
                return after, 0
            (skipped,) = run(
                f"SELECT count(*) FROM ({wanted}) WHERE position <= ?", found
            ).fetchone()
            return found[0], skipped

    def locate(self, cursor: str, selection: Selection) -> Location:
        """Where a cursor is."""
        with self.one_state():
            extent = self.extent()
            position, is_there, first = self._find(cursor)
            if position is None:
                return Location("unknown", None, None, extent.first_id, extent.last_id)
            missed = self._missed(position, selection, first - 1)
            status: Any = "found" if is_there else "trimmed"
            return Location(status, position, missed, extent.first_id, extent.last_id)

    def begin(self, after: str, selection: Selection) -> Start:
        """The place at which to read on after a cursor."""
        with self.one_state():
            position, _, first = self._find(after)
            gap = Gap(after, "unknown") if position is None else None
            if position is None or after == EARLIEST:
                position = self._before_all(first, selection)
        return Start(position, position, gap, first - 1)

    def cursor_at(self, time: int) -> str:
        """The cursor before the first record that was taken at or after a time."""
        run = self._connection.execute

        def taken(position: int) -> int:
            """When the first record from this position on was; there may be holes."""
            (found,) = run(
                "SELECT time FROM records WHERE position >= ? ORDER BY position LIMIT 1",
                (position,),
            ).fetchone()
            return int(found)

        with self.one_state():
            first, last = run("SELECT min(position), max(position) FROM records").fetchone()
            if first is None:
                return EARLIEST
            # No index by time: some twenty questions are asked of a million records.
            position = first + bisect_left(range(first, last + 1), time, key=taken)
            before = run(
                "SELECT id FROM records WHERE position < ? ORDER BY position DESC LIMIT 1",
                (position,),
            ).fetchone()
            return EARLIEST if before is None else str(before[0])

    def _before_all(self, first: int, selection: Selection) -> int:
        """The position before the first selected record, if that was kept; or before `first`."""
        if self._first_of_all() >= first:
            return first - 1
        question, given = self._question(0, selection, 1, first - 1)
        if question is None:
            records, _ = self._scan(0, selection, 1, first - 1)
            found = records[0].position if records else None
        else:
            (found,) = self._connection.execute(
                f"SELECT min(position) FROM records {question}", given
            ).fetchone()
        return (found or first) - 1

    def _first_of_all(self) -> int:
        (found,) = self._connection.execute("SELECT min(position) FROM records").fetchone()
        return found or sys.maxsize

    def _find(self, cursor: str) -> tuple[int | None, bool, int]:
        """The position of a cursor, whether what it names is there; and the first position."""
        trimmed, last_of_topic, there, first = self._connection.execute(
            "SELECT (SELECT min(position) FROM trimmed WHERE id = ?1),"
            " (SELECT min(trimmed) FROM topics WHERE trimmed_id = ?1),"
            " (SELECT position FROM records WHERE id = ?1), first FROM retained",
            (cursor,),
        ).fetchone()
        if cursor == EARLIEST:
            return min(self._first_of_all(), first) - 1, True, first
        # First among what was trimmed: an id may be there and here, and who was there before has
        # not got what is in between.
        if trimmed is not None or last_of_topic is not None:
            return trimmed or last_of_topic, False, first
        return there, True, first

    def _missed(self, after: int, selection: Selection, until: int) -> int | None:
        """How many selected records between two positions were trimmed; None: some."""
        if after >= until:
            return 0
        if selection.every:
            (kept,) = self._connection.execute(
                "SELECT count(*) FROM records WHERE position > ? AND position <= ?", (after, until)
            ).fetchone()
            return until - after - int(kept)
        # Of a topic only the last one is known: it is told when the reader comes to where that was.
        here = f"trimmed > {after:d} AND trimmed <= {until:d}"
        for some in _pieces(selection.exact):
            if self._connection.execute(
                f"SELECT 1 FROM topics WHERE name IN ({_marks(len(some))}) AND {here}", some
            ).fetchone():
                return None
        if selection.patterns:
            for (name,) in self._connection.execute(
                f"SELECT name FROM topics WHERE {here} AND trimmed > 0"
            ):
                if selection.matches((name,)):
                    return None
        return 0

    def _selected(self, selection: Selection) -> list[int]:
        """The numbers of the topics that are selected."""
        numbers = self._numbers
        missing = [topic for topic in selection.exact if topic not in numbers]
        if missing:
            if len(numbers) > _KNOWN_TOPICS:
                numbers.clear()
                missing = list(selection.exact)
            numbers.update(self._numbers_of(missing))
        found = {numbers[topic] for topic in selection.exact if topic in numbers}
        for pattern in selection.patterns:
            # What comes before the first wildcard narrows them down.
            fixed = takewhile(lambda token: token not in ("*", ">"), pattern)
            prefix = "".join(token + "." for token in fixed)
            question = "SELECT number, name FROM topics"
            if prefix:
                question += " WHERE name >= ? AND name < ?"
            rows = self._connection.execute(
                question, (prefix, prefix[:-1] + "/") if prefix else ()
            ).fetchall()
            found.update(number for number, name in rows if selection.matches((name,)))
        return sorted(found)

    def _numbers_of(self, topics: Sequence[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for some in _pieces(topics):
            found.update(
                self._connection.execute(
                    f"SELECT name, number FROM topics WHERE name IN ({_marks(len(some))})", some
                )
            )
        return found

    def _id_at(self, position: int) -> str | None:
        found = self._connection.execute(
            "SELECT id FROM records WHERE position = ?1"
            " UNION ALL SELECT id FROM trimmed WHERE position = ?1",
            (position,),
        ).fetchone()
        return None if found is None else found[0]

    @contextlib.contextmanager
    def one_state(self) -> Iterator[None]:
        """One state of the file for all that is asked inside."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("ROLLBACK")

    def _records(self, rows: Iterable[Sequence[Any]]) -> list[Record]:
        """The records of rows of `_COLUMNS` and one more value."""
        names = self._names
        found: list[Record] = []
        new: Callable[[type[Record], tuple[Any, ...]], Record] = tuple.__new__
        for row in rows if isinstance(rows, list) else list(rows):
            position, id_, number, text, type_, private, body, metadata, timestamp, time, _ = row
            if text is not None:
                topics = tuple(json.loads(text))
            elif number is None:
                topics = ()
            else:
                topics = names.get(number) or self._name(number)
            # Not by `Record(...)`, which takes twice as long.
            values = (position, id_, topics, type_, private == 1, body, metadata, timestamp, time)
            found.append(new(Record, values))
        return found

    def _name(self, number: int) -> tuple[str, ...]:
        """The topic with a number, by itself."""
        if len(self._names) > _KNOWN_TOPICS:
            self._names.clear()
        found: tuple[str] = self._connection.execute(
            "SELECT name FROM topics WHERE number = ?", (number,)
        ).fetchone()
        self._names[number] = found
        return found


def _marks(number: int) -> str:
    return ",".join("?" * number)


def _pieces(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The items in as few pieces as one statement takes, of which few are of different sizes."""
    start = 0
    while start < len(items):
        left = len(items) - start
        size = left if _fits(left) else next(size for size in _MORE_AT_ONCE if size <= left)
        yield items[start : start + size]
        start += size


def _fits(number: int) -> bool:
    """Whether so many rows go into one statement."""
    return number <= _AT_ONCE or number in _MORE_AT_ONCE


def _is_full(directory: Path) -> bool:
    return shutil.disk_usage(directory).free < _LITTLE


def _explain(error: sqlite3.Error) -> str:
    """What is wrong with a file, and what can be done."""
    text = str(error)
    if "not a database" in text or "malformed" in text:
        return f"it is damaged, or no database ({text}): restore it, or choose another file"
    if "readonly" in text or "read-only" in text:
        return f"it cannot be written ({text}): look at its permissions and its directory's"
    if "unable to open" in text:
        return f"it cannot be opened ({text}): look at its permissions and its directory's"
    return text
