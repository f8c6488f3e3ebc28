"""Who may do what, as clients find out."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from codomyrmex.events.streaming.codec.sse import Decoder, Frame
from codomyrmex.events.streaming.errors import TopicError
from codomyrmex.events.streaming.hub import Hub, everyone
from codomyrmex.events.streaming.hub.authorize import Gate, Visitor
from codomyrmex.events.streaming.hub.http import Refusal, Request, Scope
from codomyrmex.events.streaming.log import MemoryLog
from codomyrmex.events.streaming.topics import Selection
from tests.hub.conftest import CurrentHub
from tests.hub.serving import PATIENCE, ServedUrl, error_of

HubOf = Callable[..., Hub]


@pytest.fixture
def hub_of(
    url: ServedUrl, current: CurrentHub
) -> Iterator[HubOf]:  # after `url`, which sets another
    hubs: list[Hub] = []

    def make(**options: Any) -> Hub:
        current.hub = Hub(**options)
        hubs.append(current.hub)
        return current.hub

    yield make
    for hub in hubs:
        url.run(hub.aclose())


def by_header(scope: Scope) -> str | None:
    """The subject is what the header says: a stand-in for an application's session."""
    return dict(scope["headers"]).get(b"x-user", b"").decode() or None


def owners(subject: str | None, action: str, topic: str) -> bool:
    """A topic `users.ada.…` is ada's."""
    return subject is not None and topic.startswith(f"users.{subject}.")


def as_(name: str) -> dict[str, str]:
    return {"X-User": name}


@contextmanager
def reading(client: httpx.Client, query: str, user: str = "") -> Iterator[Iterator[Frame]]:
    headers = as_(user) if user else {}
    with client.stream("GET", f"/events?{query}", headers=headers) as answer:
        assert answer.status_code == 200
        frames = frames_of(answer)
        assert next(frames).event == "stream.connect"
        yield frames


def frames_of(answer: httpx.Response) -> Iterator[Frame]:
    decoder = Decoder()
    for chunk in answer.iter_raw():
        yield from decoder.feed(chunk)


class TestWhoIsLetIn:
    def test_nobody_unless_it_is_said(self, client: httpx.Client, hub_of: HubOf) -> None:
        hub = hub_of()
        for answer in (
            client.get("/events?topic=a"),
            client.get("/events/a/history"),
            client.post("/events/a", content="1"),
        ):
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "authorize=" in error_of(answer)
        assert client.get("/healthz").status_code == 200
        assert hub.log.statistics().appended == 0

    def test_nor_by_websocket(self, url: ServedUrl, hub_of: HubOf) -> None:
        hub_of()
        with pytest.raises(InvalidStatus) as caught:
            connect(f"{url.websocket}/ws?topic=a", open_timeout=PATIENCE)
        assert caught.value.response.status_code == 401

    def test_anonymous_visitors_read_what_is_public(
        self, client: httpx.Client, url: ServedUrl, hub_of: HubOf
    ) -> None:
        hub = hub_of(anonymous=True, public="prices.*")
        url.run(hub.publish("prices.tea", 1))
        url.run(hub.publish("prices.tea", "secret", public=False))
        url.run(hub.publish("orders.1", "secret"))
        url.run(hub.publish("orders.1", 2, public=True))
        with reading(client, "topic=*&after=earliest") as frames:
            assert [next(frames).data for _ in range(2)] == ["1", "2"]
            url.run(hub.publish("orders.1", "secret"))
            url.run(hub.publish("prices.tea", 3))
            assert next(frames).data == "3"
        history = client.get("/events/*/history").json()
        assert [event["data"] for event in history["events"]] == [1, 2, 3]
        refused = client.get("/events?topic=orders.1")
        assert refused.status_code == 403
        assert "orders.1" in error_of(refused)
        assert client.get("/events/orders.1/history").status_code == 403
        assert client.post("/events/prices.tea", content="0").status_code == 403

    def test_those_with_a_name_read_what_is_theirs(
        self, client: httpx.Client, url: ServedUrl, hub_of: HubOf
    ) -> None:
        hub = hub_of(authorize=owners, identify=by_header)
        for name in ("ada", "bob", "ada"):
            url.run(hub.publish(f"users.{name}.inbox", name))
        with reading(client, "topic=users.*.inbox&after=earliest", "ada") as frames:
            assert [next(frames).data for _ in range(2)] == ['"ada"', '"ada"']
            url.run(hub.publish("users.bob.inbox", "bob"))
            posted = client.post("/events/users.ada.inbox", content="1", headers=as_("ada"))
            assert posted.status_code == 201
            assert next(frames).data == "1"
        answer = client.post("/events/users.bob.inbox", content="1", headers=as_("ada"))
        assert answer.status_code == 403
        assert "users.bob.inbox" in error_of(answer)
        assert client.get("/events?topic=users.bob.inbox", headers=as_("ada")).status_code == 403
        assert client.get("/events?topic=*").status_code == 401

    def test_who_may_read_little_has_a_place_as_well(
        self, client: httpx.Client, url: ServedUrl, hub_of: HubOf
    ) -> None:
        hub = hub_of(authorize=owners, identify=by_header)
        last = [url.run(hub.publish("users.bob.inbox")) for _ in range(200)][-1]
        with client.stream("GET", "/events?topic=users.>", headers=as_("ada")) as answer:
            place = next(frames_of(answer)).id
        assert place == last.id
        mine = url.run(hub.publish("users.ada.inbox"))
        headers = {**as_("ada"), "Last-Event-ID": place}
        with client.stream("GET", "/events?topic=users.>", headers=headers) as answer:
            frames = frames_of(answer)
            next(frames)
            assert next(frames).id == mine.id

    def test_a_history_of_others_events_can_be_paged_through(
        self, client: httpx.Client, url: ServedUrl, hub_of: HubOf
    ) -> None:
        hub = hub_of(authorize=owners, identify=by_header)
        for number in range(12):
            url.run(hub.publish(f"users.{'ada' if number % 4 == 3 else 'bob'}.inbox", number))
        found, cursor = [], "earliest"
        for _ in range(20):
            page = client.get(
                "/events/*/history", params={"after": cursor, "limit": 2}, headers=as_("ada")
            ).json()
            found += [event["data"] for event in page["events"]]
            cursor = page["cursor"]
            if page["is_last"]:
                break
        assert found == [3, 7, 11]

    def test_what_a_client_publishes_is_private_unless_it_is_said(
        self, client: httpx.Client, url: ServedUrl, hub_of: HubOf
    ) -> None:
        def publisher(subject: str | None, action: str, topic: str) -> bool:
            return subject == "ada" and action == "publish"

        hub = hub_of(authorize=publisher, identify=by_header, public="open", anonymous=True)
        for number, path in enumerate(
            ("open", "open?public=false", "other", "other?public=true", "other?batch=1&public=1")
        ):
            content = f"[{number}]"
            answer = client.post(f"/events/{path}", content=content, headers=as_("ada"))
            assert answer.status_code == 201
        with connect(
            f"{url.websocket}/ws", open_timeout=PATIENCE, additional_headers=as_("ada")
        ) as websocket:
            told: list[dict[str, Any]] = [{}, {"public": True}, {"public": 1}]
            for number, fields in enumerate(told, 10):
                message = {"publish": {"topic": "other", "data": [number], **fields}}
                websocket.send(json.dumps(message))
                assert ("error" in json.loads(websocket.recv(PATIENCE))) == (number == 12)
            websocket.send('{"publish": {"topic": "other", "data": 1}, "ref": 1}')
            websocket.recv(PATIENCE)
        records = url.run(hub.log.read())
        assert [(r.body.decode(), r.private) for r in records][:-1] == [
            ("[0]", False),
            ("[1]", True),
            ("[2]", True),
            ("[3]", False),
            ("4", False),
            ("[10]", True),
            ("[11]", False),
        ]

    def test_over_a_websocket(self, url: ServedUrl, hub_of: HubOf) -> None:
        hub = hub_of(authorize=owners, identify=by_header)
        with connect(
            f"{url.websocket}/ws", open_timeout=PATIENCE, additional_headers=as_("ada")
        ) as websocket:

            def say(**message: Any) -> dict[str, Any]:
                websocket.send(json.dumps(message))
                answer = json.loads(websocket.recv(PATIENCE))
                assert isinstance(answer, dict)
                return answer

            refused = say(subscribe={"topics": ["users.bob.inbox"]}, ref=1)
            assert (refused["status"], refused["ref"]) == (403, 1)
            refused = say(publish={"topic": "users.bob.inbox", "data": 1}, ref=2)
            assert (refused["status"], refused["ref"]) == (403, 2)
            assert "subscribed" in say(subscribe={"topics": ["users.>"]}, ref=3)
            url.run(hub.publish("users.bob.inbox", "secret"))
            url.run(hub.publish("users.ada.inbox", "hello"))
            assert json.loads(websocket.recv(PATIENCE))["event"]["data"] == "hello"


class TestWhatIsTakenBack:
    def test_a_subject_that_is_revoked_reads_no_more(
        self, client: httpx.Client, url: ServedUrl, hub_of: HubOf
    ) -> None:
        hub = hub_of(authorize=owners, identify=by_header)
        with (
            client.stream("GET", "/events?topic=users.>", headers=as_("ada")) as revoked,
            client.stream("GET", "/events?topic=users.>", headers=as_("bob")) as other,
            connect(
                f"{url.websocket}/ws?topic=users.>",
                open_timeout=PATIENCE,
                additional_headers=as_("ada"),
            ) as websocket,
        ):
            frames, others = frames_of(revoked), frames_of(other)
            next(frames)
            next(others)
            websocket.recv(PATIENCE)

            async def revoke() -> int:
                return hub.revoke("ada")

            assert url.run(revoke()) == 2
            last = next(frames)
            assert last.event == "stream.disconnect"
            assert "not authorized any more" in last.data
            assert list(frames) == []
            assert "bye" in json.loads(websocket.recv(PATIENCE))
            with pytest.raises(ConnectionClosed) as closed:
                websocket.recv(PATIENCE)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1008
            url.run(hub.publish("users.bob.inbox", 1))
            assert next(others).data == "1"

    def test_what_is_denied_later_on_ends(
        self, client: httpx.Client, url: ServedUrl, hub_of: HubOf
    ) -> None:
        allowed = {"a", "b"}

        async def can(subject: str | None, action: str, topic: str) -> bool:
            return topic in allowed

        hub = hub_of(authorize=can)
        with (
            reading(client, "topic=a") as of_a,
            reading(client, "topic=a&topic=b") as of_both,
            reading(client, "topic=*") as of_all,
            connect(f"{url.websocket}/ws?topic=a", open_timeout=PATIENCE) as websocket,
        ):
            websocket.recv(PATIENCE)
            websocket.send('{"subscribe": {"topics": ["b"]}, "ref": "b"}')
            websocket.recv(PATIENCE)
            url.run(hub.publish("a", 1))
            assert next(of_all).data == "1"
            assert json.loads(websocket.recv(PATIENCE))["event"]["data"] == 1
            allowed.remove("a")
            url.run(hub.reauthorize())
            assert next(of_a).data == "1"
            assert next(of_a).event == "stream.disconnect"
            assert json.loads(websocket.recv(PATIENCE)) == {
                "error": "you may not read 'a'",
                "status": 403,
            }
            url.run(hub.publish("a", 2))
            url.run(hub.publish("b", 3))
            assert next(of_all).data == "3"
            assert [next(of_both).data for _ in range(2)] == ["1", "3"]
            assert json.loads(websocket.recv(PATIENCE))["event"]["data"] == 3


def request() -> Request:
    async def never(*_: Any) -> Any:
        raise AssertionError

    return Request({"type": "http", "path": "/", "query_string": b"", "headers": []}, never, never)


@pytest.mark.virtual_time
class TestAsking:
    async def test_an_answer_is_good_for_a_minute(self) -> None:
        asked: list[tuple[str | None, str, str]] = []

        async def authorize(subject: str | None, action: str, topic: str) -> bool:
            asked.append((subject, action, topic))
            await asyncio.sleep(1)
            return True

        gate = Gate(authorize)
        visitor = Visitor("ada")
        answers = await asyncio.gather(*(gate.may(visitor, "subscribe", "t") for _ in range(100)))
        assert answers == [True] * 100
        assert asked == [("ada", "subscribe", "t")]
        await asyncio.sleep(58)
        await gate.may(visitor, "subscribe", "t")
        assert len(asked) == 1
        await asyncio.sleep(2)
        await gate.may(visitor, "subscribe", "t")
        await gate.may(visitor, "publish", "t")
        assert len(asked) == 3
        gate.revoke("bob")
        await gate.may(visitor, "publish", "t")
        assert len(asked) == 3
        gate.revoke("ada")
        await gate.may(visitor, "publish", "t")
        assert len(asked) == 4
        await gate.aclose()

    async def test_what_raises_or_does_not_come_denies(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def hang(*_: Any) -> bool:
            await asyncio.sleep(1000)
            return True

        def fail(*_: Any) -> bool:
            raise RuntimeError("the database is down")

        for authorize in (hang, fail):
            gate = Gate(authorize)
            assert not await gate.may(Visitor("ada"), "publish", "t")
            await gate.aclose()
        assert caplog.text.count("authorize failed for 'ada', publish, 't': denied") == 2
        assert asyncio.get_running_loop().time() == 10.0

    @pytest.mark.parametrize("answer", [1, "yes", object(), None])
    async def test_nothing_but_true_allows(self, answer: Any) -> None:
        gate = Gate(lambda *_: answer)
        assert not await gate.may(Visitor("ada"), "publish", "t")
        await gate.aclose()

    async def test_who_gives_up_does_not_hinder_others(self) -> None:
        async def authorize(*_: Any) -> bool:
            await asyncio.sleep(1)
            return True

        gate = Gate(authorize)
        first = asyncio.ensure_future(gate.may(Visitor(), "publish", "t"))
        second = asyncio.ensure_future(gate.may(Visitor(), "publish", "t"))
        await asyncio.sleep(0.5)
        first.cancel()
        assert await second
        await gate.aclose()

    async def test_what_was_asked_before_it_was_forgotten_is_asked_anew(self) -> None:
        allowed = True

        async def authorize(*_: Any) -> bool:
            said = allowed
            await asyncio.sleep(1)
            return said

        gate = Gate(authorize)
        waiting = asyncio.ensure_future(gate.may(Visitor(), "publish", "t"))
        await asyncio.sleep(0.5)
        allowed = False
        gate.forget()
        assert not await waiting
        await gate.aclose()

    async def test_closing_asks_no_more(self) -> None:
        async def hang(*_: Any) -> bool:
            await asyncio.sleep(1000)
            return True

        gate = Gate(hang)
        waiting = asyncio.ensure_future(gate.may(Visitor(), "publish", "t"))
        await asyncio.sleep(1)
        await gate.aclose()
        assert not await waiting

    async def test_an_identify_that_fails_lets_nobody_in(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def fail(scope: Scope) -> str:
            raise RuntimeError("no session")

        with pytest.raises(Refusal):
            await Gate(everyone, identify=fail).admit(request())
        assert (
            await Gate(everyone, identify=fail, anonymous=True).admit(request())
        ).subject is None
        assert "identify failed" in caplog.text

    async def test_a_subject_is_a_string(self, caplog: pytest.LogCaptureFixture) -> None:
        identify: Any = lambda scope: ["ada"]  # noqa: E731
        with pytest.raises(Refusal):
            await Gate(everyone, identify=identify).admit(request())
        assert "a subject is a str, not list" in caplog.text

    async def test_what_is_remembered_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("codomyrmex.events.streaming.hub.authorize._MOST_REMEMBERED", 10)
        gate = Gate(lambda *_: True)
        for number in range(100):
            assert await gate.may(Visitor(), "publish", f"t{number}")
            assert len(gate._answers) <= 10
        await gate.aclose()

    async def test_of_patterns_nothing_is_said_beforehand(self) -> None:
        gate = Gate(lambda *_: False)
        for topics in ("*", "a.*", ["a", "b.>"]):
            await gate.check_readable(Visitor(), Selection(topics))
        with pytest.raises(Refusal):
            await gate.check_readable(Visitor(), Selection(["a", "b"]))
        await gate.aclose()


def test_public_topics_are_topics() -> None:
    with pytest.raises(TopicError):
        Hub(MemoryLog(), public=["a\0b"])
