"""The command `codomyrmex-streaming`."""

import argparse
import importlib.util
import ipaddress
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Final

from ..errors import LogUnusable, MissingExtra

__all__ = ["main"]

_DISTRIBUTION: Final = "codomyrmex-streaming"
_SERVER_MODULES: Final = ("uvicorn", "httptools", "websockets", "psutil")
_LOG_LEVELS: Final = ("debug", "info", "warning", "error")

_SERVE_HELP: Final = """\
Serve a hub over HTTP: a live page, Server-Sent Events, a WebSocket, and publishing with JSON.
What is published is kept in a log, which a stop and a crash of the server do not harm.
"""
_SERVE_EXAMPLE: Final = """\
example:
  codomyrmex-streaming serve --port 8080
  curl -N 'http://127.0.0.1:8080/events?topic=orders.*'
  curl -d '{"total": 12.5}' 'http://127.0.0.1:8080/events/orders.paid'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: its arguments; the program's own by default.

    Returns:
        The exit code: 0 done, 1 it cannot be done. A usage error exits with 2, as argparse does.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        _serve(arguments)
    except (LogUnusable, MissingExtra, ValueError) as error:
        return _fail(str(error))
    except OSError as error:
        where = _at(arguments.host, arguments.port)
        return _fail(f"cannot listen on {where}: {error.strerror or error} (see --host and --port)")
    except KeyboardInterrupt:  # before the server took over the signal
        pass
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_DISTRIBUTION,
        description="Event streaming to browsers and programs.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    serve = commands.add_parser(
        "serve",
        help="serve a hub over HTTP, with a live page",
        description=_SERVE_HELP,
        epilog=_SERVE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument(
        "--host",
        default="127.0.0.1",
        help="name or address to listen on (default: %(default)s, this machine only)",
    )
    serve.add_argument(
        "--port",
        type=_port,
        default=8000,
        help="port to listen on; 0 takes a free one (default: %(default)s)",
    )
    serve.add_argument(
        "--log",
        default="sqlite:///events.db",
        metavar="URL",
        help="where events are kept: sqlite:///FILE, whose retention can be set as in"
        " sqlite:///events.db?age=86400&bytes=1000000&count=5000 (default: %(default)s, 7 days or"
        " 1 GiB), or memory://",
    )
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="let clients call the hub by this name too, such as hub.example.com or"
        " hub.example.com:8443; can be repeated (default: loopback names and --host)",
    )
    serve.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin too read and publish, such as https://app.example.com;"
        " can be repeated (default: the hub's own page)",
    )
    serve.add_argument(
        "--no-page", dest="page", action="store_false", help="do not serve the live page"
    )
    serve.add_argument(
        "--no-metrics",
        dest="metrics",
        action="store_false",
        help="do not publish this machine's CPU, memory, disk and network to host.*",
    )
    serve.add_argument(
        "--log-level",
        choices=_LOG_LEVELS,
        default="warning",
        help="info also logs each request (default: %(default)s)",
    )
    return parser


def _serve(arguments: argparse.Namespace) -> None:
    if any(importlib.util.find_spec(module) is None for module in _SERVER_MODULES):
        raise MissingExtra("serve", "server")
    from ..server import serve  # noqa: PLC0415 - needs the extra

    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    def on_ready(urls: list[str]) -> None:
        print("\n".join(_greeting(arguments, urls)), flush=True)

    serve(
        arguments.host,
        arguments.port,
        log=arguments.log,
        allowed_hosts=arguments.allow_host,
        allowed_origins=arguments.allow_origin,
        page=arguments.page,
        metrics=arguments.metrics,
        log_level=arguments.log_level,
        on_ready=on_ready,
    )


def _greeting(arguments: argparse.Namespace, urls: list[str]) -> list[str]:
    url = urls[0].replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    data = json.dumps({"text": "Hello"})
    return [
        f"Hub on {', '.join(urls)} (Ctrl-C ends it)",
        f"  page:     {url}/" if arguments.page else "  page:     none (--no-page)",
        f"  read:     curl -N {shlex.quote(f'{url}/events?topic=*')}",
        f"  publish:  curl -d {shlex.quote(data)} {shlex.quote(f'{url}/events/demo.hello')}",
        f"  log:      {arguments.log}",
        _who_may(arguments.host),
    ]


def _who_may(host: str) -> str:
    if _is_loopback(host):
        return "Whoever can run a program on this machine can read and publish everything."
    where = "this machine" if _is_every_address(host) else host
    return (
        f"CAUTION: whoever can reach {where} over the network can read and publish everything:"
        " there are no accounts. Pages of other sites cannot, unless --allow-origin lets them."
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_every_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _at(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _port(text: str) -> int:
    port = int(text) if text.isdecimal() and len(text) <= 5 else None
    if port is None or port > 65535:
        raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")
    return port


def _version() -> str:
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _fail(message: str) -> int:
    print(f"{_DISTRIBUTION}: {message}", file=sys.stderr)
    return 1
