"""The table, in Markdown, and the machine it was measured on."""

import os
import platform
import sqlite3
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.harness import Result

PEERS = (
    "aioreactive",
    "anyio",
    "blinker",
    "broadcaster",
    "culsans",
    "janus",
    "litestar",
    "msgspec",
    "orjson",
    "paho-mqtt",
    "pyee",
    "reactivex",
    "sse-starlette",
    "uvloop",
)

COLUMNS = ("work", "plain Python", "best peer", "ours", "to floor", "to peer", "reach", "")

CAPTION = """\
Deliveries per second; or a time, such as that from publish until the last consumer has the event;
or memory. Plain Python is the floor: the least one could write by hand for this one purpose. `to
floor` and `to peer` are ours divided by theirs, the median over the rounds: more is better for a
rate, less for a time and for memory. `to peer` is taken against the peer that ours does worst
against."""


def machine(core: int | None) -> dict[str, str]:
    where = "on any core" if core is None else f"everything on core {core}"
    peers = ", ".join(f"{peer} {version(peer)}" for peer in PEERS)
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {where}",
        "system": f"{platform.system()} {platform.release()}, load {os.getloadavg()[0]:.1f}",
        "interpreter": f"{platform.python_implementation()} {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}",
        "peers": peers,
    }


def heading(machine: dict[str, str], rounds: int, *, quick: bool) -> str:
    method = (
        f"median of {rounds} rounds, contenders in turns, garbage collector on, "
        "time that other processes had the core taken off"
    )
    if quick:
        method += "; so little work that the figures mean nothing"
    lines = [f"- {name}: {value}" for name, value in (machine | {"method": method}).items()]
    return "\n".join(lines) + "\n"


def table(results: list[Result]) -> str:
    rows = [COLUMNS, *map(_row, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows)


def details(results: list[Result]) -> str:
    """Every contender of every line: its median, and its worst and best run."""
    rows = ["| work | contender | median | lowest | highest |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        for contender, values in result.values.items():
            figures = (result.typical(contender), min(values), max(values))
            shown = " | ".join(_figure(result, figure) for figure in figures)
            rows.append(f"| {result.work} | {contender} | {shown} |")
    return "\n".join(rows)


def closing(results: list[Result], seconds: float) -> str:
    judged = [result for result in results if result.met() is not None]
    met = sum(result.met() is True for result in judged)
    lines = [f"{met} of {len(judged)} met, in {seconds:.0f} s."]
    lines += [f"- {failure}" for failure in failures(results)]
    return "\n".join(lines)


def failures(results: list[Result]) -> Iterator[str]:
    for result in results:
        for contender, reason in result.failures.items():
            yield f"{result.name}, {contender}: {reason}"


def as_json(machine: dict[str, str], results: list[Result], seconds: float) -> dict[str, Any]:
    lines = [
        asdict(result)
        | {
            "to_floor": result.ratio("floor"),
            "to_peer": result.ratio("peer"),
            "best_peer": result.best_peer(),
            "met": result.met(),
        }
        for result in results
    ]
    return {"machine": machine, "seconds": seconds, "lines": lines}


def _row(result: Result) -> tuple[str, ...]:
    peer = result.best_peer()
    return (
        result.work,
        _cell(result, result.floor),
        _cell(result, peer) if peer else "-",
        _cell(result, "ours"),
        _times(result.ratio("floor")),
        _times(result.ratio("peer")),
        ", ".join(map(str, result.reach)) or "-",
        {True: "met", False: "not met", None: "-"}[result.met()],
    )


def _cell(result: Result, contender: str) -> str:
    typical = result.typical(contender)
    if typical is None:
        return "failed"
    figure = _figure(result, typical)
    return figure if contender == "ours" else f"{figure} ({contender})"


def _figure(result: Result, value: float | None) -> str:
    if value is None:
        return "-"
    if result.measure == "memory":
        return f"{value / 1e6:.1f} MB"
    if result.measure in ("p99", "longest", "time"):
        return f"{value * 1e3:.2f} ms" if value >= 1e-4 else f"{value * 1e6:.1f} µs"
    return f"{value / 1e6:.2f} M/s" if value >= 1e6 else f"{value / 1e3:.0f} k/s"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} x"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()
