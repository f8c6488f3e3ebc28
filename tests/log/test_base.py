"""What all logs share: gaps that add up."""

from codomyrmex.events.streaming.log import Gap, MemoryLog, Retention
from codomyrmex.events.streaming.log.base import Start
from codomyrmex.events.streaming.topics import Selection
from tests.conformance.test_logs import events, ids


class TestGapsOfOneBatch:
    """Retention that goes on between finding the cursor and reading the page."""

    class Log(MemoryLog):
        async def _begin(self, after: str, selection: Selection) -> Start:
            found = await super()._begin(after, selection)
            await self.append(events("between/1", "between/2"))
            return found

    async def test_add_up(self) -> None:
        async with self.Log(Retention(count=2)) as log:
            await log.append(events("1", "2", "3", "4"))
            batch = await log.read("1")
            assert ids(batch) == ["between/1", "between/2"]
            assert batch.gap == Gap("1", "trimmed", 3)

    async def test_are_as_unknown_as_the_least_known_of_them(self) -> None:
        async with self.Log(Retention(count=2)) as log:
            await log.append(events("1", "2", "3", "4"))
            assert (await log.read("never")).gap == Gap("never", "unknown", None)
