"""The page's files as they are served; what the page does is tested in tests/browser."""

import hashlib
import re
from importlib.resources import files

import httpx
import pytest

from codomyrmex.events.streaming.log import Log
from tests.hub.serving import ServedUrl, error_of, open_hub, serving

PAGE = files("codomyrmex.events.streaming.hub") / "page"
FILES = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "chart.js": "text/javascript; charset=utf-8",
    "source.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def test_the_page(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.content == (PAGE / "index.html").read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_its_files(client: httpx.Client, name: str) -> None:
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == FILES[name]
    assert answer.content == (PAGE / name).read_bytes()


def test_all_of_them() -> None:
    assert {file.name for file in PAGE.iterdir()} == {*FILES, "index.html"}


@pytest.mark.parametrize("name", ["index.html", *FILES])
def test_nothing_comes_from_elsewhere_and_every_link_leads_somewhere(
    client: httpx.Client, name: str
) -> None:
    text = (PAGE / name).read_text("utf-8")
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}
    folder = "/" if name == "index.html" else "/page/"
    links = re.findall(r"(?:href|src)=\"([^\"]+)\"|from \"([^\"]+)\"", text)
    for link in ("".join(link) for link in links):
        assert not link.startswith("/"), "the hub may be mounted below another path"
        assert client.get(folder + link).status_code == 200


def test_a_browser_keeps_what_has_not_changed(client: httpx.Client) -> None:
    first = client.get("/page/page.css")
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    assert hashlib.sha256(first.content).hexdigest()[:32] in etag
    for known in (etag, f'"other", W/{etag}', "*"):
        again = client.get("/page/page.css", headers={"If-None-Match": known})
        assert again.status_code == 304
        assert again.content == b""
        assert again.headers["etag"] == etag
    changed = client.get("/page/page.css", headers={"If-None-Match": '"other"'})
    assert changed.status_code == 200


def test_what_the_page_may_do(client: httpx.Client) -> None:
    headers = client.get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"


def test_head(client: httpx.Client) -> None:
    answer = client.head("/")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) == len((PAGE / "index.html").read_bytes())
    assert answer.content == b""


@pytest.mark.parametrize(
    "path",
    [
        "/page",
        "/page/",
        "/page/index.html",
        "/index.html",
        "/page.css",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "/page//etc/passwd",
        "/page/page.css/",
        "/page/PAGE.CSS",
        "/page/page.css%00",
        "//page/page.css",
        "/page/page/page.css",
        "/favicon.ico",
        "/..",
    ],
)
def test_nothing_else_is_there(url: ServedUrl, path: str) -> None:
    # By hand, since clients tidy such paths up.
    with url.connect() as connection:
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {url.host}\r\nConnection: close\r\n\r\n".encode()
        )
        with connection.makefile("rb") as answer:
            assert answer.readline().split()[1] == b"404"


def test_a_hub_without_a_page(log: Log) -> None:
    with (
        serving(open_hub(log, page=False)) as url,
        httpx.Client(base_url=url) as client,
    ):
        for path in ("/", "/page/page.css"):
            answer = client.get(path)
            assert answer.status_code == 404
            assert path in error_of(answer)
        assert client.post("/events/t", content="1").status_code == 201
