"""An answer that is being written goes on, whatever happens to those who read it.

Without arguments this file shows it: it starts a server, has an answer written, kills the server
with -9 in the middle and starts it again, while a reader reads on. Then it does the same to the
process that writes. Each part can be started by hand as well:

    python examples/resumable_answer.py serve            # http://127.0.0.1:8001/answers/...
    python examples/resumable_answer.py write 42         # writes the answer 42
    python examples/resumable_answer.py read 42          # reads it; curl -N does, too
    curl -X POST http://127.0.0.1:8001/answers/43        # has the server itself write one
    curl -N http://127.0.0.1:8001/answers/43
"""

import argparse
import asyncio
import http.client
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from codomyrmex.events.streaming import UnknownRun
from codomyrmex.events.streaming.codec import json, sse
from codomyrmex.events.streaming.log import LogStream

TEXT = (
    "Everything that must survive a disconnect, a restart or a crash stands on one thing: an "
    "ordered, replayable, bounded log. Whoever reads it remembers the last event it has got, and "
    "goes on from there."
)


async def tokens() -> AsyncIterator[str]:
    """What a model would give, a word at a time."""
    for word in TEXT.split():
        await asyncio.sleep(0.1)
        yield f"{word} "


# The server: an ASGI application. With a framework it would be shorter.


class Server:
    """``POST /answers/42`` has the answer 42 written, ``GET /answers/42`` streams it."""

    def __init__(self, stream: LogStream) -> None:
        self.stream = stream

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        topic = scope["path"].strip("/").replace("/", ".")
        headers = dict(scope["headers"])
        if scope["method"] == "POST":
            await self.stream.run(topic, tokens, once=True)
            await answer(send, 202)
        else:
            cursor = headers.get(b"last-event-id", b"").decode() or None
            try:
                async with self.stream.attach(topic, cursor) as events:
                    await self.write_events(events, send)
            except UnknownRun:
                await answer(send, 404)

    async def write_events(self, events: AsyncIterator[Any], send: Any) -> None:
        first = await anext(events)
        if first.type == "stream.end" and first.data["state"] == "completed":
            await answer(send, 204)  # a reader that has the whole stops reconnecting
            return
        await answer(send, 200, more=True)
        await send_text(send, first.to_sse())
        async for event in events:
            await send_text(send, event.to_sse())
        await send({"type": "http.response.body"})


async def answer(send: Any, status: int, *, more: bool = False) -> None:
    headers = [(b"content-type", b"text/event-stream")] if more else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if not more:
        await send({"type": "http.response.body"})


async def send_text(send: Any, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def serve(file: Path, port: int, lease: float) -> None:
    import uvicorn  # noqa: PLC0415  (needed for this part only)

    async with LogStream(f"sqlite:///{file}", lease=lease) as stream:
        config = uvicorn.Config(Server(stream), port=port, log_level="warning", lifespan="off")
        await uvicorn.Server(config).serve()


# The process that writes, if it is not the server.


async def write(file: Path, name: str, lease: float) -> None:
    async with LogStream(f"sqlite:///{file}", lease=lease) as stream:
        run = await stream.run(f"answers.{name}", tokens)
        await run.wait()


# The reader.


def read(port: int, name: str, *, patience: float = 30.0) -> Iterator[sse.Frame]:
    """The events of an answer, whatever happens to the server: as a browser's EventSource does."""
    cursor = ""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=patience)
            headers = {"Last-Event-ID": cursor} if cursor else {}
            connection.request("GET", f"/answers/{name}", headers=headers)
            response = connection.getresponse()
            if response.status == 204:
                return
            decoder = sse.Decoder(last_event_id=cursor)
            while response.status == 200 and (data := response.read1()):
                for frame in decoder.feed(data):
                    yield frame
                    if frame.event == "stream.end":
                        return
                    cursor = frame.id or cursor
        except (OSError, http.client.HTTPException):
            pass  # the connection was cut, or nobody answers: it is tried again
        time.sleep(0.2)
    raise SystemExit("nobody answers: is the server running?")


# The show.


class Parts:
    """The processes of the show."""

    def __init__(self, directory: str, port: int) -> None:
        self.options = ["--file", f"{directory}/answers.db", "--port", str(port), "--lease", "3"]

    def start(self, *words: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, __file__, *words, *self.options])


def kill(process: "subprocess.Popen[bytes]", what: str) -> None:
    print(f"\n--- kill -9 {process.pid}: {what} ---", flush=True)
    process.send_signal(signal.SIGKILL)
    process.wait()


def post(port: int, name: str) -> None:
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("POST", f"/answers/{name}")
            connection.getresponse()
            break
        except OSError:  # it is starting
            time.sleep(0.1)


def show(port: int) -> int:
    with tempfile.TemporaryDirectory() as directory:
        parts = Parts(directory, port)
        server = parts.start("serve")
        writer = parts.start("write", "42")
        try:
            print("An answer is written by one process and served by another.\n")
            got = ""
            for number, frame in enumerate(read(port, "42")):
                if frame.event == "stream.end":
                    break
                got += str(frame_data(frame))
                print(frame_data(frame), end="", flush=True)
                if number == 12:
                    kill(server, "the server. It is started again")
                    server = parts.start("serve")
            whole = got.split() == TEXT.split()
            print(f"\n\nThe reader has {'the whole text' if whole else 'lost something'}.\n")

            print("The next answer is written by the server itself.\n")
            post(port, "43")
            end = None
            for number, frame in enumerate(read(port, "43")):
                if frame.event == "stream.end":
                    end = frame_data(frame)
                    break
                print(frame_data(frame), end="", flush=True)
                if number == 12:
                    kill(server, "the server, which writes. It is started again")
                    server = parts.start("serve")
            told = end is not None and end["state"] == "interrupted"
            print(f"\n\nThe reader is told: {end}")
        finally:
            for process in (server, writer):
                process.kill()
                process.wait()
    return 0 if whole and told else 1


def frame_data(frame: sse.Frame) -> Any:
    return json.decode(frame.data)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=["serve", "write", "read"])
    parser.add_argument("name", nargs="?", default="42", help="of the answer (default: 42)")
    parser.add_argument("--file", type=Path, default=Path("answers.db"))
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument(
        "--lease", type=float, default=15.0, help="seconds until a killed writer is given up"
    )
    options = parser.parse_args()
    match options.part:
        case "serve":
            asyncio.run(serve(options.file, options.port, options.lease))
        case "write":
            asyncio.run(write(options.file, options.name, options.lease))
        case "read":
            for frame in read(options.port, options.name):
                print(frame_data(frame), end="", flush=True)
            print()
        case _:
            return show(options.port)
    return 0


if __name__ == "__main__":
    sys.exit(main())
