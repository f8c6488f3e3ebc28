"""The ring of records against a plain list."""

import random

import pytest

from codomyrmex.events.streaming.log import Record, ring
from codomyrmex.events.streaming.log.ring import Ring
from codomyrmex.events.streaming.topics import Selection

FILTERS = ("*", "a", "b", ["a", "b"], "x.*", ["a", "x.>"], "nobody")


def record(position: int, *topics: str, size: int = 1) -> Record:
    return Record(position, "", topics, "", False, b"x" * size, b"", 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_is_like_a_list(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_SCANNED_AT_ONCE", 5)
    monkeypatch.setattr(ring, "_TIDIED_AT_LEAST", 10)
    chance = random.Random(seed)
    first = chance.choice((1, 100))
    ours, plain = Ring(first), list[Record]()
    for _ in range(200):
        end = plain[-1].position if plain else first - 1
        new = [
            record(
                end + 1 + number,
                *chance.sample(("a", "b", "x.1", "x.2"), chance.randrange(3)),
                size=chance.randrange(10),
            )
            for number in range(chance.randrange(8))
        ]
        assert ours.add(new) == sum(each.size for each in new)
        plain += new
        if len(plain) > 20:
            count = chance.randrange(12)
            gone, plain = plain[:count], plain[count:]
            assert ours.drop(count) == gone
        assert len(ours) == len(plain)
        assert ours.bytes == sum(each.size for each in plain)
        if not plain:
            continue
        assert (ours.first, ours.last) == (plain[0].position, plain[-1].position)
        assert ours.at(ours.last) is plain[-1]
        for topics in FILTERS:
            selection = Selection(topics)
            after = chance.randint(ours.first - 1, ours.last)
            wanted = [
                each for each in plain if each.position > after and selection.matches(each.topics)
            ]
            found, reached = ours.page(after, selection, 3)
            assert found == wanted[:3]
            assert reached == (found[-1].position if len(found) == 3 else ours.last) or not found
            start, skipped = ours.before_last(2, after, selection)
            assert skipped == max(0, len(wanted) - 2)
            assert [each for each in wanted if each.position > start] == wanted[-2:]


def test_what_has_to_go_is_no_more_than_that() -> None:
    ours = Ring()
    assert ours.excess(0, 0) == 0
    ours.add([record(1, size=1), record(2, size=2), record(3, size=3), record(4, size=4)])
    assert ours.excess(10, 10) == 0
    assert ours.excess(3, 10) == 1
    assert ours.excess(10, 9) == 1
    assert ours.excess(10, 8) == 2
    assert ours.excess(10, 4) == 3
    assert ours.excess(2, 9) == 2
    assert ours.excess(0, 0) == 3  # the last stays
    ours.drop(2)
    assert ours.excess(10, 7) == 0
    assert ours.excess(10, 6) == 1
