"""What a client that does not read, or does not end, may cost."""

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from socket import socket
from typing import Any

import httpx
import pytest

from codomyrmex.events.streaming.log import Log, MemoryLog
from codomyrmex.events.streaming.models import Event
from tests.hub.serving import PATIENCE, append, eventually, open_hub, serving
from tests.server.clients import begin_post, open_sse, open_websocket, read_to_the_end

Opener = Callable[[str], socket]
LOOPS = ["asyncio", "uvloop"]


def flood(log: Log) -> None:
    """More than the kernel and the server keep for a connection that does not read."""
    for _ in range(200):
        append(log, Event(data="x" * 100_000, metadata={"topic": "flood"}))


@pytest.mark.parametrize("opener", [open_sse, open_websocket])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_stops_reading_is_cut_off(
    opener: Opener, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = MemoryLog()
    with (
        serving(open_hub(log, write_timeout=0.3), loop=loop) as url,
        opener(url) as stopped,
    ):
        assert log.statistics().readers == 1
        flood(log)
        eventually(lambda: log.statistics().readers == 0)
        # Cut, not closed in good order, which would wait for the client to read the rest.
        eventually(lambda: url.connections() == 0)
        read_to_the_end(stopped)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("opener", [open_sse, open_websocket])
def test_others_are_not_disturbed_by_it(opener: Opener) -> None:
    log = MemoryLog()
    with (
        serving(open_hub(log, write_timeout=5)) as url,
        opener(url),
        httpx.stream("GET", f"{url}/events?topic=small", timeout=PATIENCE) as reader,
    ):
        chunks = reader.iter_raw()
        next(chunks)
        flood(log)
        begin = time.monotonic()
        for number in range(100):
            append(log, Event(data=number, metadata={"topic": "small"}))
        received = b""
        while b"data: 99\n" not in received:
            received += next(chunks)
        assert time.monotonic() - begin < 2
        assert log.statistics().readers == 2


@pytest.mark.parametrize("opener", [open_sse, open_websocket, begin_post])
@pytest.mark.parametrize("loop", LOOPS)
def test_no_client_holds_up_the_end(
    opener: Opener, loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = MemoryLog()
    hub = open_hub(log)
    with serving(hub, loop=loop) as url, opener(url), opener(url) as other:
        if opener is not begin_post:
            assert log.statistics().readers == 2
            flood(log)
        begin = time.monotonic()
        url.stop()
        assert time.monotonic() - begin < 2
        read_to_the_end(other)
    assert log.statistics().readers == 0
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


MOUNTED = """
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount
from codomyrmex.events.streaming.hub import Hub, everyone
from codomyrmex.events.streaming.server import HubServer

hub = Hub(authorize=everyone)
app = Starlette(routes=[Mount("/live", hub)])

async def start():
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)

server = HubServer(uvicorn.Config(app, port=0, log_level="warning"), hub, start=start)
server.run()
"""


def test_ctrl_c_ends_an_application_that_a_hub_is_mounted_in() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MOUNTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with httpx.stream("GET", f"{url}/live/events?topic=*", timeout=PATIENCE) as reader:
            lines = reader.iter_lines()
            assert "event: stream.connect" in lines
            begin = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert "event: stream.disconnect" in lines
        assert process.communicate(timeout=PATIENCE) == ("", "")
        assert time.monotonic() - begin < 2
        assert process.returncode == 0


@pytest.mark.parametrize("loop", LOOPS)
def test_a_websocket_that_does_not_answer_pings_is_closed(
    loop: str, caplog: pytest.LogCaptureFixture
) -> None:
    log = MemoryLog()
    pings: dict[str, Any] = {"ws_ping_interval": 0.1, "ws_ping_timeout": 0.1}
    with (
        serving(open_hub(log), loop=loop, **pings) as url,
        open_websocket(url) as silent,
    ):
        # Events go on all the time, also between the server's giving up and the connection's end.
        def publish_until_closed() -> bool:
            append(log, Event(data="x" * 10_000, metadata={"topic": "t"}))
            return url.connections() == 0

        eventually(publish_until_closed)
        eventually(lambda: log.statistics().readers == 0)
        read_to_the_end(silent)
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []
