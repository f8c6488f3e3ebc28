"""A server of the user's own, with streams of a hub open, that is told to stop."""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from codomyrmex.events.streaming.hub import stopping
from codomyrmex.events.streaming.hub.stopping import listen, listen_no_more
from tests.server.clients import PATIENCE

APP = """
from contextlib import asynccontextmanager
from fastapi import FastAPI
from codomyrmex.events.streaming import Hub, everyone

hub = Hub(authorize=everyone)
app = FastAPI(lifespan=hub.lifespan)
app.mount("/live", hub)

@app.get("/")
def version():
    return 1
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def wait_for(url: str, text: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=PATIENCE).text == text:
                return
        except httpx.TransportError:
            pass
        threading.Event().wait(0.05)
    raise AssertionError(f"{url} does not answer {text}")


@pytest.fixture
def app(tmp_path: Path) -> Path:
    path = tmp_path / "myapp.py"
    path.write_text(APP)
    return path


class Server:
    def __init__(self, app: Path, *options: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "uvicorn", "myapp:app", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--log-level", "warning", *options], cwd=app.parent, start_new_session=True
        )

    def __enter__(self) -> "Server":
        wait_for(self.url, "1")
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once(app: Path, number: signal.Signals) -> None:
    with (
        Server(app) as server,
        httpx.stream("GET", f"{server.url}/live/events?topic=*", timeout=PATIENCE) as answer,
    ):
        chunks = answer.iter_bytes()
        next(chunks)
        begin = time.monotonic()
        server.process.send_signal(number)
        last = b"".join(chunks)
        assert b"event: stream.disconnect" in last
        assert b"the server is stopping" in last
        server.process.wait(PATIENCE)
        assert time.monotonic() - begin < 2


def test_it_is_started_anew_when_its_source_changes(app: Path) -> None:
    with (
        Server(app, "--reload") as server,
        httpx.stream("GET", f"{server.url}/live/events?topic=*", timeout=PATIENCE) as answer,
    ):
        next(answer.iter_raw())
        time.sleep(1.1)  # what watches looks at times of whole seconds on some systems
        app.write_text(APP.replace("return 1", "return 2"))
        wait_for(server.url, "2")


@pytest.fixture
def before() -> Iterator[list[str]]:
    """Somebody listens to signals before, as a server does."""
    heard: list[str] = []
    listener = signal.signal(signal.SIGTERM, lambda *_: heard.append("server"))
    yield heard
    signal.signal(signal.SIGTERM, listener)
    assert not stopping._listeners


def tell() -> None:
    signal.raise_signal(signal.SIGTERM)


class Hub:
    def __init__(self, heard: list[str], name: str) -> None:
        self._heard = heard
        self._name = name

    def stops(self) -> None:
        self._heard.append(self._name)


class TestListening:
    def test_all_hear_it_and_then_who_listened_before(self, before: list[str]) -> None:
        one, two = Hub(before, "one"), Hub(before, "two")
        listen(one.stops)
        listen(two.stops)
        listen(one.stops)
        tell()
        assert before == ["one", "two", "server"]
        listen_no_more(one.stops)
        listen_no_more(one.stops)
        tell()
        assert before[3:] == ["two", "server"]
        listen_no_more(two.stops)
        tell()
        assert before[5:] == ["server"]

    def test_who_is_gone_hears_nothing(self, before: list[str]) -> None:
        one, two = Hub(before, "one"), Hub(before, "two")
        listen(one.stops)
        listen(two.stops)
        del one
        gc.collect()
        tell()
        assert before == ["two", "server"]
        listen_no_more(two.stops)

    def test_who_takes_over_in_between_is_heard_too(self, before: list[str]) -> None:
        hub = Hub(before, "hub")
        listen(hub.stops)
        ours: Any = signal.getsignal(signal.SIGTERM)

        def other(*arguments: Any) -> None:
            before.append("other")
            ours(*arguments)

        signal.signal(signal.SIGTERM, other)
        tell()
        assert before == ["other", "hub", "server"]
        before.clear()
        listen(hub.stops)
        tell()
        assert before == ["hub", "other", "server"]
        listen_no_more(hub.stops)
        assert signal.getsignal(signal.SIGTERM) is other

    def test_what_nobody_listens_to_is_left_alone(self) -> None:
        hub = Hub([], "hub")
        listener = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            listen(hub.stops)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            listen_no_more(hub.stops)
        finally:
            signal.signal(signal.SIGTERM, listener)

    def test_in_another_thread_nothing_happens(self, before: list[str]) -> None:
        hub = Hub(before, "hub")
        in_a_thread(lambda: listen(hub.stops))
        tell()
        assert before == ["server"]
        listen(hub.stops)
        in_a_thread(lambda: listen_no_more(hub.stops))
        tell()
        assert before[1:] == ["server"]
        listen_no_more(hub.stops)

    def test_a_server_that_took_the_signals_back_keeps_them(self, before: list[str]) -> None:
        hub = Hub(before, "hub")
        server: Any = signal.getsignal(signal.SIGTERM)
        listen(hub.stops)
        signal.signal(signal.SIGTERM, server)
        listen_no_more(hub.stops)
        assert signal.getsignal(signal.SIGTERM) is server


def in_a_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()
