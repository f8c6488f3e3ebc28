"""What a hub takes at most, and what it says to who wants more."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from codomyrmex.events.streaming.hub import Hub, Limits
from codomyrmex.events.streaming.hub import limits as limits_module
from codomyrmex.events.streaming.hub.http import Refusal, Request
from codomyrmex.events.streaming.hub.limits import Meter
from codomyrmex.events.streaming.log import MemoryLog, Record
from codomyrmex.events.streaming.log.base import Note
from codomyrmex.events.streaming.models import Event
from tests.hub.conftest import CurrentHub
from tests.hub.serving import PATIENCE, ServedUrl, error_of, eventually, open_hub

Limited = Callable[..., Hub]


@pytest.fixture
def limited(url: ServedUrl, current: CurrentHub) -> Iterator[Limited]:
    hubs: list[Hub] = []

    def make(log: Any = "memory://", *, proxies: Any = (), **limits: Any) -> Hub:
        current.hub = open_hub(log, limits=Limits(**limits), proxies=proxies)
        hubs.append(current.hub)
        return current.hub

    yield make
    for hub in hubs:
        url.run(hub.aclose())


def request(address: str, *forwarded: str) -> Request:
    async def never(*_: Any) -> Any:
        raise AssertionError

    headers = [(b"x-forwarded-for", line.encode()) for line in forwarded]
    scope = {"type": "http", "path": "/", "query_string": b"", "client": (address, 1)}
    return Request({**scope, "headers": headers}, never, never)


class TestConnections:
    @pytest.mark.parametrize(
        ("limits", "expected"),
        [
            ({"connections": 2}, (503, "too many connections")),
            ({"per_address": 2}, (429, "more than 2 connections from your address")),
        ],
    )
    def test_one_too_many(
        self,
        client: httpx.Client,
        url: ServedUrl,
        limited: Limited,
        limits: dict[str, int],
        expected: tuple[int, str],
    ) -> None:
        status, reason = expected
        hub = limited(**limits)
        with ExitStack() as stack:
            stack.enter_context(client.stream("GET", "/events?topic=a"))
            stack.enter_context(connect(f"{url.websocket}/ws?topic=a", open_timeout=PATIENCE))
            answer = client.get("/.well-known/mercure?match=a")
            assert answer.status_code == status
            assert reason in error_of(answer)
            assert int(answer.headers["retry-after"]) > 0
            with pytest.raises(InvalidStatus) as caught:
                connect(f"{url.websocket}/ws", open_timeout=PATIENCE)
            assert caught.value.response.status_code == status
            # What does not stay is not counted.
            assert client.post("/events/a", content="1").status_code == 201
            assert client.get("/events/a/history").status_code == 200
        eventually(lambda: not hub._connections)
        with client.stream("GET", "/events?topic=a") as answer:
            assert answer.status_code == 200

    def test_of_one_subject(
        self, client: httpx.Client, url: ServedUrl, current: CurrentHub
    ) -> None:
        def name(scope: Any) -> str | None:
            return dict(scope["headers"]).get(b"x-user", b"").decode() or None

        current.hub = hub = open_hub(identify=name, limits=Limits(per_subject=1))
        ada, bob = {"X-User": "ada"}, {"X-User": "bob"}
        with client.stream("GET", "/events?topic=a", headers=ada):
            assert client.get("/events?topic=a", headers=ada).status_code == 429
            with client.stream("GET", "/events?topic=a", headers=bob) as answer:
                assert answer.status_code == 200
        url.run(hub.aclose())

    def test_when_memory_is_short(self, client: httpx.Client, limited: Limited) -> None:
        limited(memory=1)
        answer = client.get("/events?topic=a")
        assert answer.status_code == 503
        assert "too little memory" in error_of(answer)
        limited(memory=1 << 50)
        with client.stream("GET", "/events?topic=a") as answer:
            assert answer.status_code == 200

    def test_where_nothing_is_known_of_memory_nothing_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits_module, "_STATM", "/no/such/file")
        monkeypatch.setattr(limits_module, "_GROUP", "/no/such/file")
        for limits in (Limits(), Limits(memory=1)):
            with Meter(limits).connection("a", None):
                pass

    def test_a_bound_of_the_control_group_is_known(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
    ) -> None:
        group = tmp_path / "memory.max"
        for text, refused in (("max\n", False), ("1000\n", True), (f"{1 << 50}\n", False)):
            group.write_text(text)
            monkeypatch.setattr(limits_module, "_GROUP", str(group))
            meter = Meter(Limits())
            try:
                with meter.connection("a", None):
                    assert not refused
            except Refusal:
                assert refused

    def test_the_default_leaves_descriptors_for_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        resource = pytest.importorskip("resource")
        for soft, most in ((100, 80), (1, 1), (resource.RLIM_INFINITY, 1_000_000)):
            monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
            assert Meter(Limits())._most == most


class TestPublishing:
    def test_a_subject_may_publish_so_much(self) -> None:
        now = [0.0]
        meter = Meter(Limits(publish_rate=10, publish_burst=20), clock=lambda: now[0])
        meter.published("a", None, 15)
        meter.published("a", None, 5)
        meter.published("b", None, 20)
        meter.published("a", "ada", 20)
        meter.published("b", "bob", 20)
        with pytest.raises(Refusal) as caught:
            meter.published("c", "ada", 20)
        assert caught.value.status == 429
        assert dict(caught.value.headers) == {b"retry-after": b"3"}
        now[0] += 2
        meter.published("c", "ada", 20)
        with pytest.raises(Refusal):
            meter.published("c", "ada", 1)
        now[0] += 0.1
        meter.published("c", "ada", 1)

    def test_a_batch_larger_than_the_burst_takes_its_time(self) -> None:
        now = [0.0]
        meter = Meter(Limits(publish_rate=10, publish_burst=20), clock=lambda: now[0])
        meter.published("a", None, 100)
        now[0] += 9.9
        with pytest.raises(Refusal):
            meter.published("a", None, 20)
        now[0] += 0.2
        meter.published("a", None, 20)

    def test_any_number(self) -> None:
        meter = Meter(Limits(publish_rate=0))
        for _ in range(10):
            meter.published("a", None, 1_000_000)

    def test_whom_it_remembers_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits_module, "_MOST_BUCKETS", 10)
        meter = Meter(Limits())
        for number in range(100):
            meter.published(f"a{number}", None, 1)
        assert len(meter._buckets) == 10

    def test_over_every_way(self, client: httpx.Client, url: ServedUrl, limited: Limited) -> None:
        hub = limited(publish_rate=0.01, publish_burst=3)
        with connect(f"{url.websocket}/ws", open_timeout=PATIENCE) as websocket:
            assert client.post("/events/a?batch=1", content="[1]").status_code == 201
            assert client.post("/.well-known/mercure", data={"topic": "a"}).status_code == 200
            websocket.send('{"publish": {"topic": "a", "data": 1}}')
            assert "published" in json.loads(websocket.recv(PATIENCE))
            for answer in (
                client.post("/events/a", content="1"),
                client.post("/.well-known/mercure", data={"topic": "a"}),
            ):
                assert answer.status_code == 429
                assert "0.01 events in a second" in error_of(answer)
                assert int(answer.headers["retry-after"]) > 30
            websocket.send('{"publish": {"topic": "a", "data": 1}}')
            assert json.loads(websocket.recv(PATIENCE))["status"] == 429
        assert hub.log.statistics().appended == 3

    def test_what_waits_for_a_slow_log_is_bounded_and_readers_are_not_disturbed(
        self, client: httpx.Client, url: ServedUrl, limited: Limited
    ) -> None:
        class SlowLog(MemoryLog):
            going_on = asyncio.Event()

            async def _append(
                self, drafts: list[Record], guard: Note | None = None
            ) -> list[Record]:
                await self.going_on.wait()
                return await super()._append(drafts, guard)

        log = SlowLog()
        hub = limited(log, publishing=3)

        async def publish(count: int) -> list[int]:
            async with httpx.AsyncClient(base_url=url) as http:
                posts = [http.post("/events/a", content=str(n)) for n in range(count)]
                done, waiting = await asyncio.wait(
                    [asyncio.ensure_future(each) for each in posts], timeout=0.5
                )
                refused = [task.result() for task in done]
                assert all(int(answer.headers["retry-after"]) for answer in refused)
                asyncio.run_coroutine_threadsafe(set_going(), url.loop)
                answers = [await task for task in waiting]
                return sorted(answer.status_code for answer in (*refused, *answers))

        async def set_going() -> None:
            log.going_on.set()

        with client.stream("GET", "/events?topic=a") as reader:
            chunks = reader.iter_raw()
            next(chunks)
            assert asyncio.run(publish(10)) == [201] * 3 + [503] * 7
            assert b"data: " in next(chunks)
        assert hub.log.statistics().appended == 3


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "forwarded", "expected"),
        [
            ("192.0.2.1", [], "192.0.2.1"),
            ("192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
            ("10.0.0.1", [], "10.0.0.1"),
            ("10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", ["1.2.3.4, 198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", ["1.2.3.4, 198.51.100.7, 10.0.0.9"], "198.51.100.7"),
            ("10.0.0.1", ["1.2.3.4", "198.51.100.7"], "198.51.100.7"),
            ("10.0.0.1", ["nonsense"], "nonsense"),
            ("::1", ["2001:db8::7"], "2001:db8::7"),
            ("10.0.0.1", ["10.0.0.2"], "10.0.0.2"),
            ("::ffff:10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
        ],
    )
    def test_behind_proxies(self, address: str, forwarded: list[str], expected: str) -> None:
        meter = Meter(Limits(), ["10.0.0.0/8", "::1"])
        assert meter.address_of(request(address, *forwarded)) == expected

    def test_without_proxies_nobody_is_believed(self) -> None:
        assert Meter(Limits()).address_of(request("10.0.0.1", "1.2.3.4")) == "10.0.0.1"

    def test_over_a_unix_socket_there_is_none(self) -> None:
        asked = request("x")
        asked.scope["client"] = None
        assert Meter(Limits(), ["10.0.0.1"]).address_of(asked) == ""

    def test_clients_of_a_proxy_are_told_apart(
        self, client: httpx.Client, limited: Limited
    ) -> None:
        limited(proxies=["127.0.0.1"], per_address=1)
        one, other = {"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-For": "192.0.2.2"}
        with client.stream("GET", "/events?topic=a", headers=one):
            assert client.get("/events?topic=a", headers=one).status_code == 429
            with client.stream("GET", "/events?topic=a", headers=other) as answer:
                assert answer.status_code == 200


@pytest.mark.parametrize("limits", [{"connections": 0}, {"publish_rate": -1}, {"topics": 0}])
def test_what_is_no_limit(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is above 0"):
        Limits(**limits)


def test_what_is_no_proxy() -> None:
    with pytest.raises(ValueError, match="nonsense"):
        Hub(proxies=["nonsense"])


def test_topics_of_a_reader(client: httpx.Client, limited: Limited) -> None:
    limited(topics=2)
    for path in ("/events?topic=a&topic=b&topic=c", "/.well-known/mercure?match=a&match=b&match=c"):
        answer = client.get(path)
        assert answer.status_code == 400
        assert "more than 2 topics" in error_of(answer)


def test_a_longest_life(client: httpx.Client, limited: Limited) -> None:
    limited(lifetime=0.3)
    with client.stream("GET", "/events?topic=a") as answer:
        assert b"open for long enough" in answer.read()


def test_an_event_of_the_log_is_not_limited_by_the_hub(limited: Limited) -> None:
    hub = limited(event_bytes=10, publish_rate=0.001, publish_burst=1)

    async def publish() -> None:
        for _ in range(3):
            await hub.publish("a", "x" * 100)
        await hub.log.append([Event()])

    asyncio.run(publish())
