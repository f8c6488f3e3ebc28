// The hub's live page: charts of this machine, the latest events, a form to publish one.

import { LineChart } from "./chart.js";
import { LiveSource } from "./source.js";

const SECONDS = 120;
const MOST_EVENTS = 100;
const base = new URL("./", location.href);
const $ = (id) => document.getElementById(id);

/** A new element with text and classes. */
function make(name, text = "", className = "") {
  return Object.assign(document.createElement(name), { textContent: text, className });
}

// ---- numbers -------------------------------------------------------------------------------

const UNITS = ["B", "kB", "MB", "GB", "TB", "PB"];

function bytes(value) {
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value.toFixed(unit && value < 99.5 ? 1 : 0)} ${UNITS[unit]}`;
}

const perSecond = (value) => `${bytes(value)}/s`;
const percent = (value) => `${value.toFixed(value < 99.95 ? 1 : 0)} %`;

/** The next of 1, 2, 5, 10, 20, 50… times `least` at or above a value. */
function roundUp(value, least) {
  let ceiling = least;
  for (let step = 0; ceiling < value; step += 1) ceiling *= step % 3 === 1 ? 2.5 : 2;
  return ceiling;
}

// ---- charts --------------------------------------------------------------------------------

// `fields` are those that have to be numbers: anyone may publish to these topics, anything.
const CARDS = {
  "host.cpu": {
    title: "CPU",
    fields: ["percent", "cores"],
    series: [{ name: "busy", of: (data) => data.percent }],
    format: percent,
    ceiling: (largest) => Math.min(roundUp(largest * 1.1, 10), 100),
    detail: (data) =>
      `${data.cores} ${data.cores === 1 ? "core" : "cores"}${Number.isFinite(data.load) ? `, load ${data.load.toFixed(2)}` : ""}`,
  },
  "host.memory": {
    title: "Memory",
    fields: ["percent", "used", "total"],
    series: [{ name: "used", of: (data) => data.percent }],
    format: percent,
    ceiling: () => 100,
    detail: (data) => `${bytes(data.used)} of ${bytes(data.total)}`,
  },
  "host.disk": {
    title: "Disk",
    fields: ["read", "written", "percent", "total"],
    series: [
      { name: "read", of: (data) => data.read },
      { name: "written", of: (data) => data.written },
    ],
    format: perSecond,
    ceiling: (largest) => roundUp(largest * 1.1, 10000),
    detail: (data) => `${percent(data.percent)} of ${bytes(data.total)} full`,
  },
  "host.network": {
    title: "Network",
    fields: ["received", "sent"],
    series: [
      { name: "received", of: (data) => data.received },
      { name: "sent", of: (data) => data.sent },
    ],
    format: perSecond,
    ceiling: (largest) => roundUp(largest * 1.1, 10000),
    detail: () => "all interfaces",
  },
};

class Card {
  #card;
  #chart;
  #root;
  #places;
  #latest = null;

  constructor(card) {
    this.#card = card;
    const root = $("chart-card").content.firstElementChild.cloneNode(true);
    root.querySelector("h2").textContent = card.title;
    root.querySelector(".detail").textContent = "waiting for data";
    $("charts").append(root);
    this.#root = root;
    this.#places = card.series.map(({ name }, index) => {
      const entry = Object.assign(document.createElement("div"), { className: `value series-${index}` });
      entry.append(make("dt", name), make("dd", "–", "current"), make("dd", "", "range muted"));
      root.querySelector(".now").append(entry);
      return { current: entry.querySelector(".current"), range: entry.querySelector(".range") };
    });
    this.#chart = new LineChart(root.querySelector("svg"), { seconds: SECONDS, ...card });
    this.#describe("no data yet");
  }

  /** Take a measurement, if it is one. */
  add(time, data) {
    if (!this.#card.fields.every((field) => Number.isFinite(data?.[field]))) return;
    this.#chart.add(time, this.#card.series.map((series) => series.of(data)));
    if (!this.#latest || time >= this.#latest.time) this.#latest = { time, data };
  }

  update(now) {
    this.#chart.advance(now);
    if (!this.#latest) return;
    const { series, format, detail } = this.#card;
    const { time, data } = this.#latest;
    this.#root.classList.toggle("stale", now - time > 4);
    this.#root.querySelector(".detail").textContent = detail(data);
    const told = series.map(({ name, of }, index) => {
      const [number, unit] = format(of(data)).split(" ");
      this.#places[index].current.replaceChildren(number, make("small", ` ${unit}`));
      const values = this.#chart.values(index);
      if (values.length) {
        const [least, most] = [Math.min(...values), Math.max(...values)].map(format);
        this.#places[index].range.replaceChildren(make("span", `min ${least}`), make("span", `max ${most}`));
        return `${name} ${number} ${unit}, min ${least}, max ${most}`;
      }
      return `${name} ${number} ${unit}`;
    });
    this.#describe(told.join("; "));
  }

  #describe(values) {
    const text = `${this.#card.title} in the last two minutes: ${values}`;
    this.#root.querySelector("svg").setAttribute("aria-label", text);
  }
}

const cards = new Map(Object.entries(CARDS).map(([topic, card]) => [topic, new Card(card)]));

// The server's clock says where on the time axis a value is; it is carried on by this one's
// seconds, so that a line that gets no more values still moves to the left.
let newest = { time: 0, at: 0 };

function drawCharts() {
  if (!newest.time) return;
  const now = newest.time + (performance.now() - newest.at) / 1000;
  for (const card of cards.values()) card.update(now);
}

// ---- events --------------------------------------------------------------------------------

// Kept apart, so that the machine's four events a second do not push out everything else.
const kept = { host: [], other: [] };
let pausedAt = null; // number of events that had arrived when the list was paused
let arrived = 0;
let redraw = 0;

function keep(row) {
  row.order = arrived++;
  const list = row.topic.startsWith("host.") ? kept.host : kept.other;
  list.push(row);
  if (list.length > MOST_EVENTS) list.shift();
  redraw ||= requestAnimationFrame(drawEvents);
}

function drawEvents() {
  redraw = 0;
  $("pause").textContent = pausedAt === null ? "Pause" : `Resume (${arrived - pausedAt} new)`;
  if (pausedAt !== null) return;
  const wanted = $("filter").value.trim().toLowerCase();
  const rows = [...kept.other, ...($("show-host").checked ? kept.host : [])]
    .filter((row) => !wanted || row.text.includes(wanted))
    .sort((one, other) => other.order - one.order)
    .slice(0, MOST_EVENTS);
  $("empty").hidden = rows.length > 0;
  // Each row is made once and moved to where it belongs: what a reader has selected stays.
  const body = $("events");
  let place = body.firstElementChild;
  for (const { element } of rows) {
    if (element === place) place = place.nextElementSibling;
    else body.insertBefore(element, place);
  }
  while (place) {
    const next = place.nextElementSibling;
    place.remove();
    place = next;
  }
}

const clock = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

/** A text that wraps after its commas rather than in the middle of a number. */
function breakable(text) {
  return text.split(/(?<=,)/).flatMap((part) => [part, make("wbr")]);
}

/** One event of the table. What it looks like is made when it is first shown, if it ever is. */
class EventRow {
  #event;
  #data;
  #text;
  #element;

  constructor(event) {
    this.#event = event;
    this.topic = event.metadata?.topic ?? "";
  }

  get data() {
    return (this.#data ??= JSON.stringify(this.#event.data));
  }

  get text() {
    return (this.#text ??= `${this.topic} ${this.#event.type} ${this.data}`.toLowerCase());
  }

  get element() {
    return (this.#element ??= this.#make());
  }

  #make() {
    const { id, type, timestamp } = this.#event;
    const time = make("time", clock.format(new Date(timestamp)));
    time.dateTime = timestamp;
    const data = this.data.length > 500 ? `${this.data.slice(0, 500)}…` : this.data;
    const element = make("tr");
    for (const [name, content] of Object.entries({ time, topic: this.topic, type, data })) {
      const cell = make("td", "", name);
      if (name === "data") cell.append(...breakable(content));
      else cell.append(content);
      element.append(cell);
    }
    element.title = `${id}\n${timestamp}`;
    return element;
  }
}

/** Something to tell between the events. */
function noteRow(text) {
  const element = make("tr", "", "note");
  element.append(Object.assign(make("td", text), { colSpan: 4 }));
  return { topic: "", element, text: text.toLowerCase() };
}

$("filter").addEventListener("input", drawEvents);
$("show-host").addEventListener("change", drawEvents);
$("pause").addEventListener("click", () => {
  pausedAt = pausedAt === null ? arrived : null;
  $("pause").setAttribute("aria-pressed", String(pausedAt !== null));
  drawEvents();
});

// ---- the stream ----------------------------------------------------------------------------

const url = new URL("events?topic=*&format=event", base);
const source = new LiveSource(url, "earliest", ["stream.connect", "stream.gap", "stream.lost"]);
const seen = new Set(); // ids: a replay may repeat what is here already
let toldLive = false;
const recent = []; // arrival times of live events

source.addEventListener("message", ({ data }) => {
  const event = JSON.parse(data);
  if (seen.has(event.id)) return;
  seen.add(event.id);
  if (seen.size > 20 * MOST_EVENTS) seen.delete(seen.values().next().value);
  if (toldLive) recent.push(performance.now());
  const card = cards.get(event.metadata?.topic);
  if (card && event.type === "measurement") {
    const time = Date.parse(event.timestamp) / 1000;
    card.add(time, event.data);
    // A restarted machine's clock may have gone back.
    if (time > newest.time || time < newest.time - SECONDS) newest = { time, at: performance.now() };
    source.longestSilence = 6000; // there is one every second
    drawSoon();
  }
  keep(new EventRow(event));
});

source.addEventListener("stream.gap", () => {
  // The first request asks for whatever there is: nothing of it can be missing.
  if (toldLive) keep(noteRow("The stream was interrupted here: some events may be missing."));
});
source.addEventListener("stream.lost", ({ data }) => {
  keep(noteRow(`This page was too slow: events were left out. ${data}`));
});

let drawing = 0;
const drawSoon = () => {
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    drawCharts();
  });
};

const STATES = { connecting: "connecting", live: "live", reconnecting: "reconnecting…", offline: "offline" };

function showState() {
  const seconds = Math.floor((performance.now() - source.since) / 1000);
  const waiting = source.state === "reconnecting" || source.state === "offline";
  $("status").dataset.state = source.state;
  if ($("status-text").textContent !== STATES[source.state]) $("status-text").textContent = STATES[source.state];
  $("status-since").textContent = waiting ? `(for ${seconds} s)` : "";
}

source.addEventListener("state", () => {
  if (source.state === "live") setTimeout(() => (toldLive = true), 1000);
  showState();
});
setInterval(() => {
  showState();
  const from = performance.now() - 5000;
  while (recent.length && recent[0] < from) recent.shift();
  $("rate").textContent = source.state === "live" ? `${(recent.length / 5).toFixed(1)} per second` : "";
  if (performance.now() - newest.at > 1500) drawCharts();
}, 1000);
showState();

// ---- publish -------------------------------------------------------------------------------

const form = $("publish");

function publishUrl() {
  const target = new URL(`events/${encodeURIComponent(form.elements.topic.value.trim())}`, base);
  if (form.elements.type.value.trim()) target.searchParams.set("type", form.elements.type.value.trim());
  return target;
}

function complain(field, reason) {
  const error = $(`${field}-error`);
  error.textContent = reason;
  error.hidden = !reason;
  $(field).setAttribute("aria-invalid", String(Boolean(reason)));
}

/** Say what is wrong with a field; "" when it is right. */
const CHECKS = {
  topic: (value) => {
    const topic = value.trim();
    if (!topic) return "A topic is needed, such as demo.hello.";
    if (topic === "." || topic === "..") return "A browser cannot send to this topic.";
    const tokens = topic.split(".");
    if (tokens.includes("*") || tokens.at(-1) === ">") return "This is a pattern; events go to one topic.";
    return "";
  },
  type: (value) => (value.trim().startsWith("stream.") ? "Types that begin with stream. are the hub's own." : ""),
  data: (value) => {
    if (!value.trim()) return "Data is needed: any JSON, or null.";
    try {
      JSON.parse(value);
      return "";
    } catch (error) {
      return `Not JSON: ${error.message}`;
    }
  },
};

const check = (field) => {
  const reason = CHECKS[field]($(field).value);
  complain(field, reason);
  return !reason;
};

form.addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  const wrong = Object.keys(CHECKS).filter((field) => !check(field));
  if (wrong.length) {
    say("", false);
    $(wrong[0]).focus();
    return;
  }
  try {
    const answer = await fetch(publishUrl(), {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: form.elements.data.value,
    });
    const told = await answer.json();
    if (answer.ok) say(`Published to ${told.topic}`, false);
    else say(`Refused: ${told.error}`, true);
  } catch {
    say("The hub cannot be reached. Try again when the page is live.", true);
  }
});

function say(text, bad) {
  const place = $("published");
  place.textContent = text;
  place.classList.toggle("bad", bad);
}

for (const field of Object.keys(CHECKS)) {
  $(field).addEventListener("input", () => {
    if ($(field).getAttribute("aria-invalid") === "true") check(field);
    say("", false);
    showCurl();
  });
}
$("data").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

// ---- curl ----------------------------------------------------------------------------------

const quote = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

function showCurl() {
  $("curl-read").textContent = `curl -N ${quote(new URL("events?topic=*", base))}`;
  $("curl-publish").textContent = `curl -d ${quote(form.elements.data.value.trim())} ${quote(publishUrl())}`;
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const code = $(button.dataset.copy);
    let done = "Copied";
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      // Without HTTPS a page may not write to the clipboard: the reader can, with one key.
      getSelection().selectAllChildren(code);
      done = "Selected";
    }
    button.textContent = done;
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
}
$("host").textContent = location.host;
showCurl();
