import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import httpx
import pytest

from codomyrmex.events.streaming.codec.sse import Decoder
from codomyrmex.events.streaming.server import serve
from tests.server.clients import (
    PATIENCE,
    begin_post,
    open_sse,
    open_websocket,
    read_to_the_end,
    read_until,
)
from tests.server.process import ServeProcess


def test_it_says_where_it_is_and_how_to_use_it() -> None:
    with ServeProcess() as served:
        assert f"Hub on {served.url} " in served.greeting
        assert f"page:     {served.url}/\n" in served.greeting
        assert "Whoever can run a program on this machine" in served.greeting
        read, publish = (
            line.partition(":")[2].strip()
            for line in served.greeting.splitlines()
            if "curl" in line
        )
        reader = subprocess.Popen(["sh", "-c", f"exec {read}"], stdout=subprocess.PIPE, text=True)
        try:
            assert reader.stdout is not None
            assert "event: stream.connect\n" in iter(reader.stdout.readline, "\n")
            done = subprocess.run(
                ["sh", "-c", publish], check=True, capture_output=True, text=True, timeout=PATIENCE
            )
            assert json.loads(done.stdout)["topic"] == "demo.hello"
            for line in reader.stdout:
                if line == 'data: {"text":"Hello"}\n':
                    break
            else:
                raise AssertionError("what was published does not arrive")
        finally:
            reader.kill()
            reader.communicate()


def test_the_machine_is_measured() -> None:
    with ServeProcess() as served:
        topics: dict[str, dict[str, float]] = {}
        query = "topic=host.*&format=event"
        with httpx.stream("GET", f"{served.url}/events?{query}", timeout=PATIENCE) as answer:
            decoder = Decoder()
            for chunk in answer.iter_raw():
                for frame in decoder.feed(chunk):
                    if frame.event == "message":
                        event = json.loads(frame.data)
                        assert event["type"] == "measurement"
                        topics[event["metadata"]["topic"]] = event["data"]
                if {"host.cpu", "host.memory", "host.network"} <= topics.keys():
                    break
        assert 0 <= topics["host.cpu"]["percent"] <= 100
        assert 0 < topics["host.memory"]["used"] < topics["host.memory"]["total"]


def test_without_metrics_and_page() -> None:
    with ServeProcess("--no-metrics", "--no-page") as served:
        assert "page:     none" in served.greeting
        assert httpx.get(served.url).status_code == 404
        query = "topic=*&format=event&last_event_id=earliest"
        with httpx.stream("GET", f"{served.url}/events?{query}", timeout=PATIENCE) as answer:
            httpx.post(f"{served.url}/events/t", content="1")
            decoder = Decoder()
            for chunk in answer.iter_raw():
                frames = [frame for frame in decoder.feed(chunk) if frame.id]
                if frames:
                    assert json.loads(frames[0].data)["metadata"] == {"topic": "t"}
                    break


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_it_ends_within_two_seconds_whatever_is_connected(
    number: signal.Signals, code: int
) -> None:
    with ServeProcess("--no-metrics") as served, ExitStack() as stack:
        reading_sse = stack.enter_context(open_sse(served.url, "quiet"))
        reading_websocket = stack.enter_context(open_websocket(served.url, "quiet"))
        for opener in (open_sse, open_websocket, begin_post):
            stack.enter_context(opener(served.url))
        stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))  # says nothing
        body = json.dumps("x" * 1_000_000)
        for _ in range(20):
            assert httpx.post(f"{served.url}/events/flood", content=body).status_code == 201
        begin = time.monotonic()
        assert served.signal(number) == code
        assert time.monotonic() - begin < 2
        assert served.errors == ""
        assert b"event: stream.disconnect" in read_to_the_end(reading_sse)
        assert b'"bye":"the server is stopping"' in read_to_the_end(reading_websocket)


def test_a_second_ctrl_c_does_no_harm() -> None:
    with ServeProcess() as served, open_sse(served.url):
        served.interrupt()
        assert served.signal(signal.SIGINT) == 0
        assert "Traceback" not in served.errors


def test_it_can_be_killed_and_started_again_at_once() -> None:
    with ServeProcess("--no-metrics") as served, open_sse(served.url):
        served.kill()
        with (
            ServeProcess("--no-metrics", port=served.port) as again,
            open_sse(again.url) as reader,
        ):
            assert again.url == served.url
            httpx.post(f"{again.url}/events/t", content='"back"')
            read_until(reader, b'data: "back"\n\n')


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "codomyrmex.events.streaming.cli", "serve", "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line


def test_localhost_is_served_on_every_address_it_has() -> None:
    found = socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)
    with ServeProcess("--no-metrics", "--host", "localhost") as served:
        for *_, address in found:
            name = str(address[0])
            name = f"[{name}]" if ":" in name else name
            answer = httpx.get(f"http://{name}:{served.port}/healthz")
            assert answer.status_code == 200


def test_on_every_address_it_warns_and_serves_by_address() -> None:
    with ServeProcess("--no-metrics", "--host", "0.0.0.0") as served:
        assert "CAUTION: whoever can reach this machine over the network" in served.greeting
        assert f"http://127.0.0.1:{served.port}/" in served.greeting
        local = f"http://127.0.0.1:{served.port}/"
        assert httpx.get(local).status_code == 200
        assert httpx.get(local, headers={"Host": "rebound.example"}).status_code == 403
        name = socket.gethostname()
        assert httpx.get(local, headers={"Host": f"{name}:{served.port}"}).status_code == 200


def test_hosts_and_origins_can_be_allowed() -> None:
    arguments = ("--allow-host", "hub.example", "--allow-origin", "https://app.example")
    with ServeProcess("--no-metrics", *arguments) as served:
        headers = {"Host": "hub.example", "Origin": "https://app.example"}
        answer = httpx.post(f"{served.url}/events/t", content="1", headers=headers)
        assert answer.status_code == 201
        headers["Origin"] = "https://other.example"
        answer = httpx.post(f"{served.url}/events/t", content="1", headers=headers)
        assert answer.status_code == 403


def test_requests_are_logged_on_demand() -> None:
    with ServeProcess("--no-metrics", "--log-level", "info") as served:
        httpx.get(f"{served.url}/healthz")
        served.signal(signal.SIGINT)
        assert '"GET /healthz HTTP/1.1" 200' in served.errors


def test_what_cannot_be_listened_on_is_an_error() -> None:
    with pytest.raises(OSError, match="assign requested address"):
        serve("192.0.2.1", 0)  # of a network for documentation
    with pytest.raises(ValueError, match="not an origin"):
        serve("127.0.0.1", 0, allowed_origins=["nonsense"])
