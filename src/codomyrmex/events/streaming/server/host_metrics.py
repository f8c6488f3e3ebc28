"""How busy this machine is, once a second: events under `host.cpu`, `host.memory`, and so on.

The machine's counters are read in a thread; each reading is an event in a stream of its own. A
`StreamProcessor` makes measurements of them (rates per second, since counters only ever grow) and
publishes those. What a machine does not have, such as disk counters in some containers, has no
topic.

| topic | data |
| --- | --- |
| `host.cpu` | `percent` of all cores, `cores`, `load` (the 1 minute average; null on Windows) |
| `host.memory` | `percent`, `used` and `total` in bytes |
| `host.disk` | `read` and `written` in bytes per second; `used` and `total` in bytes, `percent` |
| `host.network` | `received` and `sent` in bytes per second |
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self

import psutil

from ..models import Event
from ..processors import StreamProcessor
from ..stream import InMemoryStream, Stream

__all__ = ["HostMetrics"]

logger = logging.getLogger(__name__)

Counters = Mapping[str, float]
_TYPE: Final = "measurement"


def _read_cpu() -> Counters | None:
    times = psutil.cpu_times()._asdict()
    # On Linux the guests' time is in `user` and `nice` already.
    total = sum(value for name, value in times.items() if not name.startswith("guest"))
    return {"total": total, "idle": times["idle"] + times.get("iowait", 0.0)}


def _read_memory() -> Counters | None:
    memory = psutil.virtual_memory()
    return {"total": memory.total, "available": memory.available}


def _read_disk() -> Counters | None:
    disk = psutil.disk_io_counters()
    if disk is None:
        return None
    usage = psutil.disk_usage(os.path.abspath(os.sep))
    return {
        "read": disk.read_bytes,
        "written": disk.write_bytes,
        "used": usage.used,
        "total": usage.total,
        "percent": usage.percent,
    }


def _read_network() -> Counters | None:
    network = psutil.net_io_counters()
    return network and {"received": network.bytes_recv, "sent": network.bytes_sent}


_READERS: Final[dict[str, Callable[[], Counters | None]]] = {
    "cpu": _read_cpu,
    "memory": _read_memory,
    "disk": _read_disk,
    "network": _read_network,
}


class _Reader:
    """Reads all counters.

    One that this machine does not have is not asked for again. One that fails is, since a machine
    in trouble (out of descriptors, say) recovers; it is told about once until then.
    """

    def __init__(self) -> None:
        self._readers = dict(_READERS)
        self._failing: set[str] = set()

    def __call__(self) -> list[Event]:
        events = []
        for name, read in list(self._readers.items()):
            try:
                counters = read()
            except Exception:
                if name not in self._failing:
                    logger.warning("the %s of this machine cannot be read", name, exc_info=True)
                self._failing.add(name)
                continue
            self._failing.discard(name)
            if counters is None:
                del self._readers[name]
                continue
            data = {"clock": time.monotonic(), **counters}
            events.append(Event(type="counters", data=data, metadata={"topic": name}))
        return events


def _rate(before: Counters, now: Counters, name: str) -> int:
    """Return bytes per second; 0 where a counter went back, as when a device is unplugged."""
    seconds = now["clock"] - before["clock"]
    return round(max(0.0, now[name] - before[name]) / seconds) if seconds > 0 else 0


def _measure_cpu(before: Counters, now: Counters) -> dict[str, Any]:
    total = now["total"] - before["total"]
    busy = total - (now["idle"] - before["idle"])
    percent = 100.0 * busy / total if total > 0 else 0.0
    return {
        "percent": round(min(max(percent, 0.0), 100.0), 1),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _measure_memory(before: Counters, now: Counters) -> dict[str, Any]:
    used = now["total"] - now["available"]
    return {"percent": round(100.0 * used / now["total"], 1), "used": used, "total": now["total"]}


def _measure_disk(before: Counters, now: Counters) -> dict[str, Any]:
    rates = {name: _rate(before, now, name) for name in ("read", "written")}
    return {**rates, **{name: now[name] for name in ("used", "total", "percent")}}


def _measure_network(before: Counters, now: Counters) -> dict[str, Any]:
    return {name: _rate(before, now, name) for name in ("received", "sent")}


_MEASURES: Final[dict[str, Callable[[Counters, Counters], dict[str, Any]]]] = {
    "cpu": _measure_cpu,
    "memory": _measure_memory,
    "disk": _measure_disk,
    "network": _measure_network,
}


class _Measurements:
    """Makes a measurement of each reading and the one before it."""

    def __init__(self) -> None:
        self._previous: dict[str, Counters] = {}

    def __call__(self, event: Event) -> Event:
        """Return the measurement; its data is None after the first reading of a counter."""
        name: str = event.metadata["topic"]
        before = self._previous.get(name)
        self._previous[name] = event.data
        return Event(
            type=_TYPE,
            data=None if before is None else _MEASURES[name](before, event.data),
            metadata={"topic": f"host.{name}"},
            timestamp=event.timestamp,
        )


class HostMetrics:
    """Publishes measurements of this machine to a stream, from `start` to `stop`.

    Args:
        target: where to.
        interval: seconds between two readings. They stay on this beat: a late one does not delay
            the next, and beats that were missed (the machine slept) are left out.
    """

    def __init__(self, target: Stream, interval: float = 1.0) -> None:
        self._readings = InMemoryStream()
        self._processor = (
            StreamProcessor(self._readings)
            .map(_Measurements())
            .filter(lambda event: event.data is not None)
            .sink(target)
        )
        self._interval = interval
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to read; the first measurements come after one interval."""
        if self._task is None:
            await self._processor.start()
            self._task = asyncio.create_task(self._read_for_ever(), name="host metrics")

    async def stop(self) -> None:
        """Stop reading and let what was read be published."""
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        await asyncio.wait([task])
        await self._processor.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def _read_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        reader = _Reader()
        beat = loop.time()
        while True:
            # A reading takes a millisecond, but longer than that on a machine in trouble, which
            # is when the loop is needed most: it waits in a thread.
            for event in await asyncio.to_thread(reader):
                await self._readings.publish(event)
            missed = (loop.time() - beat) // self._interval
            beat += (missed + 1) * self._interval
            await asyncio.sleep(beat - loop.time())
