"""Waiting across threads and event loops: whoever is woken wakes, and no wake-up is lost."""

import asyncio
import threading
from contextlib import suppress
from typing import SupportsIndex

import pytest

from codomyrmex.events.streaming.testing import VirtualTimeLoop, cancel_at_every_await
from codomyrmex.events.streaming.wakeups import (
    Waiters,
    resolve,
    running_loop,
    wait_until,
    wake,
    wake_all,
    withdraw,
)


class Door:
    """Something to wait for."""

    def __init__(self) -> None:
        self.waiters: Waiters = []
        self.open = False
        self.entered: list[str] = []

    async def enter(self, name: str = "") -> None:
        while not self.open:
            await wait_until(self.waiters, lambda: self.open)
        self.entered.append(name)

    async def everyone(self, *names: str) -> list[asyncio.Task[None]]:
        """Tasks for these names, all of which wait already."""
        tasks = [asyncio.create_task(self.enter(name)) for name in names]
        for _ in names:
            await asyncio.sleep(0)
        assert len(self.waiters) == len(names)
        return tasks


def test_running_loop_is_that_of_this_thread() -> None:
    assert running_loop() is None
    seen = []

    async def look() -> None:
        seen.append(running_loop() is asyncio.get_running_loop())
        seen.append(await asyncio.to_thread(running_loop) is None)

    asyncio.run(look())
    assert seen == [True, True]


async def test_resolve_ends_a_wait_once() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    resolve(future)
    resolve(future)
    assert future.done()


async def test_nobody_waits_for_what_is_so_already() -> None:
    door = Door()
    await wait_until(door.waiters, lambda: True)
    assert not door.waiters


async def test_one_wake_up_lets_the_first_in_and_no_other() -> None:
    door = Door()
    tasks = await door.everyone("first", "second")
    door.open = True
    wake(door.waiters)
    await asyncio.wait([tasks[0]])
    await asyncio.sleep(1)
    assert door.entered == ["first"]
    wake(door.waiters)
    await asyncio.gather(*tasks)
    assert door.entered == ["first", "second"]
    wake(door.waiters)  # nobody is there
    assert not door.waiters


async def test_wake_all_lets_all_in_that_wait_now() -> None:
    door = Door()
    tasks = await door.everyone("first", "second", "third")
    door.open = True
    wake_all(door.waiters)
    await asyncio.gather(*tasks)
    assert door.entered == ["first", "second", "third"]


async def test_wake_all_calls_another_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    door = Door()
    tasks = await door.everyone("first", "second", "third")
    tasks[1].cancel()  # it stands there still
    door.open = True
    calls = []
    monkeypatch.setattr(
        asyncio.get_running_loop(), "call_soon_threadsafe", lambda *call: calls.append(call)
    )
    thread = threading.Thread(target=wake_all, args=(door.waiters,))
    thread.start()
    thread.join()
    ((resolve_them, futures),) = calls
    resolve_them(futures)
    await asyncio.gather(tasks[0], tasks[2])
    assert door.entered == ["first", "third"]


async def test_who_is_woken_for_nothing_waits_again() -> None:
    door = Door()
    (task,) = await door.everyone("only")
    wake(door.waiters)
    await asyncio.sleep(1)
    assert not task.done()
    assert len(door.waiters) == 1
    door.open = True
    wake(door.waiters)
    await task


async def test_who_left_is_passed_over() -> None:
    door = Door()
    tasks = await door.everyone("first", "second")
    tasks[0].cancel()  # it has not run yet, so it stands there still
    door.open = True
    wake(door.waiters)
    await asyncio.wait(tasks)
    assert tasks[0].cancelled()
    assert door.entered == ["second"]
    assert not door.waiters


async def test_who_is_woken_and_cancelled_passes_it_on() -> None:
    door = Door()
    tasks = await door.everyone("first", "second")
    door.open = True
    wake(door.waiters)
    tasks[0].cancel()
    await asyncio.wait(tasks)
    assert tasks[0].cancelled()
    assert door.entered == ["second"]


async def test_it_is_passed_on_only_if_there_is_still_cause() -> None:
    door = Door()
    tasks = await door.everyone("first", "second")
    turns: list[object] = []
    door.waiters[1].add_done_callback(turns.append)
    wake(door.waiters)
    tasks[0].cancel()
    await asyncio.wait([tasks[0]])
    await asyncio.sleep(1)
    assert turns == []
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    assert not door.waiters


@pytest.mark.real_time
async def test_a_wake_up_from_another_thread_is_passed_on_by_who_is_cancelled_first() -> None:
    door = Door()
    tasks = await door.everyone("first", "second")
    door.open = True
    # The other thread takes the first one's future, but its loop has not heard of it yet.
    thread = threading.Thread(target=wake, args=(door.waiters,))
    thread.start()
    thread.join()
    tasks[0].cancel()
    await asyncio.wait(tasks, timeout=10)
    assert tasks[0].cancelled()
    assert door.entered == ["second"]


def test_a_cancellation_at_any_await_leaves_nobody_waiting_in_vain() -> None:
    door = Door()

    async def scenario() -> None:
        door.__init__()  # type: ignore[misc]
        tasks: list[asyncio.Task[None]] = []
        try:
            tasks = await door.everyone("first", "second")
            door.open = True
            wake(door.waiters)
            await tasks[0]
        finally:
            door.open = True
            wake_all(door.waiters)
            await asyncio.gather(*tasks, return_exceptions=True)

    def check() -> None:
        assert not door.waiters
        assert not door.entered or "second" in door.entered

    assert cancel_at_every_await(scenario, check=check) >= 1


@pytest.mark.real_time
async def test_waiters_of_several_loops_are_woken_from_any_thread() -> None:
    door = Door()
    names = [f"thread {number}" for number in range(4)]
    threads = [
        threading.Thread(target=lambda name=name: asyncio.run(door.enter(name))) for name in names
    ]
    for thread in threads:
        thread.start()
    here = asyncio.create_task(door.enter("here"))
    while len(door.waiters) < 5:  # noqa: ASYNC110 - loops of other threads come to wait
        await asyncio.sleep(0)
    door.open = True
    await asyncio.to_thread(wake_all, door.waiters)
    await here
    for thread in threads:
        await asyncio.to_thread(thread.join)
    assert sorted(door.entered) == sorted([*names, "here"])


async def test_a_waiter_whose_loop_is_closed_is_passed_over() -> None:
    door = Door()
    loop = VirtualTimeLoop()
    door.waiters.append(loop.create_future())  # whoever made it ended without a word
    loop.close()
    tasks = [asyncio.create_task(door.enter("living"))]
    await asyncio.sleep(0)
    assert len(door.waiters) == 2
    door.open = True
    wake(door.waiters)
    await asyncio.gather(*tasks)
    assert door.entered == ["living"]


async def test_withdraw_says_whether_one_was_woken() -> None:
    loop = asyncio.get_running_loop()
    waiters: Waiters = [loop.create_future(), loop.create_future()]
    first, second = waiters
    assert withdraw(waiters, second) is True
    wake(waiters)
    assert withdraw(waiters, first) is False
    assert withdraw(waiters, second) is False


class _Snatched(list["asyncio.Future[None]"]):
    """Waiters of which another thread takes the last just after one has looked."""

    def pop(self, index: SupportsIndex = -1) -> "asyncio.Future[None]":
        self.clear()
        return super().pop(index)


async def test_a_waiter_that_another_thread_has_just_woken_is_not_missed() -> None:
    for wake_some in (wake, wake_all):
        waiters = _Snatched([asyncio.get_running_loop().create_future()])
        wake_some(waiters)
        assert not waiters


@pytest.mark.real_time
async def test_no_wake_up_is_lost_between_a_fast_waker_and_a_fast_waiter() -> None:
    waiters: Waiters = []
    produced = consumed = 0
    total = 50_000

    def produce() -> None:
        nonlocal produced
        while produced < total:
            produced += 1
            wake(waiters)

    def more() -> bool:
        return consumed < produced

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        async with asyncio.timeout(30):  # a lost wake-up waits for ever
            while consumed < total:
                if consumed == produced:
                    await wait_until(waiters, more)
                consumed = produced
    finally:
        with suppress(RuntimeError):
            await asyncio.to_thread(thread.join)
    assert consumed == total
    assert not waiters
