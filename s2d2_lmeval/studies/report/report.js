"use strict";
// One section per model and task. Its data, by the number of the section, lie in the element #data.
const groups = JSON.parse(document.getElementById("data").textContent);
const tip = document.getElementById("tip");

const make = (name, attributes = {}, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const hue = (row) => `--hue: ${row.hue}; --full: ${row.decoder === "ar" ? "0%" : "68%"}`;
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const known = (value) => typeof value === "number" && Number.isFinite(value);

function describe(row) {
  const interval = known(row.low) ? ` (${percent(row.low)} – ${percent(row.high)})` : "";
  const times = row.timings ? ` (${row.timings.map((one) => one.toFixed(1)).join(" – ")})` : "";
  const speeds = `${row.parallel.toFixed(2)} tokens/forward, ${row.speed.toFixed(1)} tokens/s${times}`;
  return `${row.name}\n${percent(row.accuracy)}${interval}\n${speeds}`;
}

function showTip(event, text) {
  const at = event.type === "focus" ? event.target.getBoundingClientRect() : { right: event.clientX, top: event.clientY };
  tip.textContent = text;
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(at.right + 12, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, at.top - tip.offsetHeight - 8)}px`;
}

// About five round numbers from low to high.
function ticks(low, high) {
  const raw = (high - low) / 5 || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((times) => times * unit).find((one) => one >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(Number(at.toPrecision(8)));
  return found;
}

// lines: [{row, points: [{x, y, low, high, left, right, row}], joined}], front: [{x, y}]
function draw(svg, lines, { xLabel, yLabel, front = [] }, section) {
  const width = Math.max(260, svg.parentElement.clientWidth - 34), height = Math.max(230, Math.min(330, width * 0.62));
  const [left, right, top, bottom] = [46, 14, 10, 42];
  const points = lines.flatMap((line) => line.points);
  const range = (values) => {
    const [low, high] = [Math.min(...values), Math.max(...values)], pad = (high - low) * 0.07 || Math.abs(high) * 0.05 || 1;
    return [low - pad, high + pad];
  };
  const [x0, x1] = range(points.flatMap((one) => [one.x, one.left, one.right].filter(known)));
  const [y0, y1] = range(points.flatMap((one) => [one.y, one.low, one.high].filter(known)));
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  for (const at of ticks(y0, y1)) {
    svg.append(make("line", { class: "grid", x1: left, x2: width - right, y1: y(at), y2: y(at) }));
    svg.append(make("text", { x: left - 6, y: y(at) + 4, "text-anchor": "end" }, at));
  }
  for (const at of ticks(x0, x1)) svg.append(make("text", { x: x(at), y: height - bottom + 18, "text-anchor": "middle" }, at));
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel));
  svg.append(make("text", { x: 0, y: 0, transform: `translate(11 ${(height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
  const path = (some) => some.map((one, place) => `${place ? "L" : "M"}${x(one.x)} ${y(one.y)}`).join("");
  if (front.length > 1) svg.append(make("path", { class: "front", d: path(front) }));
  for (const { points: some, joined } of lines) {
    if (joined) svg.append(make("path", { class: "run", d: path(some), style: hue(some[0].row) }));
    for (const one of some) {
      if (known(one.low)) svg.append(make("line", { class: "bar", x1: x(one.x), x2: x(one.x), y1: y(one.low), y2: y(one.high), style: hue(one.row) }));
      if (known(one.left)) svg.append(make("line", { class: "bar", x1: x(one.left), x2: x(one.right), y1: y(one.y), y2: y(one.y), style: hue(one.row) }));
      const dot = make("circle", { class: "point", r: 5.5, cx: x(one.x), cy: y(one.y), tabindex: 0, role: "img", style: hue(one.row), "data-row": one.row.number, "aria-label": describe(one.row) });
      for (const kind of ["mousemove", "focus"]) dot.addEventListener(kind, (event) => (showTip(event, describe(one.row)), light(section, one.row.number)));
      for (const kind of ["mouseleave", "blur"]) dot.addEventListener(kind, () => ((tip.hidden = true), light(section, null)));
      dot.addEventListener("click", () => section.querySelector(`tr[data-row="${one.row.number}"]`).scrollIntoView({ block: "center" }));
      svg.append(dot);
    }
  }
}

// Mark a configuration in the table and in every figure.
function light(section, number) {
  for (const node of section.querySelectorAll("[data-row]")) node.classList.toggle("lit", Number(node.dataset.row) === number && number !== null);
}

// Configurations that took the same forwards share their timings, and those whose intervals overlap are equally fast.
function frontOf(all, kind) {
  const span = (row) => kind === "speed" ? row.paces : [row[kind], row[kind]], rows = all.filter((row) => span(row).every(known));
  const beats = (one, other) => {
    const [low, high] = span(one), [least, most] = span(other);
    return (low > most && one.accuracy >= other.accuracy) || (high >= least && one.accuracy > other.accuracy);
  };
  const beaten = (row) => rows.some((one) => beats(one, row));
  return rows.filter((row) => !beaten(row)).sort((a, b) => a[kind] - b[kind]);
}

// Rows that differ in one numeric option alone, as lines over it.
function swept(rows, option) {
  const lines = new Map();
  for (const row of rows) {
    if (!known(row.options[option])) continue;
    const rest = JSON.stringify([row.decoder, Object.entries(row.options).filter(([name]) => name !== option)]);
    lines.set(rest, [...(lines.get(rest) ?? []), row]);
  }
  return [...lines.values()].filter((some) => some.length > 1).map((some) => some.sort((a, b) => a.options[option] - b.options[option]));
}

function drawAll(section, group) {
  const rows = group.rows.filter((row) => !section.querySelector(`tr[data-row="${row.number}"]`).hidden);
  for (const svg of section.querySelectorAll("svg[data-chart]")) {
    const [kind, option] = svg.dataset.chart.split(":");
    svg.replaceChildren();
    if (!rows.length) continue;
    const point = (row, at, value, whole) => ({ x: at, y: value, row, ...(whole && known(row.low) ? { low: 100 * row.low, high: 100 * row.high } : {}) });
    if (option === undefined) {
      const lines = rows.filter((row) => known(row[kind])).map((row) => ({ points: [{ ...point(row, row[kind], 100 * row.accuracy, true), ...(kind === "speed" && row.timings ? { left: row.timings[0], right: row.timings[1] } : {}) }] }));
      const front = frontOf(rows, kind).map((row) => ({ x: row[kind], y: 100 * row.accuracy }));
      draw(svg, lines, { xLabel: svg.dataset.x, yLabel: `${group.metric} (%)`, front }, section);
      continue;
    }
    const lines = swept(rows, option).map((some) => ({ joined: true, points: some.map((row) => kind === "accuracy" ? point(row, row.options[option], 100 * row.accuracy, true) : point(row, row.options[option], row.parallel, false)) }));
    svg.closest("figure").hidden = !lines.length;
    if (lines.length) draw(svg, lines, { xLabel: option, yLabel: kind === "accuracy" ? `${group.metric} (%)` : "tokens per forward" }, section);
  }
}

function sortable(table) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, down = head.getAttribute("aria-sort") !== "descending";
    for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (line) => line.cells[column].textContent.trim();
    const order = (a, b) => {
      const [one, two] = [value(a), value(b)], numbers = [parseFloat(one), parseFloat(two)];
      if (!one || !two) return (one ? 0 : 1) - (two ? 0 : 1);  // what is not known comes last, in both directions
      const by = numbers.some(Number.isNaN) ? one.localeCompare(two) : numbers[0] - numbers[1];
      return down ? -by : by;
    };
    body.append(...[...body.rows].sort(order));
  }));
}

// Documents on which two configurations differ, with what each wrote.
function differences(section, group) {
  const [first, second] = section.querySelectorAll("select[data-side]"), body = section.querySelector("tbody[data-documents]");
  if (!first) return;
  const cell = (text, name) => Object.assign(document.createElement("td"), { textContent: text, className: name ?? "" });
  const show = () => {
    const sides = [Number(first.value), Number(second.value)];
    const found = group.documents.filter((one) => sides.every((side) => side in one.scores) && one.scores[sides[0]] !== one.scores[sides[1]]);
    body.replaceChildren(...found.map((one) => {
      const line = document.createElement("tr");
      line.append(cell(one.document));
      for (const side of sides) line.append(cell(one.scores[side].toFixed(2)), cell(group.texts[one.texts[side]] ?? "", "text"));
      return line;
    }));
    section.querySelector("[data-count]").textContent = `${found.length} of ${group.documents.length} documents differ`;
  };
  first.addEventListener("change", show);
  second.addEventListener("change", show);
  show();
}

// The tokens of one answer, each as soon as the step that decided it; the slider says how many steps are over.
function decodingOrder(section, group) {
  const slider = section.querySelector("input[data-steps]");
  if (!slider) return;
  const last = Math.max(...group.order.rows.flatMap((row) => row.places.map(([step]) => step)));
  for (const sheet of section.querySelectorAll("[data-order]")) {
    sheet.querySelector("p").append(...group.order.rows[Number(sheet.dataset.order)].places.map(([step, mark, text]) => {
      const token = Object.assign(document.createElement("span"), { textContent: text, title: `step ${step}: ${group.order.marks[mark]}` });
      token.dataset.step = step;
      token.style.setProperty("--at", step / last);
      return token;
    }));
  }
  const show = () => {
    section.querySelector("output").textContent = `${slider.value} of ${last}`;
    for (const token of section.querySelectorAll("[data-step]")) token.classList.toggle("open", Number(token.dataset.step) > Number(slider.value));
  };
  slider.max = slider.value = last;
  slider.addEventListener("input", show);
  show();
}

document.querySelectorAll("section[data-group]").forEach((section) => {
  const group = groups[Number(section.dataset.group)], lines = [...section.querySelectorAll("tr[data-row]")];
  section.querySelectorAll("table[data-sortable]").forEach(sortable);
  const again = () => drawAll(section, group);
  section.querySelector("input[type=search]").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const line of lines) {
      const row = group.rows[Number(line.dataset.row)], said = `${row.name} ${row.args}`.toLowerCase();
      line.hidden = !words.every((word) => said.includes(word));
    }
    again();
  });
  for (const line of lines) {
    const number = Number(line.dataset.row);
    line.addEventListener("mouseenter", () => light(section, number));
    line.addEventListener("mouseleave", () => light(section, null));
    line.querySelector("button").addEventListener("click", async (event) => {
      const said = event.target.textContent;
      try { await navigator.clipboard.writeText(group.rows[number].args); event.target.textContent = "copied"; }
      catch { prompt("--model_args", group.rows[number].args); }  // a file opened from disk may not reach the clipboard
      setTimeout(() => (event.target.textContent = said), 1500);
    });
  }
  differences(section, group);
  decodingOrder(section, group);
  again();
  addEventListener("resize", again);
});
