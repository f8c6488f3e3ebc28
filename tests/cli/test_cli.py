import importlib.util
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from codomyrmex.events.streaming import cli


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "codomyrmex.events.streaming.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)


def test_the_version() -> None:
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout == f"codomyrmex-streaming {metadata.version('codomyrmex-streaming')}\n"


def test_it_is_installed_as_a_command() -> None:
    [command] = metadata.entry_points(group="console_scripts", name="codomyrmex-streaming")
    assert command.load() is cli.main


def test_help_tells_defaults_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for part in ("127.0.0.1", "8000", "--allow-host", "--allow-origin", "curl -N", "curl -d"):
        assert part in text
    assert text.count("default") >= 5


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["serve", "--port", "http"],
        ["serve", "--port", "-1"],
        ["serve", "--port", "65536"],
        ["serve", "--log-level", "loud"],
        ["serve", "--nonsense"],
    ],
)
def test_a_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: codomyrmex-streaming" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["http", "-1", "65536", "1" * 5000, "8 0", "\u0663x", ""])
def test_a_wrong_port_is_told_as_such(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", f"--port={port}"])
    told = f"argument --port: a port is a number from 0 to 65535, not {port!r}\n"
    assert capsys.readouterr().err.endswith(told)


@pytest.mark.parametrize("missing", ["uvicorn", "psutil", "websockets", "httptools"])
def test_a_missing_extra_is_named(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name == missing else find_spec(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert cli.main(["serve"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert "pip install 'codomyrmex-streaming[server]'" in line


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--allow-host", "http://hub.example"], "not a host name or address"),
        (["--allow-origin", "app.example"], "not an origin"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1:0: "),
        (["--host", "2001:db8::1"], "cannot listen on [2001:db8::1]:0: "),
        (["--host", "no-such-name.invalid"], "cannot listen on no-such-name.invalid:0: "),
        (["--log", "events.db"], "a log's URL begins with one of"),
        (["--log", "sqlite:////no/such/directory/events.db"], "/no/such/directory/events.db"),
        (["--host", "a" * 64], f"cannot listen on {'a' * 64}:0: not a host name"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "--port", "0", "--log", "memory://", *arguments]) == 1
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert line.startswith("codomyrmex-streaming: ")
    assert reason in line
    assert captured.out == ""


def test_without_the_extra_nothing_of_it_is_imported() -> None:
    code = (
        "import sys; from codomyrmex.events.streaming.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('uvicorn', 'psutil') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
