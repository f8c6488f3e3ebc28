import asyncio

import pytest

from codomyrmex.events.streaming.errors import LogUnusable
from codomyrmex.events.streaming.hub.authorize import Visitor
from codomyrmex.events.streaming.hub.feed import Feed, Wanted
from codomyrmex.events.streaming.hub.http import Refusal
from codomyrmex.events.streaming.log import Log, MemoryLog
from codomyrmex.events.streaming.log.base import Page
from codomyrmex.events.streaming.models import Event
from codomyrmex.events.streaming.testing import cancel_at_every_await
from codomyrmex.events.streaming.topics import Selection
from tests.hub.serving import open_hub

pytestmark = pytest.mark.virtual_time


class FailingLog(MemoryLog):
    """A log whose disk may be gone."""

    fails = False

    async def _page(self, after: int, selection: Selection, limit: int, told: int) -> Page:
        if self.fails:
            raise LogUnusable("/secret/events.db", "the disk is gone")
        return await super()._page(after, selection, limit, told)


def now() -> float:
    return asyncio.get_running_loop().time()


def feed_of(log: Log, after: str | None = None) -> Feed:
    return Feed(open_hub(log)._core, Visitor(), Wanted(["t"], after, None))


def event(number: int) -> Event:
    return Event(id=f"n{number}", metadata={"topic": "t"})


async def test_silence_is_told_after_a_while() -> None:
    async with MemoryLog() as log:
        feed = feed_of(log)
        await feed.begin()
        for expected in (30.0, 60.0):
            batch = await feed.read()
            assert batch is not None
            assert not batch
            assert now() == expected
        await log.append([event(1)])
        batch = await feed.read()
        assert batch is not None
        assert [record.id for record in batch] == ["n1"]
        feed.close()


async def test_readers_stay_while_the_log_fails(caplog: pytest.LogCaptureFixture) -> None:
    async with FailingLog() as log:
        feed = feed_of(log)
        await feed.begin()
        await log.append([event(1)])
        log.fails = True
        for _ in range(5):
            batch = await feed.read()
            assert batch is not None
            assert not batch
        assert now() == 5.0
        log.fails = False
        batch = await feed.read()
        assert batch is not None
        assert [record.id for record in batch] == ["n1"]
        feed.close()
    [message] = [record.message for record in caplog.records]
    assert message == "the log cannot be read; its readers wait"


async def test_a_log_that_fails_from_the_start_is_not_described_to_clients(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with FailingLog() as log:
        log.fails = True
        feed = feed_of(log)
        with pytest.raises(Refusal) as caught:
            await feed.begin()
        feed.close()
    assert caught.value.status == 503
    assert "secret" not in caught.value.reason
    assert "/secret/events.db" in caplog.text


async def test_the_end_of_the_log() -> None:
    log = MemoryLog()
    feed = feed_of(log)
    await feed.begin()
    waiting = asyncio.ensure_future(feed.read())
    await asyncio.sleep(1)
    await log.close()
    assert await waiting is None
    feed.close()
    with pytest.raises(Refusal):
        feed_of(log)


def test_cancelled_anywhere_it_has_lost_nothing() -> None:
    async def scenario() -> None:
        async with MemoryLog() as log:
            feed = feed_of(log, "earliest")
            try:
                await log.append([event(1)])
                await feed.begin()
                await feed.read()
                await feed.read()
            finally:
                feed.close()
                assert log.statistics().readers == 0

    assert cancel_at_every_await(scenario) > 0
