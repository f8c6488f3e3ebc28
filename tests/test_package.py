"""The package as a whole: what it needs, what it offers, and the names that callers know."""

import builtins
import importlib
import importlib.resources
import inspect
import pkgutil
import subprocess
import sys
import textwrap
from typing import Any

import pytest

import codomyrmex.events
from codomyrmex.events import streaming
from codomyrmex.events.streaming import (
    async_stream,
    errors,
    hub,
    log,
    models,
    processors,
    stream,
    subscribers,
    topics,
)

# These are for an extra, or for pytest, and say so when it is missing.
NEED_MORE = ("codomyrmex.events.streaming.server", "codomyrmex.events.streaming.testing.plugin")

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(streaming.__path__, f"{streaming.__name__}.")
    if not info.name.endswith("__main__")
)

HIDE_ALL_BUT_THE_STANDARD_LIBRARY = """
    import sys

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            top = name.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "codomyrmex":
                raise ImportError(f"{name} is hidden")

    sys.meta_path.insert(0, Hidden())
    before = set(sys.modules)
"""


def run_with_the_standard_library_only(code: str) -> None:
    program = textwrap.dedent(HIDE_ALL_BUT_THE_STANDARD_LIBRARY) + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class TestWhatItNeeds:
    def test_other_packages_are_indeed_hidden(self) -> None:
        run_with_the_standard_library_only(
            """
            for name in ("pytest", "msgspec", "orjson", "uvicorn", "hypothesis"):
                try:
                    __import__(name)
                except ImportError:
                    continue
                raise AssertionError(name)
            """
        )

    def test_the_core_is_imported_and_works_with_the_standard_library_only(self) -> None:
        run_with_the_standard_library_only(
            """
            import asyncio
            from codomyrmex.events.streaming import *

            async def main():
                got = []
                async with InMemoryStream() as stream:
                    await stream.subscribe(got.append, topic="orders.*")
                    event = create_event({"total": 9}, topic="orders.new")
                    await stream.publish(event)
                assert got == [event]
                assert Event.from_json(event.to_json()) == event
                assert Event.from_sse(event.to_sse()).data == {"total": 9}

            asyncio.run(main())
            foreign = {name.partition(".")[0] for name in set(sys.modules) - before}
            assert not foreign - sys.stdlib_module_names - {"codomyrmex"}, foreign
            """
        )

    def test_so_is_every_module_that_is_not_for_an_extra(self) -> None:
        names = [name for name in MODULES if not name.startswith(NEED_MORE)]
        assert len(names) > 30
        run_with_the_standard_library_only(
            f"""
            import importlib

            for name in {names}:
                try:
                    importlib.import_module(name)
                except ImportError as error:
                    raise AssertionError(name) from error
            """
        )

    def test_importing_it_loads_neither_the_hub_nor_the_testing_tools(self) -> None:
        run_with_the_standard_library_only(
            """
            import codomyrmex.events.streaming
            outer = [
                name
                for name in sys.modules
                for room in ("hub", "log", "server", "cli", "testing")
                if name.startswith(f"codomyrmex.events.streaming.{room}")
            ]
            assert not outer, outer
            """
        )


class TestWhatItOffers:
    def test_its_names_are_those_of_its_modules(self) -> None:
        of_modules = {
            *async_stream.__all__,
            *errors.__all__,
            *hub.__all__,
            *log.__all__,
            *stream.__all__,
            *(set(models.__all__) - {"Filter", "Handler", "check_event", "control_event"}),
            *(set(processors.__all__) - {"ErrorPolicy"}),
            *(set(subscribers.__all__) & {"Overflow", "QueueStatistics", "SubscriberQueue"}),
            *(set(topics.__all__) & {"Exact", "Pattern"}),
        }
        assert set(streaming.__all__) == of_modules

    def test_each_is_there(self) -> None:
        for name in streaming.__all__:
            assert getattr(streaming, name).__doc__ or name == "Overflow"
        names: dict[str, Any] = {}
        exec(f"from {streaming.__name__} import *", names)
        assert set(streaming.__all__) <= names.keys()

    @pytest.mark.parametrize("name", MODULES)
    def test_each_module_offers_what_it_says(self, name: str) -> None:
        module = importlib.import_module(name)
        offered = getattr(module, "__all__", [])
        assert len(offered) == len(set(offered))
        for each in offered:
            assert hasattr(module, each)
        assert module.__doc__

    def test_it_does_not_shadow_a_builtin(self) -> None:
        assert not set(streaming.__all__) & set(dir(builtins))

    def test_a_name_that_is_not_there_is_an_attribute_error(self) -> None:
        with pytest.raises(AttributeError, match=r"streaming' has no attribute 'Nothing'"):
            _ = streaming.Nothing

    def test_the_hub_is_loaded_when_it_is_asked_for(self) -> None:
        assert streaming.Hub is hub.Hub
        assert streaming.SQLiteLog is log.SQLiteLog

    def test_it_is_typed(self) -> None:
        assert importlib.resources.files(streaming).joinpath("py.typed").is_file()

    def test_its_parents_are_namespaces_that_others_can_share(self) -> None:
        assert codomyrmex.__file__ is None
        assert codomyrmex.events.__file__ is None


REQUIRED = inspect.Parameter.empty

# Names, order and defaults of arguments are a contract: existing callers rely on them.
CONTRACT: list[tuple[Any, list[tuple[str, Any]]]] = [
    (streaming.Event, [(n, None) for n in ("id", "type", "data", "metadata", "timestamp")]),
    (streaming.InMemoryStream, [("buffer_size", 1000)]),
    (streaming.SSEStream, [("buffer_size", 100)]),
    (streaming.TopicStream, [("idle_ttl", 600.0)]),
    (streaming.AsyncStream, [("buffer_size", 1000), ("enable_backpressure", True)]),
    (streaming.WebSocketStream, []),
    (streaming.BatchingStream, [("batch_size", 100), ("flush_interval", 1.0)]),
    (streaming.StreamProcessor, [("source", REQUIRED)]),
    (streaming.broadcast, [("streams", REQUIRED), ("event", REQUIRED)]),
    (streaming.Stream.publish, [("event", REQUIRED)]),
    (streaming.Stream.subscribe, [("handler", REQUIRED), ("topic", "*"), ("filter_fn", None)]),
    (streaming.Stream.unsubscribe, [("subscription_id", REQUIRED)]),
    (
        streaming.InMemoryStream.subscribe,
        [("handler", REQUIRED), ("topic", "*"), ("filter_fn", None)],
    ),
    (streaming.InMemoryStream.get_recent_events, [("count", 10)]),
    (streaming.SSEStream.events, [("subscription_id", REQUIRED), ("last_event_id", None)]),
    (streaming.SSEStream.sse_generator, [("subscription_id", REQUIRED), ("last_event_id", None)]),
    (streaming.TopicStream.topic, [("name", REQUIRED)]),
    (streaming.TopicStream.publish, [("topic", REQUIRED), ("event", REQUIRED)]),
    (
        streaming.TopicStream.subscribe,
        [("topic", REQUIRED), ("handler", REQUIRED), ("filter_fn", None)],
    ),
    (streaming.TopicStream.unsubscribe, [("subscription_id", REQUIRED)]),
    (streaming.TopicStream.list_topics, []),
    (streaming.AsyncStream.publish, [("event", REQUIRED)]),
    (streaming.AsyncStream.subscribe, [("buffer_size", 100)]),
    (streaming.AsyncStream.unsubscribe, [("subscription_id", REQUIRED)]),
    (streaming.AsyncStream.consume, [("subscription_id", REQUIRED)]),
    (streaming.WebSocketStream.connect, [("websocket", REQUIRED), ("client_id", REQUIRED)]),
    (streaming.WebSocketStream.disconnect, [("client_id", REQUIRED)]),
    (streaming.WebSocketStream.broadcast, [("event", REQUIRED)]),
    (streaming.WebSocketStream.send_to, [("client_id", REQUIRED), ("event", REQUIRED)]),
    (streaming.BatchingStream.add, [("event", REQUIRED)]),
    (streaming.BatchingStream.on_batch, [("handler", REQUIRED)]),
    (streaming.Subscription.should_receive, [("event", REQUIRED)]),
]


@pytest.mark.parametrize(
    ("callee", "contract"), CONTRACT, ids=lambda x: getattr(x, "__qualname__", "")
)
def test_arguments_are_those_that_callers_know(
    callee: Any, contract: list[tuple[str, Any]]
) -> None:
    parameters = [p for p in inspect.signature(callee).parameters.values() if p.name != "self"]
    for parameter, (name, default) in zip(parameters, contract, strict=False):
        assert parameter.name == name
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if callee is not streaming.Event:
            assert parameter.default == default
    assert len(parameters) >= len(contract)
    for parameter in parameters[len(contract) :]:  # what came later is optional
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not REQUIRED
