import httpx
import pytest

from codomyrmex.events.streaming.log import Log, MemoryLog, Record, Retention
from codomyrmex.events.streaming.models import Event
from tests.hub.conftest import CurrentHub
from tests.hub.serving import append, error_of, open_hub


def event(number: int, topic: str = "t") -> Event:
    return Event(id=f"n{number}", data=number, metadata={"topic": topic})


def test_what_there_is_page_by_page(client: httpx.Client, log: Log) -> None:
    events = [event(number) for number in range(7)]
    append(log, *events, event(8, "other"))
    found, cursor, pages = [], "earliest", 0
    while True:
        answer = client.get("/events/t/history", params={"after": cursor, "limit": 3})
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"
        page = answer.json()
        assert page["gap"] is None
        found += page["events"]
        cursor = page["cursor"]
        pages += 1
        if page["is_last"]:
            break
    assert pages == 3
    assert [Event.from_dict(each) for each in found] == events
    append(log, event(9))
    assert client.get(f"/events/t/history?after={cursor}").json()["events"][0]["id"] == "n9"


def test_of_a_pattern_and_of_a_topic_with_slashes(client: httpx.Client, log: Log) -> None:
    append(log, event(1, "a.b"), event(2, "a/history"), event(3, "a"), event(4, "history"))
    for path, expected in (
        ("a.*", ["n1"]),
        ("*", ["n1", "n2", "n3", "n4"]),
        ("a/history", ["n2"]),
        ("a%2Fhistory", ["n2"]),
        ("history", ["n4"]),
        ("nothing", []),
    ):
        page = client.get(f"/events/{path}/history").json()
        assert [each["id"] for each in page["events"]] == expected


def test_a_hundred_by_default(client: httpx.Client, log: Log) -> None:
    append(log, *(event(number) for number in range(101)))
    page = client.get("/events/t/history").json()
    assert len(page["events"]) == 100
    assert not page["is_last"]


def test_what_retention_took_is_told(client: httpx.Client, current: CurrentHub) -> None:
    log = MemoryLog(Retention(count=2))
    current.hub = open_hub(log)
    append(log, *(event(number) for number in range(5)))
    page = client.get("/events/*/history?after=n0").json()
    assert page["gap"] == {"after": "n0", "reason": "trimmed", "missed": 2}
    assert [each["id"] for each in page["events"]] == ["n3", "n4"]


def test_large_events_are_fewer_to_a_page(client: httpx.Client, log: Log) -> None:
    for number in range(8):
        append(log, Event(id=f"n{number}", data="x" * 1_000_000, metadata={"topic": "t"}))
    first = client.get("/events/t/history").json()
    assert not first["is_last"]
    rest = client.get("/events/t/history", params={"after": first["cursor"]}).json()
    assert rest["is_last"]
    ids = [each["id"] for each in (*first["events"], *rest["events"])]
    assert ids == [f"n{number}" for number in range(8)]
    assert len(first["events"]) == 5


def test_an_event_that_cannot_be_written_is_left_out(client: httpx.Client, log: Log) -> None:
    damaged = Record.of(Event(id="bad", data="x"))._replace(body=b"\xff", topics=("t",))
    append(log, damaged, event(1))
    assert [each["id"] for each in client.get("/events/t/history").json()["events"]] == ["n1"]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("t/history?limit=0", "limit is a number from 1 to 1000"),
        ("t/history?limit=1001", "limit is a number from 1 to 1000"),
        ("t/history?limit=x", "limit is a number"),
        ("t/history?after=1&after=2", "more than one 'after'"),
        ("/history", "at least one character"),
        ("%00/history", "control characters"),
    ],
)
def test_what_cannot_be_read(client: httpx.Client, path: str, reason: str) -> None:
    answer = client.get(f"/events/{path}")
    assert answer.status_code == 400
    assert reason in error_of(answer)
