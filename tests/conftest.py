import os
import threading
from collections.abc import Iterator

import pytest
from blockbuster import BlockBuster
from hypothesis import settings

pytest_plugins = ["codomyrmex.events.streaming.testing.plugin", "pytester"]

settings.register_profile("streaming", deadline=None, max_examples=50)
settings.register_profile("ci", settings.get_profile("streaming"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "streaming")

THREAD_GRACE = 2.0  # seconds for a thread that was told to end


@pytest.fixture(scope="session", autouse=True)
def no_blocking_call_in_the_loop() -> Iterator[None]:
    """Raise where the package reads a file, sleeps or asks SQLite in a thread that runs a loop."""
    blockbuster = BlockBuster(
        ["codomyrmex"], excluded_modules=["codomyrmex.events.streaming.testing"]
    )
    for name in ("threading.Lock.acquire", "threading.Lock.acquire_lock"):
        # Held for a few instructions by design; whether one is contended is chance.
        del blockbuster.functions[name]
    blockbuster.activate()
    yield
    blockbuster.deactivate()


@pytest.fixture(autouse=True)
def no_thread_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before]
    for thread in left:
        thread.join(THREAD_GRACE)
    assert not [thread.name for thread in left if thread.is_alive()]
