"""Logs: what a durable log costs beside the bare sqlite3 that it is made of, and one in memory.

The bare contenders write to the same tables and indexes with the same settings, rows that were made
beforehand. Where files and threads are at work, the clock on the wall counts.
"""

import asyncio
import random
import sqlite3
import tempfile
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from litestar.channels import ChannelsPlugin
from litestar.channels.backends.memory import MemoryChannelsBackend

from benchmarks.files import TOPICS, file_of, id_at
from benchmarks.harness import (
    Contender,
    Line,
    Run,
    at_least,
    at_most,
    at_most_bytes,
    at_most_seconds,
)
from benchmarks.held import held_by_a_tail
from benchmarks.model import DATA
from benchmarks.processes import append_side_by_side
from codomyrmex.events.streaming import Event
from codomyrmex.events.streaming.log import (
    EARLIEST,
    Log,
    MemoryLog,
    Record,
    Retention,
    SQLiteLog,
)

BATCH = 1000
PAGE = 1000
TASKS = 64
PROCESSES = 4
SHARED_BATCH = 100
READERS = 100
HISTORY = 1000

Durability = Literal["normal", "full"]


@contextmanager
def new_file() -> Iterator[Path]:
    """The name of a file that is not there yet, and not any more afterwards."""
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        yield Path(directory) / "log.db"


def new_events(number: int) -> list[Event]:
    """Events whose ids have been drawn."""
    events = [
        Event(data=DATA, type="order.paid", metadata={"topic": TOPICS[count % len(TOPICS)]})
        for count in range(number)
    ]
    for event in events:
        event.id  # noqa: B018
    return events


def new_records(number: int) -> list[Record]:
    return [Record.of(event) for event in new_events(number)]


def batches(items: list[Any], size: int = BATCH) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def dealt(items: list[Any]) -> list[list[Any]]:
    """The items for each of the tasks, who take turns: so they come in their order, as a rule."""
    return [items[task::TASKS] for task in range(TASKS)]


# Plain sqlite3, with the tables of a log.


async def bare_connection(path: Path, durability: Durability) -> sqlite3.Connection:
    async with SQLiteLog(path, durability=durability) as log:
        await log.append([])
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute(f"PRAGMA synchronous = {durability}")
    connection.executemany(
        "INSERT INTO topics (number, name) VALUES (?, ?)", list(enumerate(TOPICS))
    )
    return connection


def bare_rows(records: list[Record]) -> list[tuple[Any, ...]]:
    numbers = {topic: number for number, topic in enumerate(TOPICS)}
    rows: list[tuple[Any, ...]] = []
    before = 0
    for position, record in enumerate(records, 1):
        topic = numbers[record.topics[0]]
        rows.append((position, record.id, topic, None, *record[3:8], record.timestamp, before))
        before += record.size
    return rows


def insertion(number: int) -> str:
    return "INSERT INTO records VALUES " + ",".join(["(?,?,?,?,?,?,?,?,?,?,?)"] * number)


def count_rows(connection: sqlite3.Connection) -> int:
    (number,) = connection.execute("SELECT count(*) FROM records").fetchone()
    connection.close()
    return number


# Appending.


def appended_by(processes: int) -> Contender:
    def append_to_one_file(run: Run) -> None:
        with new_file() as path:
            run.seconds, *run.latencies = append_side_by_side(
                path, processes, run.units * PROCESSES, SHARED_BATCH
            )
        run.delivered = len(run.latencies) * SHARED_BATCH

    return append_to_one_file


async def bare_insert_of_batches(run: Run) -> None:
    rows = bare_rows(new_records(run.units * BATCH))
    given = [list(chain.from_iterable(some)) for some in batches(rows)]
    statement = insertion(BATCH)
    with new_file() as path:
        connection = await bare_connection(path, "normal")
        with run.timed_with_waiting():
            for values in given:
                connection.execute(statement, values)
        run.delivered = count_rows(connection)


def append_batches_of(make: Callable[[int], list[Any]]) -> Contender:
    async def append_batches(run: Run) -> None:
        given = batches(make(run.units * BATCH))
        with new_file() as path:
            async with SQLiteLog(path, durability="normal") as log:
                await log.append([])
                with run.timed_with_waiting():
                    for batch in given:
                        await log.append(batch)
                run.delivered = log.statistics().records

    return append_batches


def a_commit_per_event(durability: Durability) -> Contender:
    async def insert_one_by_one(run: Run) -> None:
        rows = bare_rows(new_records(run.units * TASKS))
        statement = insertion(1)
        with new_file() as path:
            connection = await bare_connection(path, durability)
            with run.timed_with_waiting():
                for row in rows:
                    connection.execute(statement, row)
            run.delivered = count_rows(connection)

    return insert_one_by_one


def append_from_tasks(durability: Durability) -> Contender:
    async def append_one_by_one(run: Run) -> None:
        given = dealt(new_records(run.units * TASKS))
        with new_file() as path:
            async with SQLiteLog(path, durability=durability) as log:
                await log.append([])
                with run.timed_with_waiting():
                    await in_tasks(given, log.append)
                run.delivered = log.statistics().records

    return append_one_by_one


async def in_tasks(given: list[list[Any]], append: Callable[[list[Any]], Awaitable[Any]]) -> None:
    """Append what each of the tasks was given, an event at a time."""

    async def task(records: list[Any]) -> None:
        for record in records:
            await append([record])

    async with asyncio.TaskGroup() as tasks:
        for records in given:
            tasks.create_task(task(records))


@contextmanager
def a_busy_loop() -> Iterator[None]:
    """Something else computes in the event loop, a millisecond at a time."""

    async def compute() -> None:
        while True:
            until = time.perf_counter() + 0.001
            while time.perf_counter() < until:
                pass
            await asyncio.sleep(0)

    task = asyncio.create_task(compute())
    try:
        yield
    finally:
        task.cancel()


@contextmanager
def an_idle_loop() -> Iterator[None]:
    yield


async def append_timed(
    run: Run, given: list[list[Any]], append: Callable[[list[Any]], Awaitable[Any]]
) -> None:
    async def timed(records: list[Any]) -> None:
        start = time.perf_counter()
        await append(records)
        run.latencies.append(time.perf_counter() - start)

    with run.timed_with_waiting():
        await in_tasks(given, timed)


def latency_of_a_thread(loop: Callable[[], Any]) -> Contender:
    async def a_thread_that_commits_each(run: Run) -> None:
        given = dealt(bare_rows(new_records(run.units * TASKS)))
        statement = insertion(1)
        with new_file() as path, ThreadPoolExecutor(1) as thread:
            connection = await bare_connection(path, "normal")

            async def append(rows: list[Any]) -> None:
                running = asyncio.get_running_loop()
                await running.run_in_executor(thread, connection.execute, statement, rows[0])

            with loop():
                await append_timed(run, given, append)
            run.delivered = count_rows(connection)

    return a_thread_that_commits_each


def latency_of_append(loop: Callable[[], Any]) -> Contender:
    async def append_in_tasks(run: Run) -> None:
        given = dealt(new_records(run.units * TASKS))
        with new_file() as path:
            async with SQLiteLog(path, durability="normal") as log:
                await log.append([])
                with loop():
                    await append_timed(run, given, log.append)
                run.delivered = log.statistics().records

    return append_in_tasks


# Reading.


def bare_select(run: Run) -> None:
    connection = sqlite3.connect(file_of(run.units))
    with run.timed_with_waiting():
        rows = connection.execute("SELECT * FROM records WHERE position > 0 ORDER BY position")
        while page := rows.fetchmany(PAGE):
            run.delivered += len(page)
    connection.close()


def read_pages(*, decoded: bool) -> Contender:
    def read_all(run: Run) -> None:
        asyncio.run(read_file(run, file_of(run.units), decoded=decoded))

    return read_all


async def read_file(run: Run, path: Path, *, decoded: bool) -> None:
    async with SQLiteLog(path) as log:
        await log.append([])
        cursor = EARLIEST
        with run.timed_with_waiting():
            while batch := await log.read(cursor, limit=PAGE):
                cursor = batch.cursor
                if decoded:
                    run.delivered += len([record.event() for record in batch])
                else:
                    run.delivered += len(batch)


def tailed_by(readers: int) -> Contender:
    async def append_and_tail(run: Run) -> None:
        with new_file() as path:
            async with SQLiteLog(path, durability="normal") as log:
                await log.append([])
                await tail_live(run, log, readers)

    return append_and_tail


async def tail_live(run: Run, log: Log, readers: int) -> None:
    """One writer, and readers of all it writes. A delivery is one that everybody got."""
    records = [Record.of(event, topics=["orders"]) for event in new_events(run.units)]
    seen: list[int] = []

    async def reader() -> None:
        number = 0
        async for batch in log.tail(topics="orders"):
            number += len(batch)
            if number == run.units:
                break
        seen.append(number)
        if len(seen) == readers:
            everybody.set_result(None)

    everybody = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(readers):
            tasks.create_task(reader())
        await asyncio.sleep(0.05)  # they find their place
        with run.timed_with_waiting():
            for record in records:
                await log.append([record])
            await everybody
    run.delivered = min(seen)


# Files of many events: what does not depend on how many there are.


def on_file(events: int, work: Callable[[Run, Path, int], Awaitable[None]]) -> Contender:
    def work_on_file(run: Run) -> None:
        asyncio.run(work(run, file_of(events), events))

    return work_on_file


async def open_file(run: Run, path: Path, _events: int) -> None:
    with run.timed_with_waiting():
        for _ in range(run.units):
            async with SQLiteLog(path) as log:
                await log.append([])
            run.delivered += 1


async def locate_cursors(run: Run, path: Path, events: int) -> None:
    cursors = [id_at(random.randint(1, events)) for _ in range(run.units)]
    async with SQLiteLog(path) as log:
        await log.append([])
        with run.timed_with_waiting():
            for cursor in cursors:
                location = await log.locate(cursor)
                run.delivered += location.status == "found"


async def read_somewhere(run: Run, path: Path, events: int) -> None:
    cursors = [id_at(random.randint(1, events - PAGE)) for _ in range(run.units)]
    async with SQLiteLog(path) as log:
        await log.append([])
        with run.timed_with_waiting():
            for cursor in cursors:
                run.delivered += len(await log.read(cursor, limit=PAGE)) == PAGE


def held_while_tailing(events: int) -> Contender:
    def read_in_a_child(run: Run) -> None:
        seen, run.held = held_by_a_tail(file_of(events), events)
        run.delivered = seen // events

    return read_in_a_child


# In memory.


def list_and_indexes(size: int) -> Contender:
    """The least that has a history, and readers who each have a place in it."""

    def append_and_read(run: Run) -> None:
        given = batches(new_records(run.units * size), size)
        events: list[Record] = []
        places = [0] * run.width
        with run.timed_with_waiting():
            for batch in given:
                for record in batch:
                    events.append(record)  # noqa: PERF402  (one at a time)
                for reader, place in enumerate(places):
                    page = events[place : place + PAGE]
                    places[reader] += len(page)
                    for _ in page:
                        run.delivered += 1

    return append_and_read


def memory_log(size: int) -> Contender:
    async def append_and_read(run: Run) -> None:
        given = batches(new_records(run.units * size), size)
        async with MemoryLog() as log:
            tails = [log.tail(EARLIEST) for _ in range(run.width)]
            with run.timed_with_waiting():
                for batch in given:
                    await log.append(batch)
                    for tail in tails:
                        for _ in await anext(tail):
                            run.delivered += 1
            for tail in tails:
                await tail.aclose()

    return append_and_read


async def history_of_a_deque(run: Run) -> None:
    history: deque[Record] = deque(maxlen=HISTORY)
    records = new_records(HISTORY)
    with run.timed_with_waiting():
        for _ in range(run.units):
            for record in records:
                history.append(record)
            for _ in range(run.width):
                for _ in list(history):
                    run.delivered += 1


async def history_of_litestar(run: Run) -> None:
    """One subscriber stays: with the last one that goes, the history goes."""
    bodies = [record.body for record in new_records(HISTORY)]
    plugin = ChannelsPlugin(MemoryChannelsBackend(history=HISTORY), channels=["orders"])
    async with plugin:
        stays = (await plugin.subscribe("orders")).iter_events()
        with run.timed_with_waiting():
            for _ in range(run.units):
                for body in bodies:
                    await plugin.wait_published(body, "orders")
                for _ in bodies:
                    await anext(stays)
                for _ in range(run.width):
                    subscriber = await plugin.subscribe("orders", history=HISTORY)
                    events = subscriber.iter_events()
                    for _ in bodies:
                        await anext(events)
                        run.delivered += 1
                    await events.aclose()
                    await plugin.unsubscribe(subscriber)


async def history_of_memory_log(run: Run) -> None:
    given = [
        [Record.of(event, topics=["orders"]) for event in new_events(HISTORY)]
        for _ in range(run.units)
    ]
    async with MemoryLog(Retention(count=HISTORY)) as log:
        with run.timed_with_waiting():
            for records in given:
                for record in records:
                    await log.append([record])
                for _ in range(run.width):
                    tail = log.tail(topics="orders", last=HISTORY)
                    for _ in await anext(tail):
                        run.delivered += 1
                    await tail.aclose()


LINES = [
    *(
        Line(
            name=f"log-append-{kind}",
            work=f"log: append batches of {BATCH} {kind}, `normal`",
            floor=("one multi-row INSERT each", bare_insert_of_batches),
            ours=append_batches_of(make),
            reach=(at_least(0.6, "floor"),) if make is new_records else (),
            deliveries=BATCH,
            units=30,
            quick_units=1,
        )
        for kind, make in (("records", new_records), ("events", new_events))
    ),
    *(
        Line(
            name=f"log-tasks-{durability}",
            work=f"log: append from {TASKS} tasks, `{durability}`",
            floor=("a commit per event", a_commit_per_event(durability)),
            ours=append_from_tasks(durability),
            reach=(at_least(times, "floor"),),
            width=TASKS,
            deliveries=TASKS,
            units=units,
            quick_units=2,
        )
        for durability, times, units in (("normal", 1.8, 150), ("full", 8.0, 20))
    ),
    *(
        Line(
            name=f"log-latency-{name}",
            work=f"log: append from {TASKS} tasks, p99, {name} loop",
            floor=("a thread that commits each", latency_of_a_thread(loop)),
            ours=latency_of_append(loop),
            measure="p99",
            width=TASKS,
            deliveries=TASKS,
            units=units,
            quick_units=2,
        )
        for name, loop, units in (("idle", an_idle_loop, 100), ("busy", a_busy_loop, 10))
    ),
    Line(
        name="log-read-records",
        work="log: read 1,000,000 events, as records",
        floor=("SELECT, fetchmany", bare_select),
        ours=read_pages(decoded=False),
        reach=(at_least(0.5, "floor"),),
        units=1_000_000,
        quick_units=10_000,
        rounds=3,
    ),
    Line(
        name="log-read-events",
        work="log: read 100,000 events, decoded",
        floor=("SELECT, fetchmany", bare_select),
        ours=read_pages(decoded=True),
        units=100_000,
        quick_units=10_000,
    ),
    Line(
        name="log-tail",
        work=f"log: tail by {READERS} readers, an event",
        floor=("1 reader", tailed_by(1)),
        ours=tailed_by(READERS),
        reach=(at_most(10.0, "floor"),),
        measure="time",
        width=READERS,
        units=500,
        quick_units=10,
    ),
    *(
        Line(
            name=f"log-processes-{name}",
            work=f"log: {PROCESSES} processes append batches of {SHARED_BATCH}{what}",
            floor=("1 process", appended_by(1)),
            ours=appended_by(PROCESSES),
            reach=(reach,),
            measure=measure,
            width=PROCESSES,
            deliveries=PROCESSES * SHARED_BATCH,
            units=units,
            quick_units=2,
        )
        for name, what, measure, reach, units in (
            ("rate", "", "rate", at_least(0.8, "floor"), 200),
            ("wait", ", the longest wait", "longest", at_most_seconds(0.2), 200),
        )
    ),
    *(
        Line(
            name=f"log-memory-{size}",
            work=f"memory log: append {size}, read by {READERS} cursors",
            floor=("list, an index each", list_and_indexes(size)),
            ours=memory_log(size),
            reach=(at_least(0.5, "floor"),),
            width=READERS,
            deliveries=READERS * size,
            units=20_000 // size,
            quick_units=2,
        )
        for size in (100, BATCH)
    ),
    Line(
        name="log-memory-history",
        work=f"memory log: last {HISTORY} to {READERS} who come",
        floor=("deque", history_of_a_deque),
        # broadcaster has no history.
        peers={"Litestar channels": history_of_litestar},
        ours=history_of_memory_log,
        width=READERS,
        deliveries=READERS * HISTORY,
        units=2,
        quick_units=1,
    ),
]

FEW = 10_000


def lines_of_many(events: int) -> list[Line]:
    """The lines about files of many events."""
    return [
        *(
            Line(
                name=f"log-many-{name}",
                work=f"log of {events:,} events: {what}",
                floor=(f"with {FEW:,}", on_file(FEW, work)),
                ours=on_file(events, work),
                reach=(at_most(2.0, "floor"),),
                measure="time",
                units=units,
                quick_units=2,
            )
            for name, what, work, units in (
                ("open", "open", open_file, 30),
                ("locate", "locate a cursor", locate_cursors, 500),
                ("page", f"read {PAGE}", read_somewhere, 50),
            )
        ),
        Line(
            name="log-many-held",
            work=f"log of {events:,} events: memory while tailing all",
            floor=(f"with {FEW:,}", held_while_tailing(FEW)),
            ours=held_while_tailing(events),
            reach=(at_most_bytes(50_000_000),),
            measure="memory",
            units=1,
            quick_units=1,
            rounds=1,
        ),
    ]
