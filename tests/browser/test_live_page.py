"""The live page in a real browser, on a real server."""

import json
import re
import signal
import subprocess

import httpx
import pytest
from playwright.sync_api import Locator, Page, Route, expect
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.browser.conftest import OpenPage
from tests.hub.serving import open_hub, serving
from tests.server.process import ServeProcess

expect.set_options(timeout=15_000)

HTTP = httpx.Client()


def status(page: Page) -> Locator:
    return page.locator("#status")


def card(page: Page, title: str) -> Locator:
    return page.locator("article", has=page.get_by_role("heading", name=title, exact=True))


def event_row(page: Page, topic: str) -> Locator:
    """The newest event of a topic."""
    return page.locator("#events tr", has=page.get_by_text(topic, exact=True)).first


def publish(served: ServeProcess, topic: str, data: object, kind: str = "message") -> None:
    url = f"{served.url}/events/{topic}?type={kind}"
    HTTP.post(url, content=json.dumps(data)).raise_for_status()


def live(page: Page) -> Page:
    expect(status(page)).to_have_text(re.compile(r"^\s*live\s*$"))
    return page


def test_the_charts_move(served: ServeProcess, open_page: OpenPage) -> None:
    page = live(open_page(served.url))
    for title in ("CPU", "Memory", "Network"):
        current = card(page, title).locator(".current").first
        expect(current).to_have_text(re.compile(r"^[\d.]+ (%|[kMG]?B/s)$"))
        line = card(page, title).locator("path.line").first
        before = line.get_attribute("d")
        assert before
        expect(line).not_to_have_attribute("d", before)
    # The network's, since of the others two values in a row may well be the same.
    current = card(page, "Network").locator(".current").first
    seen = current.inner_text()
    expect(current).not_to_have_text(seen)
    expect(card(page, "Network").locator(".range").first).to_have_text(
        re.compile(r"min [\d.]+ [kMG]?B/smax [\d.]+ [kMG]?B/s")
    )


def test_the_charts_begin_with_what_was_before(served: ServeProcess, open_page: OpenPage) -> None:
    # Some seconds of measurements, told by a page that has seen them.
    page = live(open_page(served.url))
    line = card(page, "CPU").locator("path.line")
    expect(line).to_have_attribute("d", re.compile(r"M.*(L.*){3}"))
    points = re.compile(r"M[^L]+((L[^L]+){2,})$")
    second = open_page(served.url)
    # Its very first drawing has more than what could have arrived since.
    first_drawing = second.wait_for_function(
        "() => document.querySelector('path.line')?.getAttribute('d')"
    ).json_value()
    assert points.match(first_drawing)


def test_what_is_published_elsewhere_appears(served: ServeProcess, open_page: OpenPage) -> None:
    page = live(open_page(served.url))
    publish(served, "orders.paid", {"total": 12.5, "text": "<b onload='x'>"}, "order.paid")
    row = event_row(page, "orders.paid")
    expect(row).to_be_visible()
    expect(row.locator(".type")).to_have_text("order.paid")
    expect(row.locator(".data")).to_have_text('{"total":12.5,"text":"<b onload=\'x\'>"}')
    expect(row.locator("time")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))


def test_the_form_publishes(served: ServeProcess, open_page: OpenPage) -> None:
    page = live(open_page(served.url))
    page.get_by_label("Topic", exact=True).fill("form/näme")
    page.get_by_label("Type", exact=True).fill("greeting")
    page.get_by_label("Data (JSON)").fill('{"it\'s": "me"}')
    page.get_by_label("Data (JSON)").press("Control+Enter")
    expect(page.locator("#published")).to_have_text("Published to form/näme")
    row = event_row(page, "form/näme")
    expect(row.locator(".data")).to_have_text('{"it\'s":"me"}')
    expect(row.locator(".type")).to_have_text("greeting")


def test_the_form_says_what_is_wrong(served: ServeProcess, open_page: OpenPage) -> None:
    page = live(open_page(served.url))
    for field, value, reason in (
        ("Topic", "", "A topic is needed"),
        ("Topic", "orders.*", "This is a pattern"),
        ("Type", "stream.gap", "are the hub's own"),
        ("Data (JSON)", "", "Data is needed"),
        ("Data (JSON)", '{"a": ', "Not JSON"),
        ("Data (JSON)", "NaN", "Not JSON"),
    ):
        box = page.get_by_label(field, exact=True)
        good = box.input_value()
        box.fill(value)
        page.get_by_role("button", name="Publish", exact=True).click()
        expect(box).to_have_attribute("aria-invalid", "true")
        expect(box).to_have_accessible_description(re.compile(reason))
        expect(box).to_be_focused()
        box.fill(good)
        expect(box).to_have_attribute("aria-invalid", "false")
        expect(page.get_by_text(reason)).to_be_hidden()
    assert page.locator("#published").inner_text() == ""


def test_a_refusal_of_the_hub_is_shown(served: ServeProcess, open_page: OpenPage) -> None:
    page = live(open_page(served.url))
    page.get_by_label("Type", exact=True).fill("heartbeat")
    with page.expect_response(re.compile("/events/")) as answer:
        page.get_by_role("button", name="Publish", exact=True).click()
    assert answer.value.status == 400
    expect(page.locator("#published")).to_have_text(re.compile("^Refused: .*the stream itself"))


def test_it_survives_the_servers_death(open_page: OpenPage) -> None:
    with ServeProcess() as served:
        page = live(open_page(served.url))
        publish(served, "before", 1)
        expect(event_row(page, "before")).to_be_visible()
        served.kill()
        expect(status(page)).to_have_text(re.compile(r"reconnecting…\s+\(for [1-9]\d* s\)"))
        page.get_by_role("button", name="Publish", exact=True).click()
        expect(page.locator("#published")).to_have_text(re.compile("cannot be reached"))
        with ServeProcess(port=served.port) as again:
            live(page)
            publish(again, "after", 2)
            expect(event_row(page, "after")).to_be_visible()
            expect(event_row(page, "before")).to_be_visible()
            expect(page.locator("#events tr.note")).to_have_count(1)  # a gap, told once
            current = card(page, "Network").locator(".current").first
            seen = current.inner_text()
            expect(current).not_to_have_text(seen)


def test_it_survives_a_restart_in_good_order_without_a_word_lost(open_page: OpenPage) -> None:
    with ServeProcess("--no-metrics") as served:
        page = live(open_page(served.url))
        served.signal(signal.SIGINT)
        expect(status(page)).to_have_text(re.compile("reconnecting"))
        with ServeProcess("--no-metrics", port=served.port) as again:
            publish(again, "early", 1)
            live(page)
            expect(event_row(page, "early")).to_be_visible()


def test_it_comes_back_after_an_answer_that_is_no_stream(
    served: ServeProcess, open_page: OpenPage
) -> None:
    """A browser gives up then: the page has to try again itself."""
    page = live(open_page(served.url))
    refused = []

    def refuse(route: Route) -> None:
        refused.append(route.request.url)
        route.fulfill(status=502, body="bad gateway")

    page.route("**/events?*", refuse, times=3)
    page.reload()
    expect(status(page)).to_have_text(re.compile("reconnecting"))
    live(page)
    assert len(refused) == 3


def test_a_server_that_falls_silent_is_noticed(open_page: OpenPage) -> None:
    with ServeProcess() as served:
        page = live(open_page(served.url))
        expect(card(page, "CPU").locator(".current")).to_have_text(re.compile("%"))
        served.pause()
        expect(status(page)).to_have_text(re.compile("reconnecting"))
        served.resume()
        live(page)


def test_live_is_what_delivers_whatever_the_network(
    served: ServeProcess, open_page: OpenPage
) -> None:
    """A laptop without a network still has itself."""
    page = live(open_page(served.url))
    page.evaluate("dispatchEvent(new Event('offline'))")
    live(page)


def test_what_others_publish_as_measurements_does_no_harm(open_page: OpenPage) -> None:
    with ServeProcess() as served:
        page = live(open_page(served.url))
        for topic in ("host.cpu", "host.memory", "host.disk", "host.network"):
            for data in (None, {}, "text", {"percent": "9", "read": [], "received": "x"}):
                publish(served, topic, data, "measurement")
        huge = {"received": 1e300, "sent": -1e300}
        publish(served, "host.network", huge, "measurement")
        # All of it is among the events, and the charts go on; see `open_page` for complaints.
        expect(page.locator("#events tr", has_text='"text"')).to_have_count(4)
        expect(page.locator("#events tr", has_text="1e+300")).to_have_count(1)
        for title in ("CPU", "Network"):
            line = card(page, title).locator("path.line").first
            before = line.get_attribute("d")
            assert before
            assert "NaN" not in before
            expect(line).not_to_have_attribute("d", before)
        page.set_viewport_size({"width": 320, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_pausing(served: ServeProcess, open_page: OpenPage) -> None:
    page = live(open_page(served.url))
    page.get_by_role("button", name="Pause").click()
    button = page.get_by_role("button", name=re.compile("Resume"))
    expect(button).to_have_attribute("aria-pressed", "true")
    publish(served, "while.paused", 1)
    expect(button).to_have_text(re.compile(r"Resume \([1-9]\d* new\)"))
    expect(event_row(page, "while.paused")).to_be_hidden()
    button.click()
    expect(event_row(page, "while.paused")).to_be_visible()


def test_filtering_and_the_bound(served: ServeProcess, open_page: OpenPage) -> None:
    page = live(open_page(served.url))
    for number in range(120):
        publish(served, "many", number)
    rows = page.locator("#events tr")
    expect(rows.filter(has_text="many").first.locator(".data")).to_have_text("119")
    expect(rows).to_have_count(100)
    page.get_by_role("checkbox", name="host.*").uncheck()
    expect(rows.filter(has_text="host.")).to_have_count(0)
    expect(rows).to_have_count(100)
    page.get_by_role("searchbox").fill("MANY")
    expect(rows).to_have_count(100)
    page.get_by_role("searchbox").fill("nothing like it")
    expect(rows).to_have_count(0)
    expect(page.get_by_text("Nothing")).to_be_visible()


def test_the_curl_lines_do_the_same(served: ServeProcess, open_page: OpenPage) -> None:
    page = live(open_page(served.url, permissions=["clipboard-read", "clipboard-write"]))
    page.get_by_label("Topic", exact=True).fill("from.curl")
    page.get_by_label("Type", exact=True).fill("it's me")
    page.get_by_label("Data (JSON)").fill('{"quote": "it\'s"}')
    page.get_by_role("button", name="Copy the line that publishes").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    line = page.evaluate("navigator.clipboard.readText()")
    assert line == page.locator("#curl-publish").inner_text()
    subprocess.run(["sh", "-c", line], check=True, capture_output=True, timeout=15)
    row = event_row(page, "from.curl")
    expect(row.locator(".data")).to_have_text('{"quote":"it\'s"}')
    expect(row.locator(".type")).to_have_text("it's me")
    assert page.locator("#curl-read").inner_text() == f"curl -N '{served.url}/events?topic=*'"


def test_nothing_is_wider_than_the_screen(served: ServeProcess, open_page: OpenPage) -> None:
    page = live(open_page(served.url))
    topic = "a-very-long-topic." * 20
    publish(served, topic, {"unbroken": "x" * 400})
    expect(page.locator("#events").get_by_text(topic, exact=True).first).to_be_attached()
    page.get_by_role("button", name="Pause").click()
    page.get_by_label("Data (JSON)").fill('"' + "y" * 300 + '"')
    for width in (320, 360, 620, 900, 1180, 1920):
        page.set_viewport_size({"width": width, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.get_by_role("region", name="Latest events")
        assert box.evaluate("element => element.scrollWidth <= element.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(
    served: ServeProcess, open_page: OpenPage, scheme: str
) -> None:
    page = live(open_page(served.url, color_scheme=scheme))
    expect(card(page, "CPU").locator(".current")).to_have_text(re.compile("%"))
    page.get_by_label("Data (JSON)").fill("{")
    page.get_by_role("button", name="Publish", exact=True).click()
    results = page.evaluate(CONTRASTS)
    assert len(results) > 30
    assert [result for result in results if result["ratio"] < 4.5] == []
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    [red, *_] = map(int, re.findall(r"\d+", brightness))
    assert (red > 128) == (scheme == "light")


CONTRASTS = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = channels(color).slice(0, 3).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if ((channels(color)[3] ?? 1) > 0.99) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const results = [];
  for (const element of document.querySelectorAll("body *:not(script, template, noscript)")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const pair = [element instanceof SVGElement ? style.fill : style.color, background(element)];
    if (element.matches(".readout-text")) continue;
    const [low, high] = pair.map(light).sort((one, other) => one - other);
    const text = element.textContent.trim().slice(0, 30);
    results.push({ ratio: (high + 0.05) / (low + 0.05), text, pair });
  }
  return results;
}"""


def test_every_control_has_a_name_and_can_be_reached(
    served: ServeProcess, open_page: OpenPage
) -> None:
    page = live(open_page(served.url))
    controls = page.locator("button:visible, input:visible, textarea:visible")
    for control in controls.all():
        expect(control).to_have_accessible_name(re.compile(r"\S"))
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"show-host", "filter", "pause", "topic", "type", "data"} <= reached
    for chart in page.get_by_role("img").all():
        expect(chart).to_have_accessible_name(re.compile("in the last two minutes"))


def test_it_works_below_another_path(open_page: OpenPage) -> None:
    hub = open_hub()
    with serving(hub, Starlette(routes=[Mount("/tools/live", hub)])) as url:
        page = live(open_page(f"{url}/tools/live"))
        page.get_by_role("button", name="Publish", exact=True).click()
        expect(event_row(page, "demo.hello")).to_be_visible()
        assert f"{url}/tools/live/events?topic=*" in page.locator("#curl-read").inner_text()
