import pytest

PLUGIN = ("-p", "codomyrmex.events.streaming.testing.plugin")


def result_of(pytester: pytest.Pytester, source: str, *options: str) -> pytest.RunResult:
    pytester.makepyfile(source)
    return pytester.runpytest_inprocess(*PLUGIN, *options)


def test_runs_a_marked_test_in_virtual_time(pytester: pytest.Pytester) -> None:
    result = result_of(
        pytester,
        """
        import asyncio, pytest

        @pytest.fixture
        def seconds():
            return 3600

        @pytest.mark.virtual_time
        @pytest.mark.parametrize("times", [1, 2])
        async def test_function(seconds, times, tmp_path):
            for _ in range(times):
                await asyncio.sleep(seconds)
            assert asyncio.get_running_loop().time() == 3600.0 * times
            assert asyncio.get_running_loop().get_debug()

        @pytest.mark.virtual_time
        class TestIt:
            async def test_method(self, seconds):
                await asyncio.sleep(seconds)
                assert asyncio.get_running_loop().time() == 3600.0
        """,
        "--strict-markers",
    )
    result.assert_outcomes(passed=3)
    assert result.duration < 5


def test_runs_a_test_in_real_time(pytester: pytest.Pytester) -> None:
    result = result_of(
        pytester,
        """
        import asyncio, pytest
        from codomyrmex.events.streaming.testing import VirtualTimeLoop

        @pytest.mark.real_time
        async def test_real():
            loop = asyncio.get_running_loop()
            assert not isinstance(loop, VirtualTimeLoop)
            assert loop.get_debug()
            start = loop.time()
            await asyncio.sleep(0.05)
            assert loop.time() >= start + 0.04

        @pytest.mark.real_time
        def test_synchronous():
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
        """,
        "--strict-markers",
    )
    result.assert_outcomes(passed=2)


def test_a_failure_shows_the_test_and_not_the_machinery(pytester: pytest.Pytester) -> None:
    result = result_of(
        pytester,
        """
        import asyncio, pytest

        @pytest.mark.virtual_time
        async def test_wrong():
            await asyncio.sleep(1)
            assert asyncio.get_running_loop().time() == 2.0
        """,
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*assert 1.0 == 2.0*"])
    result.stdout.no_fnmatch_line("*loop_factory*")


@pytest.mark.parametrize("marker", ["virtual_time", "real_time"])
def test_fails_a_test_that_leaks(pytester: pytest.Pytester, marker: str) -> None:
    result = result_of(
        pytester,
        f"""
        import asyncio, pytest

        @pytest.mark.{marker}
        async def test_leaks():
            asyncio.create_task(asyncio.sleep(30), name="the culprit")
            await asyncio.sleep(0)

        @pytest.mark.{marker}
        async def test_tidy():
            await asyncio.sleep(0)
        """,
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*LeakError: left behind:*", "*the culprit*"])


def test_leaves_other_tests_alone(pytester: pytest.Pytester) -> None:
    result = result_of(
        pytester,
        """
        import pytest

        async def test_unmarked():
            pass

        def test_synchronous():
            pass
        """,
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*async def functions are not natively supported*"])


def test_takes_every_async_test_in_auto_mode_but_those_of_others(
    pytester: pytest.Pytester,
) -> None:
    pytester.makeini("[pytest]\nstreaming_async = auto\nanyio_mode = strict")
    result = result_of(
        pytester,
        """
        import asyncio, pytest
        from codomyrmex.events.streaming.testing import VirtualTimeLoop

        async def test_unmarked():
            assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop)

        @pytest.mark.real_time
        async def test_real():
            assert not isinstance(asyncio.get_running_loop(), VirtualTimeLoop)

        @pytest.mark.anyio
        @pytest.mark.parametrize("anyio_backend", ["asyncio"])
        async def test_of_anyio(anyio_backend):
            assert not isinstance(asyncio.get_running_loop(), VirtualTimeLoop)

        def test_synchronous():
            pass
        """,
    )
    result.assert_outcomes(passed=4)


def test_a_test_of_ours_stays_ours_where_pytest_asyncio_takes_all(
    pytester: pytest.Pytester,
) -> None:
    pytester.makepyfile(
        # What its mode `auto` does; the package itself is not needed here.
        pytest_asyncio="""
        import asyncio, functools, inspect, pytest

        def _synchronize(function):
            @functools.wraps(function)
            def inner(*args, **kwargs):
                asyncio.run(function(*args, **kwargs))
            return inner

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(item):
            given = getattr(item.obj, "hypothesis", None)
            if given is not None:
                given.inner_test = _synchronize(given.inner_test)
            elif inspect.iscoroutinefunction(item.obj):
                item.obj = _synchronize(item.obj)
            return (yield)
        """
    )
    pytester.syspathinsert()
    result = result_of(
        pytester,
        """
        import asyncio, functools, pytest
        from hypothesis import given, strategies
        from codomyrmex.events.streaming.testing import VirtualTimeLoop

        def is_virtual():
            return isinstance(asyncio.get_running_loop(), VirtualTimeLoop)

        @pytest.mark.virtual_time
        async def test_ours():
            assert is_virtual()

        @pytest.mark.virtual_time
        @given(strategies.booleans())
        async def test_ours_generated(value):
            assert is_virtual()

        @pytest.mark.real_time
        class TestIt:
            async def test_ours_too(self):
                assert asyncio.get_running_loop().get_debug()

        async def test_theirs():
            assert not is_virtual()
        """,
        "-p",
        "pytest_asyncio",
        "--strict-markers",
    )
    result.assert_outcomes(passed=4)


def test_refuses_a_misspelt_mode(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nstreaming_async = automatic")
    result = result_of(pytester, "")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*streaming_async must be 'auto' or 'marked', not 'automatic'*"])


def test_runs_each_example_of_hypothesis_in_a_loop_of_its_own(pytester: pytest.Pytester) -> None:
    result = result_of(
        pytester,
        """
        import asyncio, pytest
        from hypothesis import given, settings, strategies as st

        loops = set()

        @pytest.mark.virtual_time
        @pytest.mark.parametrize("factor", [1, 2])
        @settings(max_examples=10)
        @given(seconds=st.integers(1, 100))
        async def test_function(seconds, factor):
            loops.add(asyncio.get_running_loop())
            await asyncio.sleep(seconds * factor)
            assert asyncio.get_running_loop().time() == seconds * factor

        @pytest.mark.virtual_time
        class TestIt:
            @settings(max_examples=1000, database=None)
            @given(st.integers(0, 1000))
            async def test_method(self, seconds):
                await asyncio.sleep(seconds)
                assert asyncio.get_running_loop().time() < 100

        def test_afterwards():
            assert len(loops) == 20
        """,
    )
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["*seconds=100*"])


def test_one_test_can_have_both_markers_by_turns(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        """
        import inspect

        def pytest_runtest_teardown(item):
            inner = getattr(item.obj, "hypothesis", None)
            assert inspect.iscoroutinefunction(inner.inner_test if inner else item.obj)
        """
    )
    result = result_of(
        pytester,
        """
        import asyncio, pytest
        from hypothesis import given, settings, strategies as st
        from codomyrmex.events.streaming.testing import VirtualTimeLoop

        both = pytest.mark.parametrize(
            "virtual",
            [
                pytest.param(True, marks=pytest.mark.virtual_time),
                pytest.param(False, marks=pytest.mark.real_time),
            ],
        )

        @both
        async def test_plain(virtual):
            assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop) == virtual

        @both
        @settings(max_examples=2)
        @given(number=st.integers())
        async def test_given(virtual, number):
            assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop) == virtual
        """,
    )
    result.assert_outcomes(passed=4)


def test_gives_synchronous_tests_a_fixture(pytester: pytest.Pytester) -> None:
    result = result_of(
        pytester,
        """
        import asyncio, pytest
        from codomyrmex.events.streaming.testing import LeakError

        def test_part(virtual_time):
            assert virtual_time(asyncio.sleep(3600, "result")) == "result"

        def test_leak(virtual_time):
            async def main():
                asyncio.get_running_loop().call_later(30, print)

            with pytest.raises(LeakError, match="TimerHandle"):
                virtual_time(main())
        """,
    )
    result.assert_outcomes(passed=2)


def test_the_markers_are_documented(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess(*PLUGIN, "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.virtual_time:*", "@pytest.mark.real_time:*"])
