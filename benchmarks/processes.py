"""Processes that append to one file side by side; what each of them does is a program by itself."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.model import DATA
from codomyrmex.events.streaming import Event
from codomyrmex.events.streaming.log import Record, SQLiteLog


def append_side_by_side(path: Path, processes: int, batches: int, size: int) -> list[float]:
    """Have processes append so many batches in all, as fast as they can.

    Returns:
        The seconds that all of them took together, and after that what each batch waited.
    """
    command = [sys.executable, "-m", "benchmarks.processes", str(path)]
    command += [str(batches // processes), str(size)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()  # it has the file open
    start = time.perf_counter()
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    waits: list[float] = []
    for child in children:
        assert child.stdout is not None
        waits += map(float, child.stdout.readline().split())
    seconds = time.perf_counter() - start
    for child in children:
        child.communicate()
    return [seconds, *waits]


async def append(path: Path, batches: int, size: int) -> list[float]:
    """Append batches, and return what each waited."""
    waits: list[float] = []
    async with SQLiteLog(path, durability="normal") as log:
        given = [
            [
                Record.of(Event(data=DATA, type="order.paid", metadata={"topic": "orders"}))
                for _ in range(size)
            ]
            for _ in range(batches)
        ]
        await log.append([])
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        for records in given:
            start = time.perf_counter()
            await log.append(records)
            waits.append(time.perf_counter() - start)
    return waits


if __name__ == "__main__":
    print(*asyncio.run(append(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))), flush=True)
