// An EventSource that does not give up.
//
// A browser's EventSource reconnects by itself after a cut, but closes for good on an answer that
// is not a stream (a proxy's 502 while the server restarts), and does not notice a connection
// that died in silence (a laptop that slept). This one is opened anew in both cases, from the last
// id that was seen.

const FIRST_WAIT = 1000;
const LONGEST_WAIT = 15000;

/**
 * Fires "state" when `state` changes, "message" with each event's MessageEvent, and each of
 * `controls` with the MessageEvent of that control frame.
 */
export class LiveSource extends EventTarget {
  /** "connecting", "live", "reconnecting" or "offline" (the browser says there is no network). */
  state = "connecting";
  /** When `state` began, of performance.now(). */
  since = performance.now();
  /** After how long without any event the connection is taken for dead, in milliseconds. */
  longestSilence = 90000;

  #url;
  #controls;
  #source = null;
  #lastId;
  #lastArrival = 0;
  #timer = 0;
  #failures = 0;

  /**
   * @param {URL} url of the stream
   * @param {string} lastId what to begin after
   * @param {string[]} controls names of the control frames to fire
   */
  constructor(url, lastId, controls) {
    super();
    this.#url = url;
    this.#lastId = lastId;
    this.#controls = controls;
    setInterval(() => this.#check(), 1000);
    addEventListener("online", () => this.#open());
    addEventListener("offline", () => this.#setState("offline"));
    addEventListener("pageshow", (event) => event.persisted && this.#open());
    this.#open();
  }

  #open() {
    this.#close();
    const url = new URL(this.#url);
    if (this.#lastId) url.searchParams.set("last_event_id", this.#lastId);
    const source = new EventSource(url);
    this.#source = source;
    this.#lastArrival = performance.now();
    source.onopen = () => {
      this.#failures = 0;
      this.#lastArrival = performance.now();
      this.#setState("live");
    };
    source.onmessage = (message) => this.#arrived(message, "message");
    for (const name of this.#controls) {
      source.addEventListener(name, (message) => this.#arrived(message, name));
    }
    source.onerror = () => {
      this.#setState(navigator.onLine ? "reconnecting" : "offline");
      if (source.readyState === EventSource.CLOSED) this.#openLater();
    };
  }

  #openLater() {
    this.#close();
    const wait = Math.min(FIRST_WAIT * 2 ** this.#failures, LONGEST_WAIT);
    this.#failures += 1;
    this.#timer = setTimeout(() => this.#open(), wait * (0.5 + Math.random() / 2));
  }

  #close() {
    clearTimeout(this.#timer);
    this.#source?.close();
    this.#source = null;
  }

  #check() {
    // Of a connection that is being made, too: a server that is stopped accepts and says nothing.
    if (this.#source && performance.now() - this.#lastArrival > this.longestSilence) {
      this.#setState("reconnecting");
      this.#open();
    }
  }

  #arrived(message, name) {
    this.#lastArrival = performance.now();
    if (message.lastEventId) this.#lastId = message.lastEventId;
    this.#setState("live"); // whatever the browser says of its network: this machine needs none
    this.dispatchEvent(new MessageEvent(name, { data: message.data }));
  }

  #setState(state) {
    if (this.state === state) return;
    this.state = state;
    this.since = performance.now();
    this.dispatchEvent(new Event("state"));
  }
}
