import asyncio
import logging
import threading
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest

from codomyrmex.events.streaming.models import Event
from codomyrmex.events.streaming.server import HostMetrics
from codomyrmex.events.streaming.stream import InMemoryStream

TOPICS = {"host.cpu", "host.memory", "host.disk", "host.network"}


class Times(NamedTuple):
    """As on Linux, where `user` contains `guest`."""

    user: float
    idle: float
    iowait: float
    guest: float


async def measure(rounds: int, interval: float = 0.02) -> dict[str, list[Event]]:
    """By topic, at least `rounds` measurements of the memory and what came with them."""
    measured: dict[str, list[Event]] = {}
    enough = asyncio.Event()

    def receive(event: Event) -> None:
        events = measured.setdefault(event.metadata["topic"], [])
        events.append(event)
        if event.metadata["topic"] == "host.memory" and len(events) == rounds:
            enough.set()

    async with InMemoryStream() as target, asyncio.timeout(10):
        await target.subscribe(receive)
        async with HostMetrics(target, interval):
            await enough.wait()
    return measured


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine whose counters grow by what the test says between two readings."""
    machine = SimpleNamespace(
        growth=SimpleNamespace(user=3.0, idle=1.0, read=1000, written=2000, received=30, sent=40),
        readings=0,
    )

    def at(name: str) -> Any:
        return getattr(machine.growth, name) * machine.readings

    def cpu_times() -> Any:
        machine.readings += 1
        return Times(user=at("user"), idle=at("idle"), iowait=0.0, guest=at("user"))

    monkeypatch.setattr(psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=250)
    )
    monkeypatch.setattr(
        psutil,
        "disk_io_counters",
        lambda: SimpleNamespace(read_bytes=at("read"), write_bytes=at("written")),
    )
    monkeypatch.setattr(
        psutil, "disk_usage", lambda _: SimpleNamespace(used=90, total=100, percent=90.0)
    )
    monkeypatch.setattr(
        psutil,
        "net_io_counters",
        lambda: SimpleNamespace(bytes_recv=at("received"), bytes_sent=at("sent")),
    )
    return machine


@pytest.mark.real_time
async def test_this_machine() -> None:
    measured = await measure(3)
    assert {"host.cpu", "host.memory", "host.network"} <= measured.keys() <= TOPICS
    for events in measured.values():
        assert all(event.type == "measurement" for event in events)
        times = [event.timestamp for event in events]
        assert times == sorted(times)
    for event in measured["host.cpu"]:
        assert 0 <= event.data["percent"] <= 100
        assert event.data["cores"] >= 1
    for event in measured["host.network"]:
        assert event.data["received"] >= 0


@pytest.mark.real_time
@pytest.mark.usefixtures("machine")
async def test_measurements_are_of_the_time_between_two_readings() -> None:
    measured = await measure(2)
    assert measured.keys() == TOPICS
    assert measured["host.cpu"][0].data["percent"] == 75.0
    assert measured["host.memory"][0].data == {"percent": 75.0, "used": 750, "total": 1000}
    disk, network = measured["host.disk"][0].data, measured["host.network"][0].data
    assert 1000 < disk["read"] < 1000 / 0.01
    assert disk["written"] == pytest.approx(2 * disk["read"], abs=1)
    assert (disk["used"], disk["total"], disk["percent"]) == (90, 100, 90.0)
    assert network["sent"] == pytest.approx(network["received"] * 4 / 3, rel=0.05)


@pytest.mark.real_time
async def test_a_counter_that_goes_back_is_no_rate(machine: SimpleNamespace) -> None:
    machine.growth.received = -5
    machine.growth.idle = -10.0
    measured = await measure(2)
    assert measured["host.network"][0].data["received"] == 0
    assert 0 <= measured["host.cpu"][0].data["percent"] <= 100


@pytest.mark.real_time
@pytest.mark.usefixtures("machine")
async def test_what_a_machine_does_not_have_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise PermissionError("no counters for you")

    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    monkeypatch.setattr(psutil, "net_io_counters", broken)
    with caplog.at_level(logging.WARNING):
        measured = await measure(4)
    assert measured.keys() == {"host.cpu", "host.memory"}
    assert caplog.text.count("the network of this machine cannot be read") == 1


@pytest.mark.real_time
@pytest.mark.usefixtures("machine")
async def test_what_cannot_be_read_for_a_while_comes_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    readings = iter([True, False, False, True, True, False, True, True])

    def unsteady() -> Any:
        if not next(readings, True):
            raise OSError("too many open files")
        return SimpleNamespace(bytes_recv=0, bytes_sent=0)

    monkeypatch.setattr(psutil, "net_io_counters", unsteady)
    measured = await measure(8)
    assert len(measured["host.network"]) >= 4
    assert caplog.text.count("the network of this machine cannot be read") == 2


@pytest.mark.real_time
async def test_a_slow_reading_does_not_block_the_loop_and_the_beat_is_kept(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    begun: list[float] = []
    second, fifth = asyncio.Event(), asyncio.Event()
    release = threading.Event()

    def slow() -> Any:
        begun.append(time.monotonic())
        if len(begun) == 2:
            loop.call_soon_threadsafe(second.set)
            release.wait(5)
        elif len(begun) == 5:
            loop.call_soon_threadsafe(fifth.set)
        return SimpleNamespace(total=1000, available=250)

    monkeypatch.setattr(psutil, "virtual_memory", slow)
    async with HostMetrics(InMemoryStream(), 0.05), asyncio.timeout(10):
        await second.wait()  # which the reading would not let happen in this thread
        await asyncio.sleep(0.12)
        assert len(begun) == 2
        release.set()
        await fifth.wait()
    # The beats that were missed are not made up for, and the next are where they always were.
    beats = [(moment - begun[0]) / 0.05 for moment in begun]
    assert begun[3] - begun[2] > 0.03
    assert all(abs(beat - round(beat)) < 0.4 for beat in beats[3:])


@pytest.mark.real_time
async def test_it_can_be_stopped_twice_and_started_again() -> None:
    target = InMemoryStream()
    metrics = HostMetrics(target, 0.01)
    await metrics.stop()
    await metrics.start()
    await metrics.start()
    await metrics.stop()
    await metrics.stop()
    before = target.statistics().published
    await asyncio.sleep(0.05)
    assert target.statistics().published == before
