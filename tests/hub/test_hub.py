"""The hub as an object of the program that it is part of."""

import asyncio
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from codomyrmex.events.streaming.codec.sse import Decoder
from codomyrmex.events.streaming.errors import IdConflict, StreamClosed
from codomyrmex.events.streaming.log import MemoryLog
from tests.hub.serving import PATIENCE, open_hub, serving


async def test_publish_and_subscribe() -> None:
    hub = open_hub()
    first = await hub.publish("orders.42", {"state": "new"})
    paid = await hub.publish("orders.42", {"state": "paid"}, "order.paid", id="p-1", by="card")
    assert paid.metadata == {"topic": "orders.42", "by": "card"}
    async with hub.subscribe("orders.*", after=first.id) as events:
        assert await anext(events) == paid
        await hub.publish("other")
        later = await hub.publish("orders.43")
        assert await anext(events) == later
    async with hub.subscribe(["orders.42", "other"], last=2) as events:
        assert await anext(events) == paid
    assert hub.log.statistics().readers == 0
    with pytest.raises(IdConflict):
        await hub.publish("orders.42", "something else", id="p-1")
    await hub.aclose()
    with pytest.raises(StreamClosed):
        await hub.publish("orders.42")


async def test_what_it_publishes_is_there_in_another_life(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'events.db'}"
    hub = open_hub(url)
    assert not (tmp_path / "events.db").exists()  # it is made when it is first used
    event = await hub.publish("t", 1)
    await hub.aclose()
    again = open_hub(url)
    async with again.subscribe("t", after="earliest") as events:
        assert await anext(events) == event
    await again.aclose()


async def test_a_log_that_was_given_stays_open() -> None:
    async with MemoryLog() as log:
        hub = open_hub(log)
        assert hub.log is log
        await hub.aclose()
        await log.append([])


def test_it_closes_with_the_application_that_it_is_mounted_in(tmp_path: Path) -> None:
    hub = open_hub(f"sqlite:///{tmp_path / 'events.db'}")
    app = Starlette(routes=[Mount("/live", hub)], lifespan=hub.lifespan)

    async def live() -> None:
        async with app.router.lifespan_context(app):
            await hub.publish("t", 1)

    asyncio.run(live())
    with pytest.raises(StreamClosed):
        asyncio.run(hub.publish("t", 2))


def test_both_sides_are_one() -> None:
    hub = open_hub()
    with serving(hub) as url, httpx.stream("GET", f"{url}/events?topic=t", timeout=PATIENCE) as got:
        chunks = got.iter_raw()
        next(chunks)
        event = url.run(hub.publish("t", {"n": 1}, "tick"))
        [frame] = Decoder().feed(next(chunks))
        assert (frame.event, frame.data, frame.id) == ("tick", '{"n":1}', event.id)
        posted = httpx.post(f"{url}/events/t", content="2").json()["id"]

        async def read() -> str:
            async with hub.subscribe("t", last=1) as events:
                return (await anext(events)).id

        assert url.run(read()) == posted
