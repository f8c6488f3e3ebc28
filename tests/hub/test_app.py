import asyncio
import json
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from codomyrmex.events.streaming.codec.sse import Decoder
from codomyrmex.events.streaming.hub import Hub
from codomyrmex.events.streaming.log import Log
from codomyrmex.events.streaming.models import Event
from tests.hub.serving import PATIENCE, ServedUrl, append, error_of, open_hub, serving


def test_health(client: httpx.Client) -> None:
    answer = client.get("/healthz")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok"}
    assert client.get("/healthz", headers={"Host": "10.1.2.3:9"}).status_code == 200


@pytest.mark.parametrize("path", ["/nothing", "/event", "/healthz/", "/events.json", "/ws/"])
def test_an_unknown_path(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert path in error_of(answer)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/events", "GET, HEAD, OPTIONS"),
        ("PUT", "/events", "GET, HEAD, OPTIONS"),
        ("GET", "/events/t", "POST, OPTIONS"),
        ("HEAD", "/events/t", "POST, OPTIONS"),
        ("DELETE", "/events/t", "POST, OPTIONS"),
        ("PUT", "/events/t", "POST, OPTIONS"),
        ("POST", "/", "GET, HEAD, OPTIONS"),
        ("POST", "/page/page.js", "GET, HEAD, OPTIONS"),
        ("POST", "/healthz", "GET, HEAD, OPTIONS"),
        ("POST", "/ws", "GET, OPTIONS"),
    ],
)
def test_a_wrong_method(client: httpx.Client, method: str, path: str, allowed: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == 405
    assert answer.headers["allow"] == allowed
    if method != "HEAD":
        assert method in error_of(answer)


def test_the_methods_of_a_path(client: httpx.Client) -> None:
    answer = client.options("/events/t")
    assert answer.status_code == 204
    assert answer.headers["allow"] == "POST, OPTIONS"
    assert client.options("/nothing").status_code == 404


@pytest.mark.parametrize("path", ["/", "/events?topic=a", "/page/page.js"])
def test_a_rebound_name_reads_nothing(client: httpx.Client, path: str) -> None:
    answer = client.get(path, headers={"Host": "rebound.example"})
    assert answer.status_code == 403
    assert "rebound.example" in error_of(answer)


def test_a_rebound_name_publishes_nothing(client: httpx.Client, log: Log) -> None:
    headers = {"Host": "rebound.example", "Origin": "http://rebound.example"}
    assert client.post("/events/t", content="1", headers=headers).status_code == 403
    assert log.statistics().appended == 0


@pytest.mark.parametrize("origin", ["http://evil.example", "null"])
def test_a_foreign_page_publishes_and_reads_nothing(
    client: httpx.Client, log: Log, origin: str
) -> None:
    headers = {"Origin": origin}
    for answer in (
        client.post("/events/t", content="1", headers=headers),
        client.get("/events?topic=a", headers=headers),
        client.options("/events/t", headers={**headers, "Access-Control-Request-Method": "POST"}),
    ):
        assert answer.status_code == 403
        assert origin in error_of(answer)
        assert "access-control-allow-origin" not in answer.headers
    assert log.statistics().appended == 0


def test_its_own_page_publishes(client: httpx.Client, url: str) -> None:
    answer = client.post("/events/t", content="1", headers={"Origin": url})
    assert answer.status_code == 201
    assert "access-control-allow-origin" not in answer.headers


def test_an_allowed_page_publishes_and_reads(client: httpx.Client) -> None:
    origin = "https://friend.example"
    asking = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
    }
    preflight = client.options("/events/t", headers=asking)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == origin
    assert preflight.headers["access-control-allow-methods"] == "POST"
    assert "content-type" in preflight.headers["access-control-allow-headers"]
    posted = client.post("/events/t", content="1", headers={"Origin": origin})
    assert posted.status_code == 201
    wrong = client.post("/events/t", content="{", headers={"Origin": origin})
    assert wrong.status_code == 400
    with client.stream("GET", "/events?topic=a", headers={"Origin": origin}) as read:
        for answer in (posted, wrong, read):
            assert answer.headers["access-control-allow-origin"] == origin
            assert answer.headers["vary"] == "origin"


@pytest.mark.parametrize("name", ["Host", "Origin", "Last-Event-ID", "If-None-Match"])
def test_a_header_that_must_be_single_is(url: ServedUrl, name: str) -> None:
    path = "/" if name == "If-None-Match" else "/events?topic=a"
    lines = [f"GET {path} HTTP/1.1", f"Host: {url.host}", f"{name}: {url}", f"{name}: {url}"]
    if name == "Host":
        del lines[1]
    with url.connect() as connection:
        connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode())
        with connection.makefile("rb") as answer:
            text = answer.read().decode()
    assert text.startswith("HTTP/1.1 400 ")
    assert f"more than one {name.title()} header" in text


def test_a_request_without_a_host_is_refused(url: ServedUrl) -> None:
    with url.connect() as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with connection.makefile("rb") as answer:
            text = answer.read().decode()
    assert " 400 " in text.splitlines()[0]
    assert "no Host header" in text


def test_it_can_be_mounted_below_a_path(log: Log) -> None:
    hub = open_hub(log)
    app = Starlette(routes=[Mount("/live", hub)])
    with serving(hub, app) as url, httpx.Client(base_url=url, timeout=PATIENCE) as client:
        assert client.get("/live/").text.startswith("<!doctype html>")
        assert client.get("/live/page/page.js").status_code == 200
        assert client.get("/live/healthz").json() == {"status": "ok"}
        assert client.get("/live/live/healthz").status_code == 404
        assert client.get("/live", follow_redirects=True).url.path == "/live/"
        with client.stream("GET", "/live/events?topic=a/b") as answer:
            chunks = answer.iter_raw()
            next(chunks)
            posted = client.post("/live/events/a/b", content="1")
            assert posted.json()["topic"] == "a/b"
            assert f"id: {posted.json()['id']}".encode() in next(chunks)
        with connect(f"{url.websocket}/live/ws?topic=a") as websocket:
            assert "subscribed" in json.loads(websocket.recv(PATIENCE))


def test_below_the_root_path_of_a_proxy(log: Log) -> None:
    # uvicorn's option: the proxy cuts the prefix off, and the server puts it before the path.
    with serving(open_hub(log), root_path="/live") as url:
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.post(f"{url}/events/t", content="1").json()["topic"] == "t"


@pytest.mark.parametrize(
    ("path", "root_path", "location"),
    [
        ("/live", "/live", "/live/"),
        ("", "/a b/live", "/a%20b/live/"),
        ("/live", "/live/", "/live/"),
    ],
)
def test_the_mount_point_itself_leads_to_the_page(path: str, root_path: str, location: str) -> None:
    status, headers, _ = ask(open_hub(), path=path, root_path=root_path)
    assert status == 308
    assert headers[b"location"].decode() == location


def test_without_a_mount_point_an_empty_path_is_the_page() -> None:
    assert ask(open_hub(), path="")[0] == 200


def test_frameworks_that_cut_off_the_mount_point() -> None:
    assert ask(open_hub(), path="/healthz", root_path="/live")[0] == 200
    assert ask(open_hub(), path="/lively", root_path="/live")[0] == 404


@pytest.mark.parametrize(
    ("path", "raw_path", "status"),
    [
        ("/healthz/", b"/live/healthz", 200),
        ("/page/page.js/", b"/live/page/page.js", 200),
        ("/healthz/", b"/live/healthz/", 404),
        ("/healthz/", b"/live/healthz/?probe=/a", 404),
        ("/healthz/", None, 404),
        ("/", b"/live/", 200),
    ],
)
def test_a_framework_that_puts_a_slash_behind_every_path(
    path: str, raw_path: bytes | None, status: int
) -> None:
    # Litestar does, and says nothing about where the hub is mounted.
    assert ask(open_hub(), path=path, raw_path=raw_path)[0] == status


def test_the_slash_at_the_end_of_a_topic_is_its_own() -> None:
    for raw_path, topic in ((b"/a", "a"), (b"/a/", "a/"), (b"/a%2F", "a/"), (b"/a%2f", "a/")):
        raw_path = b"/live/events" + raw_path
        _, _, body = ask(open_hub(), method="POST", path="/events/a/", raw_path=raw_path, body=b"1")
        assert json.loads(body)["topic"] == topic


@pytest.mark.parametrize(
    ("raw_path", "location"), [(b"/live", "/live/"), (b"//evil.example", "/evil.example/")]
)
def test_what_was_asked_for_tells_the_mount_point(raw_path: bytes, location: str) -> None:
    status, headers, _ = ask(open_hub(), path="/", raw_path=raw_path)
    assert status == 308
    assert headers[b"location"].decode() == location


def ask(hub: Hub, body: bytes = b"", **scope: Any) -> tuple[int, dict[bytes, bytes], bytes]:
    """Ask without a server: status, headers and body of the answer."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: Any) -> None:
        sent.append(message)

    asked = {
        "type": "http",
        "method": "GET",
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
        "server": None,
        **scope,
    }
    asyncio.run(hub(asked, receive, send))
    start, rest = sent
    return start["status"], dict(start["headers"]), rest["body"]


def test_other_scopes_are_not_its_own() -> None:
    with pytest.raises(NotImplementedError, match="ftp"):
        ask(open_hub(), type="ftp")


def test_lifespan() -> None:
    hub = open_hub()
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = []

    async def receive() -> dict[str, str]:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(hub({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert ask(hub, path="/healthz")[0] == 503


def test_a_handshake_is_refused_where_the_server_cannot_carry_a_reason() -> None:
    sent = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/no", "query_string": b"", "server": None}
    headers = [(b"host", b"localhost")]
    asyncio.run(open_hub()({**scope, "headers": headers}, receive, send))
    [message] = sent
    assert message["type"] == "websocket.close"
    assert message["code"] == 1008
    assert "/no" in message["reason"]


def test_closing_ends_what_is_open_and_tells_why() -> None:
    hub = open_hub()
    with serving(hub) as url, ExitStack() as stack:
        client = stack.enter_context(httpx.Client(base_url=url, timeout=PATIENCE))
        answer = stack.enter_context(client.stream("GET", "/events?topic=a"))
        chunks = answer.iter_raw()
        next(chunks)
        websocket = stack.enter_context(connect(f"{url.websocket}/ws?topic=a"))
        websocket.recv(PATIENCE)
        assert hub.log.statistics().readers == 2
        url.run(hub.aclose())
        url.run(hub.aclose())

        [frame] = Decoder().feed(b"".join(chunks))
        assert frame.event == "stream.disconnect"
        assert json.loads(frame.data) == {"reason": "the hub is closing"}
        assert frame.retry is not None
        assert json.loads(websocket.recv(PATIENCE)) == {"bye": "the hub is closing"}
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(PATIENCE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012
        assert hub.log.statistics().readers == 0

        for method, path in (
            ("GET", "/events?topic=a"),
            ("POST", "/events/t"),
            ("GET", "/healthz"),
        ):
            refused = httpx.request(method, url + path, content=b"1")
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert "closing" in error_of(refused)


def test_closing_does_not_wait_for_a_body_that_does_not_come(url: ServedUrl, hub: Hub) -> None:
    with url.connect() as connection:
        connection.sendall(
            f"POST /events/t HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: 5\r\n"
            "Expect: 100-continue\r\n\r\n".encode()
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")  # it waits for the body
        connection.sendall(b"12")
        url.run(hub.aclose())
        assert connection.recv(1000).startswith(b"HTTP/1.1 503 ")


@pytest.mark.virtual_time
async def test_a_body_that_trickles_in_is_refused_in_time() -> None:
    loop = asyncio.get_running_loop()
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(5)
        return {"type": "http.request", "body": b"1", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/events/t", "query_string": b""}
    headers = [(b"host", b"localhost")]
    await open_hub()({**scope, "headers": headers, "server": None}, receive, send)
    assert loop.time() == 30.0
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]


def test_a_client_that_leaves_during_the_handshake_is_no_error() -> None:
    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        raise ConnectionResetError

    for path in ("/ws", "/no"):
        for extension in ([], ["websocket.http.response"]):
            scope = {"type": "websocket", "path": path, "query_string": b"topic=a", "server": None}
            headers = [(b"host", b"localhost")]
            extensions: dict[str, Any] = {name: {} for name in extension}
            asked = {**scope, "headers": headers, "extensions": extensions}
            asyncio.run(open_hub()(asked, receive, send))


def test_the_log_of_another_stays_open(log: Log) -> None:
    hub = open_hub(log)
    asyncio.run(hub.aclose())
    append(log, Event())
    assert log.statistics().appended == 1
    assert hub.log is log


def test_a_closed_log_is_told(client: httpx.Client, log: Log) -> None:
    asyncio.run(log.close())
    for answer in (client.get("/events?topic=a"), client.post("/events/t", content="1")):
        assert answer.status_code == 503
        assert "closed" in error_of(answer)
