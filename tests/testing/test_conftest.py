"""What tests/conftest.py promises to every test of the suite."""

import asyncio
import time
from pathlib import Path

import pytest
from blockbuster import BlockingError

from codomyrmex.events.streaming import testing


def function_of_the_package(source: str) -> dict[str, object]:
    """Run source text as if it were a module of the package."""
    path = Path(testing.__file__).parents[1] / "made_up.py"
    names: dict[str, object] = {}
    exec(compile(source, str(path), "exec"), names)
    return names


BLOCKING = {
    "sleep": """
import time

def block(path):
    time.sleep(0.01)
""",
    "file": """
def block(path):
    with open(path) as file:
        file.read()
""",
    "sqlite": """
import contextlib, sqlite3

def block(path):
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("select 1")
""",
}


@pytest.mark.parametrize("source", BLOCKING.values(), ids=BLOCKING.keys())
async def test_the_package_may_not_block_the_loop(source: str) -> None:
    block = function_of_the_package(source)["block"]
    assert callable(block)
    with pytest.raises(BlockingError):
        block(__file__)
    await asyncio.to_thread(block, __file__)


def test_the_package_may_block_where_no_loop_runs() -> None:
    block = function_of_the_package(BLOCKING["sleep"])["block"]
    assert callable(block)
    block("")


async def test_a_test_may_block_the_loop() -> None:
    time.sleep(0.001)  # noqa: ASYNC251


def test_a_thread_left_behind_fails_its_test(pytester: pytest.Pytester) -> None:
    source = Path(__file__).parents[1].joinpath("conftest.py").read_text()
    source = source.replace("THREAD_GRACE = 2.0", "THREAD_GRACE = 0.5")
    pytester.makeconftest(source.replace("pytest_plugins", "plugins"))
    pytester.makepyfile(
        """
        import threading

        stop = threading.Event()

        def test_leaves_a_thread():
            threading.Thread(target=stop.wait, name="the culprit").start()

        def test_ends_a_thread_a_little_late():
            threading.Timer(0.01, print).start()
            stop.set()
        """
    )
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*the culprit*"])
