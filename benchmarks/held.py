"""What a process holds in memory while it tails a whole file of events: run as a program."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from codomyrmex.events.streaming.log import EARLIEST, SQLiteLog


def held_by_a_tail(path: Path, events: int) -> tuple[int, int]:
    """How many events the tail of a file got in a child process, and the bytes it took."""
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.held", str(path), str(events)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    seen, held = child.stdout.split()
    return int(seen), int(held)


def resident() -> int:
    """Bytes of memory that this process has now; the most it had, where that cannot be told."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # noqa: PLC0415  (there is none on Windows)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def tail(path: Path, events: int, page_seen: Callable[[int], None]) -> None:
    async with SQLiteLog(path) as log:
        left = events
        async for batch in log.tail(EARLIEST, replay_limit=events):
            page_seen(len(batch))
            left -= len(batch)
            if not left:
                break


def main() -> None:
    path, events = Path(sys.argv[1]), int(sys.argv[2])
    before = most = resident()
    seen = 0

    def page_seen(size: int) -> None:
        nonlocal seen, most
        seen += size
        most = max(most, resident())

    asyncio.run(tail(path, events, page_seen))
    print(seen, most - before)


if __name__ == "__main__":
    main()
