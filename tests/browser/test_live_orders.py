"""`examples/live_orders.py`: a hub mounted in a FastAPI application, in a real browser."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from playwright.sync_api import expect

from tests.browser.conftest import OpenPage
from tests.server.test_stopping import wait_for

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_two_tabs_see_what_is_ordered(open_page: OpenPage) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "uvicorn", "live_orders:app", "--port", str(port)]
    with subprocess.Popen([*command, "--log-level", "warning"], cwd=EXAMPLES) as server:
        try:
            wait_for(f"{url}/live/healthz", '{"status":"ok"}\n')
            first = open_page(url)
            httpx.post(f"{url}/orders/1?state=new").raise_for_status()
            expect(first.locator("li")).to_have_text(["order 1 is new"])
            second = open_page(url)
            httpx.post(f"{url}/orders/2?state=<b>paid</b>").raise_for_status()
            for page in (first, second):
                expect(page.locator("li")).to_have_text(
                    ["order 2 is <b>paid</b>", "order 1 is new"]
                )
            assert httpx.post(f"{url}/live/events/orders.1", content="1").status_code == 403
            begin = time.monotonic()
            server.send_signal(signal.SIGINT)
            server.wait(10)
            assert time.monotonic() - begin < 2
        finally:
            server.kill()
