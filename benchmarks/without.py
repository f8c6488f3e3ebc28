"""Runs one line of work in an interpreter of its own, where some modules cannot be imported."""

import pickle
import subprocess
import sys
from importlib import import_module

from benchmarks.harness import Line, Result, compare, prepare


def compare_without(line: Line, rounds: int, core: int | None, *, quick: bool) -> Result:
    """As `compare`, in a child process that cannot import what is in `line.without`."""
    order = (line.without, line.contenders()["ours"].__module__, line.name, rounds, core, quick)
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.without"],
        input=pickle.dumps(order),
        stdout=subprocess.PIPE,
        check=True,
    )
    return pickle.loads(child.stdout)


def main() -> None:
    hidden, family, name, rounds, core, quick = pickle.load(sys.stdin.buffer)
    sys.modules.update(dict.fromkeys(hidden))
    lines = import_module(family).LINES
    prepare(core)
    line = next(line for line in lines if line.name == name)
    sys.stdout.buffer.write(pickle.dumps(compare(line, rounds, quick=quick)))


if __name__ == "__main__":
    main()
