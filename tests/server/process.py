"""`codomyrmex-streaming serve` as a process of its own, for tests that stop and kill it."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import Self

PATIENCE = 20.0
"""Seconds within which a process must have started or ended."""


class ServeProcess:
    """The command, started; use it as a context manager.

    Attributes:
        url: where it serves, without a final slash.
        greeting: what it printed when it was ready.
    """

    url: str
    greeting: str

    def __init__(self, *arguments: str, port: int = 0) -> None:
        self._command = [sys.executable, "-m", "codomyrmex.events.streaming.cli", "serve"]
        self._command += ["--port", str(port), *arguments]
        if "--log" not in arguments:
            self._command += ["--log", "memory://"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the process is

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdout is not None
        lines = []
        for line in self._process.stdout:
            lines.append(line)
            if "log:" in line:
                lines.append(self._process.stdout.readline())
                break
        else:
            raise AssertionError(f"it did not start: {lines} {self.errors}")
        self.greeting = "".join(lines)
        self.url = lines[0].split()[2].rstrip(",")
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.communicate()
        self._errors.close()

    def signal(self, number: signal.Signals) -> int:
        """Send a signal and return the exit code."""
        self._process.send_signal(number)
        return self._process.wait(PATIENCE)

    def interrupt(self) -> None:
        """Ctrl-C"""
        self._process.send_signal(signal.SIGINT)

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """kill -9"""
        self.signal(signal.SIGKILL)

    @property
    def errors(self) -> str:
        """What it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read().decode()
