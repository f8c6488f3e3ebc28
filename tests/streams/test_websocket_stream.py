"""WebSocketStream with sockets in memory: order, loss, dead and slow clients, closing, threads."""

import asyncio
import datetime
import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import websockets
from starlette.websockets import WebSocketDisconnect

from codomyrmex.events.streaming import (
    EncodeError,
    Event,
    StreamClosed,
    TopicError,
    WebSocketStream,
    create_event,
)
from codomyrmex.events.streaming.testing import FaultySocket, cancel_at_every_await, run

PATIENCE = 10.0  # seconds of real time for what must happen at once
REPLACED, TOO_SLOW = 4409, 4408


def now() -> float:
    return asyncio.get_running_loop().time()


def received(socket: FaultySocket) -> list[Any]:
    """The data of what a socket was sent; a control event stands as its type and data."""
    events = [Event.from_json(text) for text in socket.sent]
    return [(str(event.type), event.data) if event.is_control else event.data for event in events]


async def settle() -> None:
    """Let everything run that can."""
    await asyncio.sleep(0.001)


class TestSending:
    async def test_a_broadcast_reaches_every_socket_as_json(self) -> None:
        sockets = [FaultySocket() for _ in range(3)]
        event = create_event({"x": 1}, "order.created", topic="orders")
        async with WebSocketStream() as stream:
            for number, socket in enumerate(sockets):
                await stream.connect(socket, f"client {number}")
            await stream.broadcast(event)
        for socket in sockets:
            assert len(socket.sent) == 1
            assert json.loads(socket.sent[0]) == event.to_dict()
            assert Event.from_json(socket.sent[0]) == event
            assert socket.closed == (1000, "")

    async def test_each_client_gets_the_order_of_publishing_whatever_its_pace(self) -> None:
        sockets = [FaultySocket(delay=delay) for delay in (0.0, 0.1, 1.0)]
        async with WebSocketStream() as stream:
            for number, socket in enumerate(sockets):
                await stream.connect(socket, str(number))
            for number in range(20):
                await stream.broadcast(create_event(number))
            assert now() == 0.0
        for socket in sockets:
            assert received(socket) == list(range(20))

    async def test_thousands_of_broadcasts_do_not_outrun_a_quick_client(self) -> None:
        socket = FaultySocket()
        async with WebSocketStream(buffer_size=10) as stream:
            await stream.connect(socket, "a")
            for number in range(2000):
                await stream.broadcast(create_event(number))
            await settle()
            assert stream.statistics().dropped == 0
        assert received(socket) == list(range(2000))
        assert now() == 0.001

    async def test_send_to_reaches_one_client_after_what_waits_for_it(self) -> None:
        ada, bob = FaultySocket(delay=1.0), FaultySocket()
        async with WebSocketStream() as stream:
            await stream.connect(ada, "ada")
            await stream.connect(bob, "bob")
            await stream.broadcast(create_event("all"))
            assert await stream.send_to("ada", create_event("ada")) is True
            assert now() == 2.0
        assert received(ada) == ["all", "ada"]
        assert received(bob) == ["all"]

    async def test_send_to_an_unknown_client_is_false(self) -> None:
        async with WebSocketStream() as stream:
            assert await stream.send_to("nobody", create_event(1)) is False
            assert await stream.send_to("nobody", create_event(object())) is False

    async def test_an_event_that_cannot_be_encoded_is_the_publishers_error_alone(self) -> None:
        socket = FaultySocket()
        async with WebSocketStream() as stream:
            await stream.connect(socket, "a")
            bad = create_event({"deep": [object()]})
            with pytest.raises(EncodeError, match=bad.id):
                await stream.broadcast(bad)
            with pytest.raises(EncodeError):
                stream.publish_nowait(bad)
            with pytest.raises(EncodeError):
                await stream.send_to("a", bad)
            await stream.broadcast(create_event("good"))
        assert received(socket) == ["good"]
        assert stream.statistics().published == 1

    async def test_an_event_whose_topic_is_none_is_the_publishers_error_alone(self) -> None:
        socket = FaultySocket()
        async with WebSocketStream() as stream:
            await stream.connect(socket, "a")
            for topic in ("a.*", ["list"]):
                with pytest.raises(TopicError):
                    await stream.broadcast(create_event(1, topic=topic))
                with pytest.raises(TopicError):
                    stream.publish_nowait(create_event(1, topic=topic))
        assert socket.sent == []

    async def test_without_clients_a_broadcast_goes_nowhere(self) -> None:
        async with WebSocketStream() as stream:
            await stream.broadcast(create_event(1))
            assert stream.publish_nowait(create_event(2))
            assert stream._connections == {}
            assert stream.statistics().published == 2

    @pytest.mark.parametrize("name", ["send_text", "send_str", "send"])
    async def test_the_way_that_sends_text_is_found(self, name: str) -> None:
        sent: list[str] = []

        async def send(text: str) -> None:
            sent.append(text)

        async def other(message: Any) -> None:
            raise AssertionError("this is the way of ASGI messages")

        socket: Any = type("Socket", (), {"send": staticmethod(other)})()
        setattr(socket, name, send)
        async with WebSocketStream() as stream:
            await stream.connect(socket, "a")
            assert await stream.send_to("a", create_event("hello"))
        assert [Event.from_json(text).data for text in sent] == ["hello"]

    async def test_what_cannot_send_is_refused(self) -> None:
        async with WebSocketStream() as stream:
            with pytest.raises(TypeError, match=r"async send\(text\)"):
                await stream.connect(object(), "a")
            assert stream._connections == {}


class TestDeadClients:
    async def test_one_whose_socket_fails_is_removed_and_the_others_go_on(self) -> None:
        dead, alive = FaultySocket(), FaultySocket()
        async with WebSocketStream() as stream:
            await stream.connect(dead, "dead")
            await stream.connect(alive, "alive")
            assert set(stream._connections) == {"dead", "alive"}
            dead.fail(KeyError("whatever a socket raises"))
            await stream.broadcast(create_event(1))
            await settle()
            assert set(stream._connections) == {"alive"}
            await stream.broadcast(create_event(2))
            assert stream.statistics().failed == 1
        assert received(alive) == [1, 2]
        assert dead.closed == (TOO_SLOW, "too slow, or gone")

    async def test_send_to_is_false_where_the_socket_fails_on_telling_a_loss_before_it(
        self,
    ) -> None:
        socket = FaultySocket()
        async with WebSocketStream(buffer_size=1) as stream:
            await stream.connect(socket, "a")
            sending = asyncio.create_task(stream.send_to("a", create_event("for a")))
            asyncio.get_running_loop().call_soon(stream.publish_nowait, create_event("drops"))
            assert stream.publish_nowait(create_event("dropped"))
            socket.fail(ConnectionResetError())
            assert await asyncio.wait_for(sending, PATIENCE) is False
            assert stream.statistics().dropped == 1

    @pytest.mark.parametrize(
        "error",
        [
            ConnectionResetError(),
            websockets.ConnectionClosedError(None, None),
            websockets.ConnectionClosedOK(None, None),
            WebSocketDisconnect(1001),
            KeyError("whatever a socket raises"),
            asyncio.CancelledError(),
        ],
        ids=repr,
    )
    async def test_send_to_one_whose_socket_fails_is_false_and_removes_it(
        self, error: BaseException
    ) -> None:
        socket = FaultySocket()
        async with WebSocketStream() as stream:
            await stream.connect(socket, "a")
            socket.fail(error)
            sending = [
                asyncio.create_task(stream.send_to("a", create_event(number)))
                for number in range(3)
            ]
            assert await asyncio.gather(*sending) == [False] * 3
            assert stream._connections == {}
            assert await stream.send_to("a", create_event(1)) is False

    async def test_one_that_does_not_read_is_disconnected_after_the_timeout(self) -> None:
        stuck, alive = FaultySocket(), FaultySocket()
        stuck.stall()
        async with WebSocketStream(send_timeout=3.0) as stream:
            await stream.connect(stuck, "stuck")
            await stream.connect(alive, "alive")
            sending = asyncio.create_task(stream.send_to("stuck", create_event(0)))
            for number in range(1, 10):
                await stream.broadcast(create_event(number))
            await settle()
            assert received(alive) == list(range(1, 10))
            assert await sending is False
            assert now() == 3.0
            assert set(stream._connections) == {"alive"}
            await settle()
            assert stuck.closed == (TOO_SLOW, "too slow, or gone")
            await stream.broadcast(create_event(10))
        assert received(alive) == list(range(1, 11))

    async def test_ten_seconds_is_the_timeout(self) -> None:
        socket = FaultySocket()
        socket.stall()
        async with WebSocketStream() as stream:
            await stream.connect(socket, "a")
            assert await stream.send_to("a", create_event(0)) is False
            assert now() == 10.0

    async def test_a_client_that_is_lost_while_the_event_is_encoded(self) -> None:
        """As may happen in another thread at any moment; here the encoder runs our code."""

        class Meddling(datetime.tzinfo):
            def utcoffset(self, when: datetime.datetime | None) -> datetime.timedelta:
                for number in range(3):
                    stream.publish_nowait(create_event(number))
                return datetime.timedelta(0)

            dst = utcoffset

            def tzname(self, when: datetime.datetime | None) -> str:
                return "nowhere"

        socket = FaultySocket()
        socket.stall()
        async with WebSocketStream(buffer_size=1, overflow="disconnect") as stream:
            await stream.connect(socket, "a")
            event = create_event(datetime.datetime(2026, 1, 1, tzinfo=Meddling()))
            assert await stream.send_to("a", event) is False
            assert now() == 0.0
            assert stream._connections == {}

    async def test_a_socket_that_fails_because_it_is_let_go_is_no_failure(self) -> None:
        class Touchy(FaultySocket):
            async def send(self, text: str) -> None:
                try:
                    await super().send(text)
                except asyncio.CancelledError:
                    raise OSError("interrupted") from None

        socket = Touchy()
        socket.stall()
        async with WebSocketStream() as stream:
            await stream.connect(socket, "a")
            await stream.broadcast(create_event(1))
            await settle()
            await stream.disconnect("a")
            assert stream.statistics().failed == 0
        assert socket.closed == (1000, "")

    async def test_a_slow_client_is_not_a_stuck_one(self) -> None:
        socket = FaultySocket(delay=2.9)
        async with WebSocketStream(send_timeout=3.0) as stream:
            await stream.connect(socket, "a")
            for number in range(10):
                await stream.broadcast(create_event(number))
        assert received(socket) == list(range(10))


class TestOverflow:
    async def behind(self, stream: WebSocketStream, count: int) -> FaultySocket:
        """A client that has not read one text yet, of so many broadcasts."""
        socket = FaultySocket()
        await stream.connect(socket, "slow")
        socket.stall()
        for number in range(count):
            await stream.broadcast(create_event(number, topic=f"t{number % 2}"))
        return socket

    async def test_drop_oldest_is_the_default_and_tells(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with WebSocketStream(buffer_size=3) as stream:
            socket = await self.behind(stream, 10)
            quick = FaultySocket()
            await stream.connect(quick, "quick")
            assert stream.statistics().queues["slow"].dropped == 6
            assert stream.statistics().buffered == 3
            socket.resume()
            await settle()
            await stream.broadcast(create_event("after"))
        lost = ("stream.lost", {"lost": 6, "overflow": "drop_oldest"})
        assert received(socket) == [0, lost, 7, 8, 9, "after"]
        assert received(quick) == ["after"]
        assert stream.statistics().dropped == 6  # although the client is gone
        warned = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warned) == 1
        assert "slow" in warned[0].getMessage()

    async def test_what_was_lost_before_anything_was_sent_is_told_first(self) -> None:
        socket = FaultySocket()
        async with WebSocketStream(buffer_size=3) as stream:
            await stream.connect(socket, "a")
            for number in range(10):
                assert stream.publish_nowait(create_event(number))
        lost = ("stream.lost", {"lost": 7, "overflow": "drop_oldest"})
        assert received(socket) == [lost, 7, 8, 9]

    async def test_drop_newest(self) -> None:
        async with WebSocketStream(buffer_size=3, overflow="drop_newest") as stream:
            socket = await self.behind(stream, 10)
            socket.resume()
            await settle()
            lost = ("stream.lost", {"lost": 6, "overflow": "drop_newest"})
            # At once, and not only when there is something else to be sent.
            assert received(socket) == [0, 1, 2, 3, lost]
            await stream.broadcast(create_event("after"))
        assert received(socket)[5:] == ["after"]

    async def test_latest_by_key(self) -> None:
        async with WebSocketStream(buffer_size=3, overflow="latest_by_key") as stream:
            socket = await self.behind(stream, 10)
            socket.resume()
        assert received(socket) == [0, 9, 8]
        assert stream.statistics().dropped == 0

    async def test_latest_by_a_key_of_ones_own(self) -> None:
        async with WebSocketStream(
            buffer_size=3, overflow="latest_by_key", key=lambda event: event.data % 3
        ) as stream:
            socket = await self.behind(stream, 10)
            socket.resume()
        assert received(socket) == [0, 7, 8, 9]

    async def test_latest_by_key_drops_only_when_there_are_too_many_keys(self) -> None:
        async with WebSocketStream(
            buffer_size=3, overflow="latest_by_key", key=lambda event: event.data
        ) as stream:
            socket = await self.behind(stream, 10)
            socket.resume()
        lost = ("stream.lost", {"lost": 6, "overflow": "latest_by_key"})
        assert received(socket) == [0, lost, 7, 8, 9]

    async def test_what_one_client_is_sent_is_replaced_by_nothing_else(self) -> None:
        async with WebSocketStream(overflow="latest_by_key") as stream:
            socket = await self.behind(stream, 1)
            first = asyncio.create_task(stream.send_to("slow", create_event("first")))
            second = asyncio.create_task(stream.send_to("slow", create_event("second")))
            await settle()
            for number in range(5):
                await stream.broadcast(create_event(number))
            socket.resume()
            assert await first is True
            assert await second is True
        assert received(socket) == [0, "first", "second", 4]

    async def test_what_one_client_is_sent_and_what_it_loses(self) -> None:
        async with WebSocketStream(buffer_size=2) as stream:
            socket = await self.behind(stream, 1)
            sending = asyncio.create_task(stream.send_to("slow", create_event("evicted")))
            await settle()
            for number in range(1, 3):
                await stream.broadcast(create_event(number))
            assert await sending is False
            socket.resume()
        lost = ("stream.lost", {"lost": 1, "overflow": "drop_oldest"})
        assert received(socket) == [0, lost, 1, 2]

    async def test_disconnect(self) -> None:
        async with WebSocketStream(buffer_size=3, overflow="disconnect") as stream:
            socket = await self.behind(stream, 4)
            assert set(stream._connections) == {"slow"}
            await stream.broadcast(create_event(4))
            assert stream._connections == {}
            await settle()
            assert socket.closed == (TOO_SLOW, "too slow, or gone")
        assert received(socket) == []

    async def test_block_makes_the_publisher_wait_and_loses_nothing(self) -> None:
        slow, quick = FaultySocket(delay=0.1), FaultySocket()
        async with WebSocketStream(buffer_size=4, overflow="block") as stream:
            await stream.connect(slow, "slow")
            await stream.connect(quick, "quick")
            for number in range(50):
                await stream.broadcast(create_event(number))
            assert 4.0 < now() < 5.0
        assert received(slow) == received(quick) == list(range(50))

    async def test_block_ends_with_the_client_that_blocks(self) -> None:
        async with WebSocketStream(buffer_size=1, overflow="block", send_timeout=3.0) as stream:
            await self.behind(stream, 2)
            assert stream.publish_nowait(create_event("refused")) is False
            before = now()
            await stream.broadcast(create_event("after"))
            assert now() - before == 3.0
            assert stream._connections == {}
            assert stream.statistics().refused == 1

    async def test_a_broadcast_cancelled_while_it_waits_has_reached_nobody(self) -> None:
        observed: list[Any] = []
        async with WebSocketStream(buffer_size=1, overflow="block") as stream:
            await stream.as_stream().subscribe(lambda event: observed.append(event.data))
            socket = await self.behind(stream, 2)
            waiting = asyncio.create_task(stream.broadcast(create_event("cancelled")))
            await settle()
            waiting.cancel()
            await settle()
            assert waiting.cancelled()
            socket.resume()
            await stream.broadcast(create_event("after"))
            assert stream.statistics().published == 3
        assert received(socket) == observed == [0, 1, "after"]

    async def test_a_broadcast_that_waits_when_the_stream_closes_is_told_so(self) -> None:
        observed: list[Any] = []
        stream = WebSocketStream(buffer_size=1, overflow="block")
        await stream.as_stream().subscribe(lambda event: observed.append(event.data))
        await self.behind(stream, 2)
        waiting = asyncio.create_task(stream.broadcast(create_event("late")))
        await settle()
        await stream.aclose(drain=False)
        with pytest.raises(StreamClosed):
            await waiting
        assert stream.statistics().published == len(observed) == 2

    async def test_an_unknown_policy_is_refused(self) -> None:
        with pytest.raises(ValueError, match="drop_oldest"):
            WebSocketStream(overflow="drop_all")
        with pytest.raises(ValueError, match="latest_by_key"):
            WebSocketStream(key=lambda event: event.id)


class TestConnections:
    async def test_a_client_id_that_connects_again_replaces_and_closes_the_first(self) -> None:
        first, second = FaultySocket(), FaultySocket()
        async with WebSocketStream() as stream:
            first_connection = await stream.connect(first, "ada")
            await stream.broadcast(create_event(1))
            await settle()
            second_connection = await stream.connect(second, "ada")
            assert first_connection != second_connection
            await settle()
            assert first.closed == (REPLACED, "replaced by a newer connection")
            await stream.disconnect(first_connection)  # by the first one's handler, late
            await stream.broadcast(create_event(2))
            assert await stream.send_to("ada", create_event(3)) is True
            assert stream.statistics().subscribers == 1
        assert received(first) == [1]
        assert received(second) == [2, 3]

    async def test_what_was_being_sent_to_the_first_was_not_sent(self) -> None:
        first = FaultySocket()
        first.stall()
        async with WebSocketStream() as stream:
            await stream.connect(first, "ada")
            sending = [
                asyncio.create_task(stream.send_to("ada", create_event(number)))
                for number in range(3)
            ]
            await settle()
            await stream.connect(FaultySocket(), "ada")
            assert await asyncio.gather(*sending) == [False] * 3

    async def test_the_same_socket_again_stays_open(self) -> None:
        socket = FaultySocket()
        async with WebSocketStream() as stream:
            await stream.connect(socket, "ada")
            await stream.connect(socket, "ada")
            await stream.broadcast(create_event(1))
            await settle()
            assert socket.closed is None
            assert stream.statistics().subscribers == 1
        assert received(socket) == [1]

    @pytest.mark.parametrize("by", ["client", "connection"])
    async def test_disconnect_closes_the_socket(self, by: str) -> None:
        socket = FaultySocket()
        async with WebSocketStream() as stream:
            connection = await stream.connect(socket, "ada")
            await stream.disconnect("ada" if by == "client" else connection)
            assert socket.closed == (1000, "")
            assert stream._connections == {}
            assert await stream.send_to("ada", create_event(1)) is False
            await stream.disconnect("ada")
            await stream.disconnect(connection)
            await stream.disconnect("nobody")

    async def test_disconnect_tells_those_who_wait_for_a_text_to_be_sent(self) -> None:
        socket = FaultySocket()
        socket.stall()
        async with WebSocketStream() as stream:
            await stream.connect(socket, "ada")
            sending = asyncio.create_task(stream.send_to("ada", create_event(1)))
            await settle()
            await stream.disconnect("ada")
            assert await sending is False

    async def test_a_send_that_is_no_longer_waited_for_goes_on(self) -> None:
        socket = FaultySocket(delay=1.0)
        async with WebSocketStream() as stream:
            await stream.connect(socket, "ada")
            sending = asyncio.create_task(stream.send_to("ada", create_event(1)))
            await settle()
            sending.cancel()
        assert received(socket) == [1]

    async def test_statistics_name_the_clients(self) -> None:
        async with WebSocketStream() as stream:
            await stream.connect(FaultySocket(), "ada")
            await stream.connect(FaultySocket(), "bob")
            await stream.broadcast(create_event(1))
            statistics = stream.statistics()
            assert set(statistics.queues) == {"ada", "bob"}
            assert statistics.queues["ada"].received == 1
            assert (statistics.subscribers, statistics.published) == (2, 1)


class Reluctant(FaultySocket):
    """A socket whose `close` takes so long."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self.aborted = False
        self.transport = self

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await asyncio.sleep(self._seconds)
        await super().close(code, reason)

    def abort(self) -> None:
        self.aborted = True


class TestClosing:
    async def test_what_waits_is_sent_first(self) -> None:
        socket = FaultySocket(delay=1.0)
        stream = WebSocketStream()
        await stream.connect(socket, "a")
        for number in range(5):
            await stream.broadcast(create_event(number))
        await stream.aclose()
        assert received(socket) == list(range(5))
        assert socket.closed == (1000, "")

    async def test_without_draining_what_waits_is_not_sent(self) -> None:
        socket = FaultySocket(delay=1.0)

        async def interrupted() -> None:
            async with WebSocketStream() as stream:
                await stream.connect(socket, "a")
                await stream.broadcast(create_event(1))
                raise LookupError

        with pytest.raises(LookupError):
            await interrupted()
        assert now() == 0.0
        assert socket.sent == []
        assert socket.closed == (1000, "")

    async def test_afterwards_nothing_is_taken(self) -> None:
        async with WebSocketStream() as stream:
            await stream.connect(FaultySocket(), "a")
        with pytest.raises(StreamClosed):
            await stream.broadcast(create_event(1))
        with pytest.raises(StreamClosed):
            stream.publish_nowait(create_event(1))
        with pytest.raises(StreamClosed):
            await stream.connect(FaultySocket(), "b")
        assert await stream.send_to("a", create_event(1)) is False
        assert stream.statistics().published == 0
        await stream.aclose()

    async def test_a_socket_that_closes_slowly_is_waited_for(self) -> None:
        socket = Reluctant(2.0)
        async with WebSocketStream() as stream:
            await stream.connect(socket, "a")
        assert now() == 2.0
        assert socket.closed == (1000, "")
        assert not socket.aborted

    async def test_one_that_hangs_is_cut_off_after_the_timeout(self) -> None:
        sockets = [Reluctant(1000.0) for _ in range(5)]
        async with WebSocketStream(send_timeout=3.0) as stream:
            for number, socket in enumerate(sockets):
                await stream.connect(socket, str(number))
            await stream.disconnect("0")
            assert now() == 3.0
        assert now() == 6.0  # all of them at the same time
        assert all(socket.aborted for socket in sockets)

    async def test_cancelled_it_closes_and_cancelled_again_it_cuts_off(self) -> None:
        stuck, hanging = FaultySocket(), Reluctant(1000.0)
        stream = WebSocketStream()
        stuck.stall()
        await stream.connect(stuck, "stuck")
        await stream.connect(hanging, "hanging")
        await stream.broadcast(create_event(1))
        closing = asyncio.create_task(stream.aclose())
        await asyncio.sleep(1.0)
        closing.cancel()
        await asyncio.sleep(1.0)
        assert stuck.closed == (1000, "")
        assert not closing.done()
        assert not hanging.aborted
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await settle()
        assert now() == pytest.approx(2.0, abs=0.01)
        assert hanging.aborted

    @pytest.mark.parametrize("error", [OSError("gone"), asyncio.CancelledError()])
    async def test_one_that_cannot_be_closed_is_closed_enough(self, error: BaseException) -> None:
        class Broken(FaultySocket):
            async def close(self, code: int = 1000, reason: str = "") -> None:
                raise error

        class WithoutConnection(Broken):
            def get_extra_info(self, name: str) -> None:
                return None

        async with WebSocketStream() as stream:
            await stream.connect(Broken(), "a")
            await stream.connect(WithoutConnection(), "b")

    async def test_every_kind_of_close(self) -> None:
        calls: list[Any] = []

        class Socket:
            async def send(self, text: str) -> None:
                pass

        class Nothing(Socket):
            def close(self) -> None:
                calls.append("nothing")

        class Code(Socket):
            async def close(self, code: int) -> None:
                calls.append(code)

        class Message(Socket):
            async def close(self, *, code: int, message: bytes) -> None:
                calls.append((code, message))

        def closing() -> Iterator[None]:
            calls.append("not in Python")
            yield

        class NotWrittenInPython(Socket):
            def __init__(self) -> None:
                self.close = partial(next, closing())  # it has no signature that can be told

        async with WebSocketStream() as stream:
            for kind in (Socket, Nothing, Code, Message, NotWrittenInPython):
                await stream.connect(kind(), "the same client")
            await stream.connect(Socket(), "the same client")
            await settle()
        assert calls == [
            "nothing",
            REPLACED,
            (REPLACED, b"replaced by a newer connection"),
            "not in Python",
        ]

    def test_cancelled_anywhere_nothing_is_left_and_sockets_are_closed(self) -> None:
        sockets: list[FaultySocket] = []

        async def scenario() -> None:
            sockets[:] = [FaultySocket(delay=0.1), FaultySocket(), FaultySocket()]
            async with WebSocketStream(buffer_size=2, overflow="block") as stream:
                connection = await stream.connect(sockets[0], "a")
                await stream.connect(sockets[1], "b")
                for number in range(3):
                    await stream.broadcast(create_event(number))
                await stream.send_to("a", create_event(3))
                await stream.connect(sockets[2], "b")
                await stream.disconnect(connection)

        def check() -> None:
            for socket in sockets:
                assert received(socket) == list(range(len(socket.sent)))
                assert socket.closed or not socket.sent

        assert cancel_at_every_await(scenario, check=check) >= 5


class TestThreadsAndLoops:
    @pytest.mark.real_time
    async def test_a_broadcast_of_another_thread_is_sent_in_the_loop_of_the_socket(self) -> None:
        loop = asyncio.get_running_loop()
        homes: set[Any] = set()

        class Socket(FaultySocket):
            async def send(self, text: str) -> None:
                homes.add(asyncio.get_running_loop())
                await super().send(text)

        socket = Socket()

        def publish() -> None:
            for number in range(500):
                assert stream.publish_nowait(create_event(number))

        async def broadcast() -> None:
            for number in range(500, 1000):
                await stream.broadcast(create_event(number))

        async with WebSocketStream(buffer_size=0) as stream:
            await stream.connect(socket, "a")
            await asyncio.to_thread(publish)
            await asyncio.to_thread(asyncio.run, broadcast())
        assert received(socket) == list(range(1000))
        assert homes == {loop}

    @pytest.mark.real_time
    async def test_send_to_from_another_loop_learns_what_became_of_it(self) -> None:
        good, bad = FaultySocket(), FaultySocket()
        bad.fail(ConnectionResetError())
        async with WebSocketStream() as stream:
            await stream.connect(good, "good")
            await stream.connect(bad, "bad")

            async def send() -> list[bool]:
                answers = []
                for client in ("good", "bad", "bad", "nobody"):
                    answer = stream.send_to(client, create_event(client))
                    answers.append(await asyncio.wait_for(answer, PATIENCE))
                return answers

            assert await asyncio.to_thread(asyncio.run, send()) == [True, False, False, False]
        assert received(good) == ["good"]

    @pytest.mark.real_time
    async def test_a_client_can_be_disconnected_from_another_loop(self) -> None:
        socket = FaultySocket()
        async with WebSocketStream() as stream:
            await stream.connect(socket, "a")
            await asyncio.to_thread(asyncio.run, stream.disconnect("a"))
            assert socket.closed == (1000, "")

    @pytest.mark.real_time
    async def test_it_can_be_closed_from_another_loop(self) -> None:
        socket, hanging = FaultySocket(), Reluctant(1000.0)
        stream = WebSocketStream(send_timeout=0.05)
        await stream.connect(socket, "a")
        await stream.connect(hanging, "b")
        await stream.broadcast(create_event(1))
        await asyncio.to_thread(asyncio.run, stream.aclose())
        assert socket.closed == (1000, "")
        assert hanging.aborted

    def test_sockets_of_a_loop_that_was_closed_are_gone(self) -> None:
        stream = WebSocketStream()
        socket = FaultySocket()

        async def first() -> None:
            await stream.connect(socket, "a")
            await stream.connect(FaultySocket(), "b")

        async def second() -> None:
            await stream.disconnect("a")
            await stream.aclose()

        asyncio.run(first())
        run(second())
        assert stream._connections == {}
        assert socket.sent == []

    def test_whoever_waits_in_a_loop_that_is_closed_is_left_alone(self) -> None:
        """The answer to a `send_to` of a loop that is gone is given to nobody."""
        stalled = threading.Event()
        over = threading.Event()
        stream = WebSocketStream()
        socket = FaultySocket()
        socket.stall()

        async def home() -> None:
            await stream.connect(socket, "a")
            stalled.set()
            await asyncio.to_thread(over.wait, PATIENCE)
            socket.resume()
            await stream.aclose()

        def elsewhere() -> None:
            stalled.wait(PATIENCE)
            loop = asyncio.new_event_loop()
            sending = loop.create_task(stream.send_to("a", create_event(1)))
            loop.run_until_complete(asyncio.sleep(0.01))
            sending.cancel()
            loop.run_until_complete(asyncio.wait([sending]))
            loop.close()
            over.set()

        thread = threading.Thread(target=elsewhere)
        thread.start()
        asyncio.run(home())
        thread.join(PATIENCE)
        assert received(socket) == [1]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_a_forked_child_leaves_the_sockets_to_its_parent(self) -> None:
        stream = WebSocketStream()
        socket = FaultySocket()

        async def there() -> bool:  # pragma: no cover - in the child
            await stream.broadcast(create_event("child"))
            return not await stream.send_to("a", create_event("child"))

        async def here() -> int:
            await stream.connect(socket, "a")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:  # pragma: no cover - in the child
                try:
                    os._exit(0 if asyncio.run(there()) and not socket.sent else 1)
                finally:
                    os._exit(2)
            await stream.broadcast(create_event("parent"))
            await stream.aclose()
            return child

        child = asyncio.run(here())
        deadline = time.monotonic() + PATIENCE
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert ended[1] == 0
        assert received(socket) == ["parent"]


class TestAsStream:
    async def test_publish_is_broadcast_and_handlers_get_what_is_broadcast(self) -> None:
        socket, got = FaultySocket(), list[Any]()

        async def later(event: Event) -> None:
            await asyncio.sleep(0.1)
            got.append(("async", event.data))

        async with WebSocketStream() as websockets, websockets.as_stream() as stream:
            await websockets.connect(socket, "a")
            await stream.subscribe(lambda event: got.append(("sync", event.data)), topic="t.*")
            kept = await stream.subscribe(later, filter_fn=lambda event: event.data != 2)
            gone = await stream.subscribe(lambda event: got.append("gone"))
            assert await stream.unsubscribe(gone.id)
            assert not await stream.unsubscribe(gone.id)
            await stream.publish(create_event(1, topic="t.x"))
            assert stream.publish_nowait(create_event(2, topic="other"))
            assert await stream.finish(kept.id)
            assert got == [("sync", 1), ("async", 1)]
            assert stream.statistics().published == 2
        assert received(socket) == [1, 2]
        assert socket.closed == (1000, "")

    async def test_a_handler_that_is_behind_refuses_for_everybody(self) -> None:
        """`publish_nowait` never sends to some and says that it sent to nobody."""
        socket = FaultySocket()
        free = asyncio.Event()

        async def handle(event: Event) -> None:
            await free.wait()

        async with WebSocketStream(buffer_size=0) as stream:
            await stream.connect(socket, "a")
            await stream.as_stream().subscribe(handle)
            taken = 0
            while stream.publish_nowait(create_event(taken)):
                taken += 1
            await settle()
            assert received(socket) == list(range(taken))
            assert stream.statistics().refused == 1
            free.set()
