"""Runs the contenders of a line of work in turns and compares them.

A contender is a function (or coroutine function) that takes a `Run`: it sets itself up, does
`run.units` units of work inside `with run.timed()`, and says in `run.delivered` how many deliveries
arrived. A run that delivered anything but the expected number is a failure, not a result: nobody
wins by dropping.

Contenders of a line take turns (A B C A B C ...), and a ratio is the median of the ratios within
each round, so that a busy neighbour on the machine slows all of them alike. Garbage is collected
before each run; the collector stays on during it. What the imports left behind is frozen first: a
heap with every peer in it is not what a user has.
"""

import asyncio
import gc
import inspect
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Literal

import uvloop

from benchmarks.clock import Stopwatch, ThreadsStopwatch

RUN_SECONDS = 0.15
"""What a run is sized to take. Long enough for the clock, short enough to take turns often."""

DEADLINE_SECONDS = 30.0
"""A contender on an event loop that has not finished by then has lost deliveries."""


@dataclass(slots=True)
class Run:
    """One run of one contender: how much to do, and what came of it."""

    units: int
    width: int
    seconds: float = 0.0
    delivered: int = 0
    latencies: list[float] = field(default_factory=list)
    held: int = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        stopwatch = Stopwatch()
        yield
        self.seconds = stopwatch.seconds()

    @contextmanager
    def timed_in_all_threads(self) -> Iterator[None]:
        stopwatch = ThreadsStopwatch()
        yield
        self.seconds = stopwatch.seconds()

    @contextmanager
    def timed_with_waiting(self) -> Iterator[None]:
        """By the clock on the wall: what waits for the disk or for another thread counts.

        Garbage is collected once more, so that no one is charged for looking through what has been
        prepared for the run.
        """
        gc.collect()
        start = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - start


Contender = Callable[[Run], Awaitable[None] | None]


Measure = Literal["rate", "time", "p99", "longest", "memory"]

Against = Literal["floor", "peer", "bytes", "seconds"]


@dataclass(frozen=True, slots=True)
class Reach:
    """What ours must reach: a multiple of the floor or of every peer, or bytes, or seconds."""

    against: Against
    relation: Literal["≥", ">", "≤"]
    times: float

    def __str__(self) -> str:
        if self.against == "bytes":
            return f"{self.relation} {self.times / 1e6:g} MB"
        if self.against == "seconds":
            return f"{self.relation} {self.times * 1e3:g} ms"
        return f"{self.relation} {self.times:g} x {self.against}"

    def met(self, ratio: float) -> bool:
        match self.relation:
            case "≥":
                return ratio >= self.times
            case ">":
                return ratio > self.times
            case "≤":
                return ratio <= self.times


def at_least(times: float, against: Literal["floor", "peer"]) -> Reach:
    return Reach(against, "≥", times)


def more_than(times: float, against: Literal["floor", "peer"]) -> Reach:
    return Reach(against, ">", times)


def at_most(times: float, against: Literal["floor", "peer"]) -> Reach:
    return Reach(against, "≤", times)


def at_most_bytes(number: int) -> Reach:
    return Reach("bytes", "≤", number)


def at_most_seconds(number: float) -> Reach:
    return Reach("seconds", "≤", number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of work: who does it, how much of it, and what ours must reach.

    `width` is the number of handlers, consumers or threads. A unit of work makes `deliveries`
    deliveries. `units` fixes the size of a run; without it, runs are sized to `RUN_SECONDS`.
    `rounds` is for what takes long: so many at most. What is measured is a rate of deliveries, the
    time for one of them, the 99th percentile or the longest of the latencies that the run took
    down, or the memory that it held.
    `without` names modules that nobody may import. A line without a reach is there to inform.
    """

    name: str
    work: str
    floor: tuple[str, Contender]
    peers: Mapping[str, Contender] = field(default_factory=dict)
    ours: Contender
    reach: tuple[Reach, ...] = ()
    measure: Measure = "rate"
    rounds: int | None = None
    width: int = 1
    deliveries: int = 1
    units: int | None = None
    quick_units: int = 100
    loop: Literal["asyncio", "uvloop"] = "asyncio"
    without: tuple[str, ...] = ()

    def contenders(self) -> dict[str, Contender]:
        return {self.floor[0]: self.floor[1], **self.peers, "ours": self.ours}


@dataclass(slots=True)
class Result:
    """What each contender of a line did, round by round; why one failed, if it did."""

    name: str
    work: str
    measure: Measure
    floor: str
    peers: list[str]
    reach: list[Reach]
    values: dict[str, list[float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def typical(self, contender: str) -> float | None:
        values = self.values.get(contender)
        return median(values) if values else None

    def ratio(self, against: Against) -> float | None:
        """Ours to the floor, or to the peer that ours does worst against; or ours alone."""
        if against in ("bytes", "seconds"):
            return self.typical("ours")
        if against == "floor":
            return self._ratio_to(self.floor)
        ratios = [ratio for peer in self.peers if (ratio := self._ratio_to(peer)) is not None]
        worst = min if self.measure == "rate" else max
        return worst(ratios) if ratios else None

    def best_peer(self) -> str | None:
        ranked = [peer for peer in self.peers if self.values.get(peer)]
        best = max if self.measure == "rate" else min
        return best(ranked, key=lambda peer: median(self.values[peer])) if ranked else None

    def met(self) -> bool | None:
        """Whether ours reached all it must; None where there is nothing to reach or to compare."""
        ratios = [(reach, self.ratio(reach.against)) for reach in self.reach]
        if not ratios or any(ratio is None for _, ratio in ratios):
            return None
        return all(reach.met(ratio) for reach, ratio in ratios if ratio is not None)

    def _ratio_to(self, contender: str) -> float | None:
        ours, theirs = self.values.get("ours"), self.values.get(contender)
        if not ours or not theirs:
            return None
        return median(mine / other for mine, other in zip(ours, theirs, strict=True))


class LostDeliveries(Exception):
    """A contender delivered less, or more, than it was given."""


def prepare(core: int | None = None) -> int | None:
    """Bind this process to one core, put what has been imported out of the collector's sight.

    Returns the core, the last one by default; None where the system cannot bind.
    """
    if hasattr(os, "sched_setaffinity"):
        core = max(os.sched_getaffinity(0)) if core is None else core
        os.sched_setaffinity(0, {core})
    gc.collect()
    gc.freeze()
    return core


def compare(line: Line, rounds: int, *, quick: bool = False) -> Result:
    """Run every contender of a line `rounds` times, in turns."""
    started = time.perf_counter()
    result = Result(
        line.name, line.work, line.measure, line.floor[0], list(line.peers), list(line.reach)
    )
    units: dict[str, int] = {}
    rounds = min(rounds, line.rounds or rounds)
    for turn in range(1 + rounds):
        for name, contender in line.contenders().items():
            if name in result.failures:
                continue
            try:
                if turn == 0:
                    units[name] = line.quick_units if quick else _fitting_units(line, contender)
                else:
                    value = _value(line, _run(line, contender, units[name]))
                    result.values.setdefault(name, []).append(value)
            except Exception as error:
                result.failures[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                result.values.pop(name, None)
    result.seconds = time.perf_counter() - started
    return result


def _run(line: Line, contender: Contender, units: int) -> Run:
    run = Run(units, line.width)
    gc.collect()
    if inspect.iscoroutinefunction(contender):
        factory = uvloop.new_event_loop if line.loop == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(_within_deadline(contender(run)))
    else:
        contender(run)
    expected = units * line.deliveries
    if run.delivered != expected:
        raise LostDeliveries(f"{run.delivered} of {expected} deliveries arrived")
    return run


async def _within_deadline(work: Awaitable[None]) -> None:
    try:
        await asyncio.wait_for(work, DEADLINE_SECONDS)
    except TimeoutError:
        raise LostDeliveries(f"some had not arrived after {DEADLINE_SECONDS:g} s") from None


def _fitting_units(line: Line, contender: Contender) -> int:
    """Warm the contender up, and find how much work it does in `RUN_SECONDS`."""
    units = line.units or line.quick_units
    if line.rounds == 1:
        return units  # what is done once is not warmed up
    while True:
        seconds = _run(line, contender, units).seconds
        if line.units:
            return line.units
        fitting = max(1, round(units * RUN_SECONDS / seconds))
        if seconds >= RUN_SECONDS / 4:
            return fitting
        units = min(fitting, units * 50)


def _value(line: Line, run: Run) -> float:
    match line.measure:
        case "p99":
            return quantiles(run.latencies, n=100, method="inclusive")[98]
        case "longest":
            return max(run.latencies)
        case "memory":
            return run.held
        case "time":
            return run.seconds / run.delivered
        case "rate":
            return run.delivered / run.seconds
