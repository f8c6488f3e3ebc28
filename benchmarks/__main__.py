"""Command line of the benchmarks: `python -m benchmarks --help`."""

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks import batching, consumers, fanout, log, model, pipeline, report, threads, topics
from benchmarks.harness import Line, Result, compare, prepare
from benchmarks.without import compare_without

LINES: list[Line] = [
    line
    for family in (model, fanout, consumers, batching, pipeline, threads, topics, log)
    for line in family.LINES
]

MANY = 10_000_000
MANY_IN_QUICK = 100_000


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Ours beside plain Python and beside its peers, as a Markdown table.",
    )
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        help="measure this line, or all whose names begin with NAME-; may be repeated",
    )
    parser.add_argument("--rounds", type=int, default=7, help="runs of each contender (default: 7)")
    parser.add_argument("--quick", action="store_true", help="two rounds of very little work")
    parser.add_argument(
        "--events",
        type=int,
        help=f"how many a file of many has (default: {MANY:,}, for which there are 2 GB on the disk"
        " meanwhile, and it takes a minute to write them)",
    )
    parser.add_argument("--core", type=int, help="the core to run on (default: the last)")
    parser.add_argument("--details", action="store_true", help="also show every contender")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every figure to FILE")
    parser.add_argument("--list", action="store_true", help="name the lines of work and leave")
    return parser.parse_args()


def chosen(lines: list[Line], names: list[str] | None) -> list[Line]:
    if not names:
        return lines
    for name in names:
        if not any(goes_by(line, name) for line in lines):
            sys.exit(f"no line of work is called {name}; see --list")
    return [line for line in lines if any(goes_by(line, name) for name in names)]


def goes_by(line: Line, name: str) -> bool:
    return line.name == name or line.name.startswith(f"{name}-")


def main() -> int:
    options = arguments()
    events = options.events or (MANY_IN_QUICK if options.quick else MANY)
    lines = LINES + log.lines_of_many(events)
    if options.list:
        for line in lines:
            print(f"{line.name:18} {line.work}")
        return 0

    started = time.perf_counter()
    lines = chosen(lines, options.only)
    rounds = 2 if options.quick else options.rounds
    core = prepare(options.core)
    machine = report.machine(core)
    print(report.heading(machine, rounds, quick=options.quick), flush=True)

    results: list[Result] = []
    for line in lines:
        if line.without:
            result = compare_without(line, rounds, core, quick=options.quick)
        else:
            result = compare(line, rounds, quick=options.quick)
        results.append(result)
        print(f"{line.name} took {result.seconds:.1f} s", file=sys.stderr, flush=True)

    seconds = time.perf_counter() - started
    print(report.table(results))
    print(f"\n{report.CAPTION}\n")
    if options.details:
        print(f"{report.details(results)}\n")
    print(report.closing(results, seconds))
    if options.json:
        options.json.write_text(json.dumps(report.as_json(machine, results, seconds), indent=1))
    return 1 if any(report.failures(results)) else 0


if __name__ == "__main__":
    sys.exit(main())
