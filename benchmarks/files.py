"""Files of many events, for the lines that read them. Made once, gone when the process ends."""

import functools
import sqlite3
import tempfile
import time
from pathlib import Path

from codomyrmex.events.streaming.log.sqlite_file import SQLiteFile

TOPICS = [f"orders.{number}" for number in range(10)]


@functools.cache
def file_of(events: int) -> Path:
    """The file of a `SQLiteLog` with so many events, each of about a hundred bytes.

    They are not appended but made where they lie, which takes 4 seconds for a million.
    """
    path = _directory() / f"{events}.db"
    file = SQLiteFile(path)
    file.prepare("normal")
    file.close()
    connection = sqlite3.connect(path, isolation_level=None)
    run = connection.execute
    run("PRAGMA journal_mode = OFF")
    run("PRAGMA synchronous = OFF")
    run("PRAGMA cache_size = -200000")
    topics = [(number, topic) for number, topic in enumerate(TOPICS)]
    connection.executemany("INSERT INTO topics (number, name) VALUES (?, ?)", topics)
    run(
        """
        WITH RECURSIVE n (position) AS (
            SELECT 1 UNION ALL SELECT position + 1 FROM n WHERE position < ?1
        )
        INSERT INTO records SELECT
            position, printf('0196b2c4-7e1a-7000-8000-%012x', position), position % ?2, NULL,
            'order.paid', 0,
            CAST(printf('{"order":%d,"total":19.99,"paid":true}', position) AS BLOB), x'',
            ?3 + position, ?3 + position, (position - 1) * 90
        FROM n
        """,
        (events, len(TOPICS), time.time_ns() // 1000 - events),
    )
    run("PRAGMA journal_mode = WAL")
    connection.close()
    return path


def id_at(position: int) -> str:
    """The id of the event at a position of such a file."""
    return f"0196b2c4-7e1a-7000-8000-{position:012x}"


@functools.cache
def _directory() -> Path:
    _directories.append(tempfile.TemporaryDirectory(prefix="benchmarks-"))
    return Path(_directories[0].name)


_directories: list[tempfile.TemporaryDirectory[str]] = []
