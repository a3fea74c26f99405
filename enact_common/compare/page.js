"use strict";

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 10, right: 10, bottom: 34, left: 52 };
// Dash patterns of a panel's first and second quantity.
const DASHES = ["", "6 4"];

function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

// Return about `count` round numbers from 0 to `most`.
function ticks(most, count) {
  const rough = most / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, i) => i * step);
}

function text(value) {
  if (value === 0) return "0";
  return Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

// A chart. It is redrawn for each width, to keep its text size, and for each choice of runs.
class Chart {
  constructor(place, chart, runs) {
    this.plot = place.querySelector(".plot");
    this.readout = place.querySelector(".readout");
    this.chart = chart;
    this.runs = runs;
    this.hidden = new Set();
    this.epoch = null;
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.show(null));
    this.plot.addEventListener("keydown", (event) => this.step(event));
    this.draw();
    new ResizeObserver(() => requestAnimationFrame(() => this.draw())).observe(this.plot);
  }

  get series() {
    return this.chart.series.filter((series) => !this.hidden.has(series.run));
  }

  draw() {
    const width = Math.max(this.plot.clientWidth, 200);
    const height = this.plot.clientHeight;
    const points = this.series.flatMap((series) => series.points);
    this.last = Math.max(1, ...points.map(([epoch]) => epoch));
    const most = Math.max(...points.map(([, value]) => value), 1e-12) * 1.05;
    const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    this.x = (epoch) => MARGIN.left + (inner.width * epoch) / this.last;
    this.y = (value) => MARGIN.top + inner.height * (1 - value / most);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    for (const value of ticks(most, 5)) {
      const y = this.y(value);
      element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }, svg);
      element("text", { x: MARGIN.left - 6, y: y + 4, "text-anchor": "end" }, svg).textContent = text(value);
    }
    const whole = ticks(this.last, Math.min(this.last, Math.floor(inner.width / 50))).filter(Number.isInteger);
    for (const epoch of whole) {
      const mark = element("text", { x: this.x(epoch), y: height - MARGIN.bottom + 16, "text-anchor": "middle" }, svg);
      mark.textContent = epoch;
    }
    element("text", { x: MARGIN.left + inner.width / 2, y: height - 3, "text-anchor": "middle" }, svg).textContent =
      "epochs done";
    for (const series of this.series) {
      const line = series.points.map(([epoch, value]) => `${this.x(epoch).toFixed(1)},${this.y(value).toFixed(1)}`);
      const stroke = `stroke: var(--run-${this.runs[series.run].colour})`;
      element("path", { d: `M${line.join("L")}`, style: stroke, "stroke-dasharray": DASHES[series.style] }, svg);
      if (series.points.length === 1) {
        const [[epoch, value]] = series.points;
        const fill = `fill: var(--run-${this.runs[series.run].colour})`;
        element("circle", { cx: this.x(epoch), cy: this.y(value), r: 3.5, style: fill }, svg);
      }
    }
    this.cursor = element("line", { class: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom }, svg);
    this.plot.replaceChildren(svg);
    this.show(this.epoch);
  }

  point(event) {
    const box = this.plot.getBoundingClientRect();
    const part = (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right);
    this.show(Math.round(Math.min(Math.max(part, 0), 1) * this.last));
  }

  step(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const start = this.epoch === null ? (by > 0 ? 0 : this.last + 1) : this.epoch;
    this.show(Math.min(Math.max(start + by, 1), this.last));
  }

  // Show the values after an epoch; null hides them.
  show(epoch) {
    this.epoch = epoch;
    this.cursor.style.display = epoch === null ? "none" : "";
    if (epoch === null) {
      this.readout.textContent = "";
      return;
    }
    for (const end of ["x1", "x2"]) this.cursor.setAttribute(end, this.x(epoch));
    const values = this.series.flatMap((series) => {
      const point = series.points.find(([at]) => at === epoch);
      return point ? [`${this.runs[series.run].name} ${series.kind} ${text(point[1])}`] : [];
    });
    this.readout.textContent = `epoch ${epoch}: ${values.join(", ") || "nothing logged"}`;
  }
}

function startCharts() {
  const { runs, charts } = JSON.parse(document.getElementById("curves").textContent);
  const places = document.querySelectorAll(".chart");
  const made = charts.map((chart, i) => new Chart(places[i], chart, runs));
  for (const box of document.querySelectorAll(".runs input")) {
    box.addEventListener("change", () => {
      for (const chart of made) {
        chart.hidden[box.checked ? "delete" : "add"](Number(box.value));
        chart.draw();
      }
    });
  }
}

// A click on a column head sorts the rows: numbers descending first, names ascending first, missing numbers last.
function startSorting(table) {
  const heads = [...table.querySelectorAll("thead th")];
  const body = table.tBodies[0];
  const key = (row, column) => {
    const words = row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    return words !== "" && Number.isFinite(Number(words)) ? Number(words) : words;
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sorted = head.getAttribute("aria-sort");
      const down = column > 0 ? sorted !== "descending" : sorted === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const order = (one, two) => {
        const [a, b] = [key(one, column), key(two, column)];
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
        return (typeof a === "number" ? a - b : a.localeCompare(b)) * (down ? -1 : 1);
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}

function startEnlarging() {
  const dialog = document.getElementById("large");
  for (const button of document.querySelectorAll(".scene button")) {
    button.addEventListener("click", () => {
      const image = button.querySelector("img");
      dialog.querySelector("img").src = image.src;
      dialog.querySelector("img").alt = image.alt;
      dialog.querySelector("p").textContent = image.alt;
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}

startCharts();
document.querySelectorAll("table.sortable").forEach(startSorting);
startEnlarging();
