"""Two tabs and a curl on one topic; the server is killed: all three go on, with every event."""

import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page

from codomyrmex.events.streaming.codec.sse import Decoder
from tests.browser.conftest import OpenPage
from tests.server.process import PATIENCE, ServeProcess

READ = """(topic) => {
  window.got = [];
  window.source = new EventSource(`events?topic=${topic}`);
  const opened = new Promise((resolve) => source.addEventListener("stream.connect", resolve));
  source.onmessage = (message) => got.push(JSON.parse(message.data));
  return opened.then(() => true);
}"""


class Curl:
    """`curl`, started again with the last id whenever it ends: what a shell script would do."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stopping = threading.Event()
        self.connected = threading.Event()
        self.got: list[Any] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        last = ""
        while not self._stopping.is_set():
            command = ["curl", "-sN", "-H", f"Last-Event-ID: {last}", self._url]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as self.process:
                assert self.process.stdout is not None
                decoder = Decoder()
                while chunk := self.process.stdout.read1(65536):  # type: ignore[attr-defined]
                    for frame in decoder.feed(chunk):
                        last = frame.id or last
                        self.connected.set()
                        if frame.event == "message":
                            self.got.append(json.loads(frame.data))
            self._stopping.wait(0.1)

    def stop(self) -> None:
        self._stopping.set()
        if self.process is not None:
            self.process.kill()
        self._thread.join(PATIENCE)


def publish(url: str, topic: str, number: int) -> None:
    """Until it is acknowledged; under an id, so that it is there once however often it is sent."""
    for _ in range(200):
        try:
            answer = httpx.post(
                f"{url}/events/{topic}?id={topic}-{number}", content=str(number), timeout=5
            )
        except httpx.TransportError:
            threading.Event().wait(0.05)
        else:
            assert answer.status_code == 201
            return
    raise AssertionError("nobody takes it")


def publish_all(url: str, numbers: range) -> None:
    for number in numbers:
        publish(url, "numbers", number)


def wait_for(page: Page, count: int) -> list[Any]:
    page.wait_for_function("(count) => window.got.length >= count", arg=count, timeout=30_000)
    found = page.evaluate("window.got")
    assert isinstance(found, list)
    return found


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on the path")
def test_nothing_is_lost_or_repeated(open_page: OpenPage, tmp_path: Path) -> None:
    log = ("--log", f"sqlite:///{tmp_path / 'events.db'}", "--no-metrics")
    with ServeProcess(*log) as served:
        port, url = served.port, served.url
        pages = [open_page(url) for _ in range(2)]
        curl = Curl(f"{url}/events?topic=numbers")
        try:
            for page in pages:
                assert page.evaluate(READ, "numbers")
            assert curl.connected.wait(PATIENCE)
            for number in range(20):
                publish(url, "numbers", number)
            served.kill()
            publisher = threading.Thread(target=publish_all, args=(url, range(20, 60)))
            publisher.start()
            with ServeProcess(*log, port=port) as again:
                threading.Event().wait(1)
                again.kill()
            with ServeProcess(*log, port=port):
                publisher.join(PATIENCE)
                expected = list(range(60))
                for page in pages:
                    assert wait_for(page, 60) == expected
                for _ in range(100):
                    if len(curl.got) >= 60:
                        break
                    threading.Event().wait(0.1)
                assert curl.got == expected
        finally:
            curl.stop()


def test_a_tab_that_was_cut_off_before_its_first_event_misses_none(
    open_page: OpenPage, tmp_path: Path
) -> None:
    log = ("--log", f"sqlite:///{tmp_path / 'events.db'}", "--no-metrics")
    with ServeProcess(*log) as served:
        page = open_page(served.url)
        publish(served.url, "quiet", 0)
        page.evaluate(READ, "quiet")
        port = served.port
        served.kill()
    with ServeProcess("--no-page", *log, port=port) as again:
        publish(again.url, "quiet", 1)
        assert wait_for(page, 1) == [1]
