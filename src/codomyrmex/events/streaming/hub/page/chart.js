// A line chart of the last minutes, drawn as SVG. Colours and sizes of text come from the page's
// style: series are `.series-0`, `.series-1`.

const SVG = "http://www.w3.org/2000/svg";
const TOP = 8;
const BOTTOM = 18;
const RIGHT = 4; // for the dot at the end of a line
const LONGEST_GAP = 3.5; // seconds between two values that are still joined by a line

const element = (name, attributes = {}, text = "") => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
};

export class LineChart {
  #svg;
  #seconds;
  #format;
  #ceiling;
  #points = []; // { time, values }, in order of time
  #width = 0;
  #height = 0;
  #now = 0;
  #pointer = null; // where the pointer is, in pixels from the left
  #id;

  /**
   * @param {SVGSVGElement} svg is filled
   * @param {object} options
   * @param {number} options.seconds how much of the past is shown
   * @param {(value: number) => string} options.format of a value
   * @param {(largest: number) => number} options.ceiling upper end of the scale
   */
  constructor(svg, { seconds, format, ceiling }) {
    this.#svg = svg;
    this.#seconds = seconds;
    this.#format = format;
    this.#ceiling = ceiling;
    this.#id = `fill-${LineChart.count++}`;
    new ResizeObserver(([entry]) => {
      this.#width = Math.round(entry.contentRect.width);
      this.#height = Math.round(entry.contentRect.height);
      this.draw();
    }).observe(svg);
    svg.addEventListener("pointermove", (event) => {
      this.#pointer = event.offsetX;
      this.draw();
    });
    svg.addEventListener("pointerleave", () => {
      this.#pointer = null;
      this.draw();
    });
  }

  static count = 0;

  /** The values of the shown time of one series. */
  values(series) {
    return this.#points.map((point) => point.values[series]);
  }

  /** Add values of one moment (in seconds); a moment that is there already is not added again. */
  add(time, values) {
    const points = this.#points;
    let at = points.length;
    while (at > 0 && points[at - 1].time > time) at -= 1;
    if (at > 0 && points[at - 1].time === time) return;
    points.splice(at, 0, { time, values });
  }

  /** Let the right edge be `now` (in seconds), and forget what has left on the left. */
  advance(now) {
    this.#now = now;
    const from = now - this.#seconds;
    let gone = 0;
    while (gone < this.#points.length && this.#points[gone].time < from) gone += 1;
    this.#points.splice(0, gone);
    this.draw();
  }

  draw() {
    const width = this.#width;
    const height = this.#height;
    if (!width || !height) return;
    const svg = this.#svg;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const points = this.#points;
    const largest = Math.max(0, ...points.flatMap((point) => point.values));
    const ceiling = this.#ceiling(largest);
    const floor = height - BOTTOM;
    const x = (time) => (width - RIGHT) * (1 - (this.#now - time) / this.#seconds);
    const y = (value) => floor - (Math.min(value, ceiling) / ceiling) * (floor - TOP);

    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const at = Math.round(y(ceiling * share)) + 0.5;
      parts.push(element("line", { class: share ? "grid" : "axis", x1: 0, x2: width, y1: at, y2: at }));
    }
    const series = points.length ? points[0].values.length : 0;
    for (let index = series - 1; index >= 0; index -= 1) {
      for (const run of this.#runs()) {
        const line = run
          .map((point, step) => `${step ? "L" : "M"}${x(point.time).toFixed(1)} ${y(point.values[index]).toFixed(1)}`)
          .join("");
        const from = x(run[0].time).toFixed(1);
        const to = x(run[run.length - 1].time).toFixed(1);
        parts.push(element("path", { class: `area series-${index}`, d: `${line}L${to} ${floor}L${from} ${floor}Z` }));
        parts.push(element("path", { class: `line series-${index}`, d: line }));
      }
      const last = points[points.length - 1];
      if (this.#now - last.time < LONGEST_GAP) {
        parts.push(element("circle", { class: `dot series-${index}`, cx: x(last.time), cy: y(last.values[index]), r: 2.5 }));
      }
    }
    parts.push(element("text", { class: "tick", x: 2, y: y(ceiling) + 11 }, this.#format(ceiling).replace(".0 ", " ")));
    for (const [share, anchor, label] of [[0, "start", "2 min ago"], [0.5, "middle", "1 min"], [1, "end", "now"]]) {
      parts.push(element("text", { class: "tick", x: width * share, y: height - 4, "text-anchor": anchor }, label));
    }
    if (this.#pointer !== null && points.length) parts.push(...this.#readout(x, y, floor));
    svg.replaceChildren(...parts);
  }

  /** The points, cut where there were none for a while. */
  #runs() {
    const runs = [];
    let previous = -Infinity;
    for (const point of this.#points) {
      if (point.time - previous > LONGEST_GAP) runs.push([]);
      runs[runs.length - 1].push(point);
      previous = point.time;
    }
    return runs;
  }

  /** What the values were where the pointer is. */
  #readout(x, y, floor) {
    const nearest = this.#points.reduce((best, point) =>
      Math.abs(x(point.time) - this.#pointer) < Math.abs(x(best.time) - this.#pointer) ? point : best);
    const at = x(nearest.time);
    const ago = Math.round(this.#now - nearest.time);
    const text = `${nearest.values.map(this.#format).join(" · ")}${ago > 1 ? `, ${ago} s ago` : ""}`;
    const size = text.length * 6.4 + 12;
    const left = Math.min(Math.max(at - size / 2, 0), this.#width - size);
    return [
      element("line", { class: "cursor", x1: at, x2: at, y1: TOP, y2: floor }),
      ...nearest.values.map((value, index) =>
        element("circle", { class: `dot series-${index}`, cx: at, cy: y(value), r: 3 })),
      element("rect", { class: "readout", x: left, y: 0, width: size, height: 18, rx: 4 }),
      element("text", { class: "readout-text", x: left + size / 2, y: 13, "text-anchor": "middle" }, text),
    ];
  }
}
