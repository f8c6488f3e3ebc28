"""The Mercure protocol, draft-dunglas-mercure-08: each test names the rule that it holds to."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from codomyrmex.events.streaming.codec.sse import Decoder, Frame
from codomyrmex.events.streaming.hub import Hub
from codomyrmex.events.streaming.hub.tokens import DETAIL, Tokens, make_token
from codomyrmex.events.streaming.log import Log, MemoryLog, Retention
from codomyrmex.events.streaming.models import Event
from tests.hub.conftest import CurrentHub
from tests.hub.serving import ServedUrl, append, error_of, open_hub

PATH = "/.well-known/mercure"
SECRET = "a secret that is long enough for any algorithm, whatever it may be"
NAMES: dict[str, Any] = {"issuer": "https://issuer.example", "audience": "https://hub.example"}
BOOK = "https://example.com/books/1"


@contextmanager
def reading(
    client: httpx.Client, query: str, headers: dict[str, str] | None = None
) -> Iterator[tuple[httpx.Response, Iterator[Frame]]]:
    with client.stream("GET", f"{PATH}?{query}", headers=headers) as answer:
        assert answer.status_code == 200
        yield answer, frames_of(answer)


def frames_of(answer: httpx.Response) -> Iterator[Frame]:
    decoder = Decoder()
    for chunk in answer.iter_raw():
        yield from decoder.feed(chunk)


def post(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post(PATH, data=fields)


class TestSubscribing:
    def test_the_head_and_a_comment_come_at_once(self, client: httpx.Client) -> None:
        with client.stream("GET", f"{PATH}?match=a") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert "no-store" in answer.headers["cache-control"]
            assert next(answer.iter_raw()) == b":\n"

    @pytest.mark.parametrize("name", ["match", "match_exact"])
    def test_exactly(self, client: httpx.Client, log: Log, name: str) -> None:
        append(log, *(Event(id=f"i{n}", metadata={"topic": t}) for n, t in enumerate([BOOK, "a"])))
        with reading(client, f"{name}={BOOK}&last_event_id=earliest") as (_, frames):
            assert next(frames).id == "i0"
            post(client, topic="https://example.com/books/2", data="no")
            post(client, topic=BOOK + "/", data="no")
            post(client, topic=BOOK.upper(), data="no")
            post(client, topic=BOOK, data="yes")
            assert next(frames).data == "yes"

    def test_by_url_pattern(self, client: httpx.Client) -> None:
        query = "match_urlpattern=https://example.com/books/:id"
        with reading(client, query) as (_, frames):
            for topic in ("https://example.com/books/1/x", "https://example.com/", "x", BOOK):
                post(client, topic=topic, data=topic)
            assert next(frames).data == BOOK

    def test_relative_url_patterns_and_topics(self, client: httpx.Client, url: ServedUrl) -> None:
        with reading(client, "match_urlpattern=/books/:id") as (_, frames):
            for topic in ("https://other.example/books/1", "/books/7", f"{url}/books/8"):
                post(client, topic=topic, data=topic)
            assert [next(frames).data for _ in range(2)] == ["/books/7", f"{url}/books/8"]

    @pytest.mark.parametrize("name", ["match", "match_exact", "match_urlpattern"])
    def test_a_star_is_every_topic(self, client: httpx.Client, name: str) -> None:
        with reading(client, f"{name}=*") as (_, frames):
            for topic in (BOOK, "not a url", "a.*"):
                post(client, topic=topic, data=topic)
            assert [next(frames).data for _ in range(3)] == [BOOK, "not a url", "a.*"]

    def test_several_matchers_give_an_event_once(self, client: httpx.Client) -> None:
        query = f"match={BOOK}&match_urlpattern=https://example.com/:x/:y&match=a"
        with reading(client, query) as (_, frames):
            post(client, topic=BOOK, data="1")
            post(client, topic="a", data="2")
            assert [next(frames).data for _ in range(2)] == ["1", "2"]

    def test_by_query(self, client: httpx.Client) -> None:
        with client.stream(
            "QUERY", f"{PATH}?match=a", data={"match": "b", "last_event_id": "earliest"}
        ) as answer:
            assert answer.status_code == 200
            assert answer.headers["mercure-last-event-id"] == "earliest"
            frames = frames_of(answer)
            post(client, topic="a", data="1")
            post(client, topic="b", data="2")
            assert [next(frames).data for _ in range(2)] == ["1", "2"]

    @pytest.mark.parametrize(
        ("query", "reason"),
        [
            ("", "name what to subscribe to"),
            ("topic=a", "subscribe with match"),
            ("match_regexp=a", "there is no 'match_regexp'"),
            ("Match=a", "there is no 'Match'"),
            ("MATCH_EXACT=a&match=a", "there is no 'MATCH_EXACT'"),
            ("match=", "at least one character"),
            ("match=a%00", "control characters"),
            ("match=a%7F", "control characters"),
            ("match=a%C2%80", "control characters"),
            ("match=a%E2%80%8B", "control characters"),
            ("match=%FF", "UTF-8"),
            ("match_urlpattern=(", "no URL pattern"),
            ("match_urlpattern=" + "x" * 4097, "4096 bytes"),
            ("&".join(f"match=t{n}" for n in range(101)), "more than 100"),
            ("match=a&last_event_id=1&last_event_id=2", "more than one"),
        ],
    )
    def test_what_cannot_be_understood(self, client: httpx.Client, query: str, reason: str) -> None:
        answer = client.get(f"{PATH}?{query}")
        assert answer.status_code == 400
        assert reason in error_of(answer)

    def test_a_query_has_a_form(self, client: httpx.Client) -> None:
        assert client.request("QUERY", PATH, json={"match": "a"}).status_code == 415
        options = client.options(PATH)
        assert options.headers["allow"] == "GET, HEAD, QUERY, POST, OPTIONS"

    def test_what_the_hub_says_of_itself_is_told_on_demand_only(
        self, client: httpx.Client, log: Log, url: ServedUrl
    ) -> None:
        append(log, Event(id="1", metadata={"topic": "a"}))
        with reading(client, "match=a&last_event_id=never&control=1") as (_, frames):
            assert [next(frames).event for _ in range(3)] == [
                "stream.connect",
                "stream.gap",
                "message",
            ]
        with reading(client, "match=a&last_event_id=never") as (_, frames):
            assert next(frames).id == "1"


class TestReconciling:
    @pytest.fixture
    def three(self, log: Log) -> None:
        append(log, *(Event(id=f"i{n}", metadata={"topic": "a"}) for n in range(3)))

    @pytest.mark.usefixtures("three")
    @pytest.mark.parametrize(
        ("query", "header", "told", "first"),
        [
            ("&last_event_id=i0", None, "i0", "i1"),
            ("", "i1", "i1", "i2"),
            ("&last_event_id=i0", "i1", "i1", "i2"),
            ("&last_event_id=earliest", None, "earliest", "i0"),
            ("&last_event_id=unknown", None, "earliest", "i0"),
            ("&last_event_id=", None, "i2", None),
            ("", "", "i2", None),
            ("", None, None, None),
        ],
    )
    def test_where_it_goes_on(
        self, client: httpx.Client, query: str, header: str | None, told: Any, first: Any
    ) -> None:
        headers = {} if header is None else {"Last-Event-ID": header}
        with reading(client, f"match=a{query}", headers) as (answer, frames):
            assert answer.headers.get("mercure-last-event-id") == told
            post(client, topic="a", id="new")
            assert next(frames).id == (first or "new")

    def test_an_empty_history_is_the_earliest(self, client: httpx.Client) -> None:
        for header in ("", "x", "earliest"):
            with reading(client, "match=a", {"Last-Event-ID": header}) as (answer, _):
                assert answer.headers["mercure-last-event-id"] == "earliest"

    def test_what_is_not_kept_any_more(self, client: httpx.Client, current: CurrentHub) -> None:
        log = MemoryLog(Retention(count=2))
        current.hub = open_hub(log)
        append(log, *(Event(id=f"i{n}", metadata={"topic": "a"}) for n in range(6)))
        with reading(client, "match=a", {"Last-Event-ID": "i1"}) as (answer, frames):
            assert answer.headers["mercure-last-event-id"] == "earliest"
            assert next(frames).id == "i4"
        with reading(client, "match=a", {"Last-Event-ID": "i3"}) as (answer, frames):
            assert answer.headers["mercure-last-event-id"] == "i3"

    def test_an_id_that_no_header_can_have_is_not_put_into_one(
        self, client: httpx.Client, log: Log
    ) -> None:
        append(log, Event(id="a\x01b", metadata={"topic": "a"}))
        with reading(client, "match=a&last_event_id=") as (answer, _):
            assert answer.headers["mercure-last-event-id"] == "earliest"

    def test_pages_of_others_can_read_it(self, client: httpx.Client) -> None:
        origin = {"Origin": "https://friend.example"}
        with reading(client, "match=a&last_event_id=x", origin) as (answer, _):
            exposed = answer.headers["access-control-expose-headers"]
            assert "mercure-last-event-id" in exposed
            assert "link" in exposed


class TestPublishing:
    def test_what_was_published_arrives_as_it_was(self, client: httpx.Client) -> None:
        with reading(client, "match=a") as (_, frames):
            answer = post(client, topic="a", data='{"n": 1}\n two ', type="t", id="x", retry="5")
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "text/plain; charset=utf-8"
            assert answer.text == "x"
            assert next(frames) == Frame("t", '{"n": 1}\n two ', "x", 5)

    def test_the_hub_makes_an_id(self, client: httpx.Client) -> None:
        with reading(client, "match=a") as (_, frames):
            answer = post(client, topic="a")
            assert answer.text.startswith("urn:uuid:")
            assert next(frames) == Frame("message", "", answer.text)

    @pytest.mark.parametrize("id_", ["[x](y)", '"quoted"', "a b", "ü", "urn:x:1#2"])
    def test_ids_are_honoured(self, client: httpx.Client, id_: str) -> None:
        assert post(client, topic="a", id=id_).text == id_
        with reading(client, "match=a&last_event_id=earliest") as (_, frames):
            assert next(frames).id == id_

    def test_an_id_that_another_event_has_is_replaced(self, client: httpx.Client) -> None:
        assert post(client, topic="a", id="x", data="1").text == "x"
        assert post(client, topic="a", id="x", data="1").text == "x"
        assert post(client, topic="a", id="x", data="2").text != "x"

    def test_to_several_topics_at_once(self, client: httpx.Client, log: Log) -> None:
        answer = client.post(PATH, data={"topic": ["a", "b", "a.*"], "data": "1"})
        assert answer.status_code == 200
        for topic in ("a", "b", "a.*"):
            with reading(client, f"match={topic}&last_event_id=earliest") as (_, frames):
                assert next(frames).id == answer.text
        with reading(client, "match=*&last_event_id=earliest") as (_, frames):
            post(client, topic="c", id="next")
            assert [next(frames).id for _ in range(2)] == [answer.text, "next"]
        assert log.statistics().appended == 2

    def test_it_is_read_everywhere_in_the_hub(self, client: httpx.Client) -> None:
        post(client, topic="orders.1", data="text", type="x")
        [event] = client.get("/events/orders.*/history").json()["events"]
        assert event["data"] == "text"
        assert event["metadata"] == {"content_type": "text/plain", "topic": "orders.1"}
        client.post("/events/orders.2", content='{"n": 1}')
        with reading(client, "match=orders.2&last_event_id=earliest") as (_, frames):
            assert next(frames).data == '{"n":1}'

    @pytest.mark.parametrize(
        ("fields", "reason"),
        [
            ({}, "no topic"),
            ({"data": "1"}, "no topic"),
            ({"topic": ""}, "is no topic"),
            ({"topic": "*"}, "is no topic"),
            ({"topic": ["a", "*"]}, "is no topic"),
            ({"topic": "a\0"}, "control characters"),
            ({"topic": "a\u200b"}, "control characters"),
            ({"topic": "x" * 1025}, "1024 bytes"),
            ({"topic": "a", "id": "#x"}, "begin with #"),
            ({"topic": "a", "id": "earliest"}, "earliest"),
            ({"topic": "a", "id": "a\nb"}, "control characters"),
            ({"topic": "a", "id": " x"}, "space"),
            ({"topic": "a", "type": "a\r\nb"}, "control characters"),
            ({"topic": "a", "type": "mercure"}, "the hub itself"),
            ({"topic": "a", "type": "heartbeat"}, "the hub itself"),
            ({"topic": "a", "type": "stream.end"}, "reserved"),
            ({"topic": "a", "retry": "1.5"}, "milliseconds"),
            ({"topic": "a", "retry": "-1"}, "milliseconds"),
            ({"topic": "a", "retry": "\u0661"}, "milliseconds"),
            ({"topic": "a", "retry": "1" * 16}, "milliseconds"),
            ({"topic": "a", "data": ["1", "2"]}, "more than one 'data'"),
        ],
    )
    def test_what_is_refused(
        self, client: httpx.Client, log: Log, fields: dict[str, Any], reason: str
    ) -> None:
        answer = client.post(
            PATH, data=fields, headers={"Content-Type": "application/x-www-form-urlencoded"}
        )
        assert answer.status_code == 400
        assert reason in error_of(answer)
        assert log.statistics().appended == 0

    @pytest.mark.parametrize(
        "topic",
        [
            "/.well-known/mercure",
            "/.well-known/mercure/subscriptions/exact/a/b",
            "https://evil.example/.well-known/mercure/subscriptions",
            "//evil.example/.well-known/mercure",
            "/x/../.well-known/mercure/a",
            "/./.well-known/./mercure/",
            "/.well-known/%6dercure/a",
            "/%2ewell-known/mercure",
            "/%252ewell-known/mercure",
            "\\.well-known\\mercure\\a",
            "mercure/subscriptions",
            " /.well-known/mercure/a ",
            "///.well-known/mercure",
            "/.well-known//mercure",
        ],
    )
    def test_the_hubs_own_topics_cannot_be_forged(
        self, client: httpx.Client, log: Log, topic: str
    ) -> None:
        answer = post(client, topic=["a", topic])
        assert answer.status_code == 400
        assert "the hub's own" in error_of(answer)
        assert log.statistics().appended == 0

    @pytest.mark.parametrize(
        "topic", ["/.well-known/mercury", "/.well-known/mercurex", "urn:x:mercure", "http://[x"]
    )
    def test_others_are_not_taken_for_them(self, client: httpx.Client, topic: str) -> None:
        assert post(client, topic=topic).status_code == 200

    def test_limits(self, client: httpx.Client, log: Log) -> None:
        many = client.post(PATH, data={"topic": [f"t{n}" for n in range(1001)]})
        assert many.status_code == 413
        fields = "&".join(["x=1"] * 1101)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert client.post(PATH, content=fields, headers=form).status_code == 413
        large = client.post(PATH, content="topic=a&data=" + "x" * (1 << 20), headers=form)
        assert large.status_code == 413
        assert client.post(PATH, content="topic=%FF", headers=form).status_code == 400
        assert client.post(PATH, content="topic=ü".encode(), headers=form).status_code == 400
        assert client.post(PATH, json={"topic": "a"}).status_code == 415
        assert log.statistics().appended == 0

    def test_fields_that_are_not_known_are_ignored(self, client: httpx.Client) -> None:
        assert post(client, topic="a", whatever="x").status_code == 200


def bearer(*, subscribe: list[str] = [], publish: list[str] = [], **more: Any) -> dict[str, str]:  # noqa: B006
    details = [
        {
            "type": DETAIL,
            "actions": [action],
            "topics": [{"match": each, "match_type": "urlpattern"} for each in topics],
        }
        for action, topics in (("subscribe", subscribe), ("publish", publish))
    ]
    token = make_token(SECRET, authorization_details=details, **NAMES, **more)
    return {"Authorization": f"Bearer {token}"}


class TestAuthorization:
    @pytest.fixture
    def hub(self) -> Hub:
        return Hub(
            tokens=Tokens(SECRET, **NAMES),
            anonymous=True,
            allowed_origins=["https://friend.example"],
        )

    def test_private_events_are_for_who_may_read_one_of_their_topics(
        self, client: httpx.Client
    ) -> None:
        writer = bearer(publish=["*"])
        reader = bearer(subscribe=["https://example.com/users/:id"])
        query = "match=*&last_event_id=earliest"
        fields: list[dict[str, Any]] = [
            {"topic": "a", "data": "public"},
            {"topic": "a", "data": "private", "private": "on"},
            {"topic": ["a", "https://example.com/users/7"], "data": "for 7", "private": ""},
            {"topic": "b", "data": "public"},
        ]
        for each in fields:
            assert client.post(PATH, data=each, headers=writer).status_code == 200
        with reading(client, query) as (_, frames):
            assert [next(frames).data for _ in range(2)] == ["public", "public"]
        with reading(client, query, reader) as (_, frames):
            assert [next(frames).data for _ in range(3)] == ["public", "for 7", "public"]

    def test_every_topic_has_to_be_granted_to_publish(self, client: httpx.Client, hub: Hub) -> None:
        writer = bearer(publish=["https://example.com/:x"])
        data = {"topic": ["https://example.com/1", "https://other.example/1"]}
        answer = client.post(PATH, data=data, headers=writer)
        assert answer.status_code == 403
        assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
        answer = client.get(f"{PATH}?match=a", headers=writer)
        assert answer.status_code == 403
        assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]
        assert hub.log.statistics().appended == 0
        data = {"topic": ["https://example.com/1", "https://example.com/2"]}
        assert client.post(PATH, data=data, headers=writer).status_code == 200

    def test_a_token_that_is_not_accepted(self, client: httpx.Client) -> None:
        headers = {"Authorization": "Bearer x"}
        for answer in (
            client.get(f"{PATH}?match=a", headers=headers),
            client.post(PATH, data={"topic": "a"}, headers=headers),
        ):
            assert answer.status_code == 401
            challenge = answer.headers["www-authenticate"]
            assert 'error="invalid_token"' in challenge
            assert "resource_metadata=" in challenge

    def test_without_one(self, client: httpx.Client, url: ServedUrl, current: CurrentHub) -> None:
        assert post(client, topic="a").status_code == 403
        current.hub = Hub(tokens=Tokens(SECRET, **NAMES))
        answer = client.get(f"{PATH}?match=a")
        assert answer.status_code == 401
        where = answer.headers["www-authenticate"]
        assert where == (
            f'Bearer resource_metadata="{url}/.well-known/oauth-protected-resource{PATH}"'
        )
        told = client.get(where.partition('"')[2].removesuffix('"').removeprefix(url)).json()
        assert told == {
            "resource": "https://hub.example",
            "authorization_servers": ["https://issuer.example"],
            "authorization_details_types_supported": [DETAIL],
            "bearer_methods_supported": ["header"],
            "mercure_cookie": "__Secure-mercure_access_token",
            "mercure_matcher_types_supported": ["exact", "urlpattern"],
            "mercure_subscriptions": False,
        }

    def test_by_the_cookie(self, client: httpx.Client) -> None:
        token = bearer(publish=["*"])["Authorization"].removeprefix("Bearer ")
        cookie = {"Cookie": f"__Secure-mercure_access_token={token}"}
        assert client.post(PATH, data={"topic": "a"}, headers=cookie).status_code == 403
        cookie["Origin"] = "https://friend.example"
        assert client.post(PATH, data={"topic": "a"}, headers=cookie).status_code == 200


def test_without_the_extra_it_says_so(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "urlpattern", None)
    answer = client.get(f"{PATH}?match_urlpattern=/a")
    assert answer.status_code == 501
    assert "codomyrmex-streaming[tokens]" in error_of(answer)
    assert json.loads(answer.content)
