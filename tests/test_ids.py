"""Ids: the layout of RFC 9562, order, and uniqueness across threads and forks."""

import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codomyrmex.events.streaming import Event
from codomyrmex.events.streaming.ids import format_uuid7, new_sequence, uuid7

NANOSECONDS = st.integers(0, (1 << 48) * 1_000_000 - 1)
SEQUENCE = st.integers(0, (1 << 54) - 1)


@given(NANOSECONDS, SEQUENCE)
def test_the_layout_is_that_of_uuid_version_7(nanoseconds: int, sequence: int) -> None:
    text = format_uuid7(nanoseconds, sequence)
    parsed = uuid.UUID(text)
    assert str(parsed) == text
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert parsed.int >> 80 == nanoseconds // 1_000_000
    fraction = (parsed.int >> 64 & 0xFFF) << 8 | parsed.int >> 54 & 0xFF
    assert fraction == nanoseconds % 1_000_000
    assert parsed.int & (1 << 54) - 1 == sequence


def test_the_example_of_rfc_9562() -> None:
    # Appendix A.6: 0x017F22E279B0 milliseconds, rand_a 0xCC3, rand_b 0x18C4DC0C0C07398F.
    rand_b = 0x18C4DC0C0C07398F
    rest = 0xCC3 << 8 | rand_b >> 54
    assert rest < 1_000_000
    text = format_uuid7(0x017F22E279B0 * 1_000_000 + rest, rand_b & (1 << 54) - 1)
    assert text == "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"


@given(st.tuples(NANOSECONDS, SEQUENCE), st.tuples(NANOSECONDS, SEQUENCE))
def test_ids_sort_by_time_and_then_by_sequence(one: tuple[int, int], two: tuple[int, int]) -> None:
    assert (format_uuid7(*one) < format_uuid7(*two)) == (one < two)


def test_a_time_beyond_what_fits_still_gives_an_id() -> None:
    for nanoseconds in (-1, (1 << 48) * 1_000_000):
        assert uuid.UUID(format_uuid7(nanoseconds, 0)).version == 7
    assert uuid.UUID(format_uuid7(0, 1 << 54)).int & (1 << 62) - 1 == 0


def test_a_sequence_counts_from_a_random_start_that_it_will_never_see_wrap() -> None:
    starts = set()
    for _ in range(200):
        following = new_sequence()
        start = following()
        assert 0 <= start < 1 << 53
        assert [following(), following()] == [start + 1, start + 2]
        starts.add(start)
    assert len(starts) == 200
    assert max(starts) > 1 << 51  # all the bits are random, not the lower ones alone


def test_uuid7_is_of_now_and_never_the_same() -> None:
    before = time.time_ns()
    ids = [uuid7() for _ in range(1000)]
    after = time.time_ns()
    assert len(set(ids)) == 1000
    milliseconds = [uuid.UUID(each).int >> 80 for each in ids]
    assert before // 1_000_000 <= milliseconds[0] <= milliseconds[-1] <= after // 1_000_000
    assert len({each[-13:] for each in ids}) == 1000


class TestOfEvents:
    def test_they_sort_in_the_order_of_creation(self) -> None:
        events = [Event() for _ in range(10_000)]
        ids = [event.id for event in reversed(events)][::-1]
        assert all(one < two for one, two in pairwise(ids))

    def test_they_do_so_within_one_tick_of_the_clock(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now = time.time_ns()
        monkeypatch.setattr("codomyrmex.events.streaming.models._time_ns", lambda: now)
        ids = [Event().id for _ in range(1000)]
        assert all(one < two for one, two in pairwise(ids))

    def test_an_id_is_of_the_time_of_creation_and_not_of_reading(self) -> None:
        before = time.time_ns()
        event = Event()
        after = time.time_ns()
        time.sleep(0.002)
        made = uuid.UUID(event.id).int >> 80
        assert before // 1_000_000 <= made <= after // 1_000_000

    def test_threads_never_get_the_same(self) -> None:
        found: list[list[str]] = []

        def make() -> None:
            events = [Event() for _ in range(5000)]
            found.append([event.id for event in events])

        threads = [threading.Thread(target=make) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ids = [each for some in found for each in some]
        assert len(set(ids)) == len(ids) == 40_000

    def test_threads_that_read_one_event_see_one_id_and_one_timestamp(self) -> None:
        for _ in range(50):
            event = Event()
            together = threading.Barrier(4)
            seen: list[tuple[str, object]] = []

            def read(
                event: Event = event,
                together: threading.Barrier = together,
                seen: list[tuple[str, object]] = seen,
            ) -> None:
                together.wait()
                seen.append((event.id, event.timestamp))

            threads = [threading.Thread(target=read) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(seen) == 4
            assert len(set(seen)) == 1

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    def test_a_forked_child_gets_others_than_its_parent(self) -> None:
        shared = Event()  # its id is not made yet
        child = in_a_child(lambda: [Event() for _ in range(1000)], shared)
        parent = [Event().id for _ in range(1000)]
        assert child[0] == shared.id  # one event has one id, wherever it is read
        assert len(set(child[1:])) == 1000
        assert not set(child) & set(parent)
        # The clock alone does not tell them apart: the numbers behind the time are others.
        numbers = {uuid.UUID(each).int & (1 << 54) - 1 for each in parent}
        assert not {uuid.UUID(each).int & (1 << 54) - 1 for each in child[1:]} & numbers


def in_a_child(make: Callable[[], list[Event]], shared: Event) -> list[str]:
    """The ids of a shared event and of those that a forked child makes."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pythons that warn of threads
        child = os.fork()
    if child == 0:  # pragma: no cover - in the child
        status = 1
        try:
            ids = [shared.id, *(event.id for event in make())]
            with os.fdopen(writer, "w") as pipe:
                pipe.write("\n".join(ids))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        ids = pipe.read().split("\n")
    assert os.waitpid(child, 0)[1] == 0
    return ids
