"""A pytest plugin that runs `async def` tests in virtual time and fails those that leak.

Enable it in the top `conftest.py`:

    pytest_plugins = ["codomyrmex.events.streaming.testing.plugin"]

It takes the async tests that carry one of its two markers:

- `@pytest.mark.virtual_time`: the test runs in a `VirtualTimeLoop`;
- `@pytest.mark.real_time`: it runs in an ordinary loop, for sockets, threads and processes.

Both run through `codomyrmex.events.streaming.testing.run`, in asyncio's debug mode, so a test that
leaves a task, a timer (in virtual time), an open async generator or an unseen exception fails with
a `LeakError`. With `streaming_async = "auto"` in pytest's configuration every async test without a
marker of pytest-asyncio, anyio or trio is taken too, in virtual time. (pytest-asyncio's own mode
`auto` puts its marker on all of them; those with a marker of this plugin still run here.) Async
tests under hypothesis' `@given` work: each example gets a loop of its own. Fixtures are ordinary
ones; async fixtures are not supported: enter an async context in the test instead.

The fixture `virtual_time` is `run`, for synchronous tests that want it for a part.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable, Generator
from typing import Any

import pytest

from .leaks import Run, run
from .virtual_time import VirtualTimeLoop

_FOREIGN_MARKERS = ("anyio", "asyncio", "trio")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the option `streaming_async`."""
    parser.addini(
        "streaming_async",
        "which async tests run in virtual time: 'marked' ones only, or all ('auto')",
        default="marked",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and refuse a misspelt option."""
    config.addinivalue_line(
        "markers", "virtual_time: the async test runs in virtual time, with a check for leaks"
    )
    config.addinivalue_line(
        "markers",
        "real_time: the async test runs in an ordinary event loop (sockets, threads, processes), "
        "with a check for leaks",
    )
    if (mode := config.getini("streaming_async")) not in ("auto", "marked"):
        raise pytest.UsageError(f"streaming_async must be 'auto' or 'marked', not {mode!r}")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Give pytest a synchronous function in the place of an async one that is ours."""
    test = pyfuncitem.obj
    # What hypothesis documents for plugins: the function under @given, to be replaced.
    given = getattr(test, "hypothesis", None)
    found = test if given is None else given.inner_test
    inner = _as_written(found)
    loop_factory = _loop_factory(pyfuncitem)
    if loop_factory is None or not inspect.iscoroutinefunction(inner):
        return (yield)

    @functools.wraps(inner)
    def in_a_loop(*args: Any, **kwargs: Any) -> Any:
        return run(inner(*args, **kwargs), loop_factory=loop_factory)

    if given is not None:
        given.inner_test = in_a_loop
        try:
            return (yield)
        finally:
            given.inner_test = found
    pyfuncitem.obj = in_a_loop
    try:
        return (yield)
    finally:
        pyfuncitem.obj = test


def _as_written(test: Any) -> Any:
    """The test itself, in place of what pytest-asyncio has put around it.

    In its mode `auto` that takes every async test, those with a marker of ours too.
    """
    made_in: str = getattr(test, "__globals__", {}).get("__name__", "")
    return test.__wrapped__ if made_in.partition(".")[0] == "pytest_asyncio" else test


def _loop_factory(item: pytest.Function) -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes the loop of a test; None if the test is not ours to run."""
    if item.get_closest_marker("real_time"):
        return asyncio.new_event_loop
    if item.get_closest_marker("virtual_time"):
        return VirtualTimeLoop
    if any(item.get_closest_marker(name) for name in _FOREIGN_MARKERS):
        return None
    return VirtualTimeLoop if item.config.getini("streaming_async") == "auto" else None


@pytest.fixture
def virtual_time() -> Run:
    """`codomyrmex.events.streaming.testing.run`, for synchronous tests."""
    return run
