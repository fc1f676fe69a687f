"use strict";
// Sorts and filters tables, says exact figures where the pointer is, opens records, and switches
// the colours. Text from logs goes in as text, never as markup.
const { shapes, packed } = JSON.parse(document.getElementById("data").textContent);
const data = unpack(packed);
const all = (selector, from = document) => [...from.querySelectorAll(selector)];

// Objects as [number of their shape, ...values], lists as [-1, ...items].
function unpack(value) {
  if (!Array.isArray(value)) return value;
  const [shape, ...values] = value;
  if (shape < 0) return values.map(unpack);
  return Object.fromEntries(shapes[shape].map((name, i) => [name, unpack(values[i])]));
}

// Colours: as the system has it, light, dark.
const scheme = document.getElementById("scheme");
const schemes = { Auto: "light dark", Light: "light", Dark: "dark" };
scheme.addEventListener("click", () => {
  const names = Object.keys(schemes);
  const next = names[(names.indexOf(scheme.textContent) + 1) % names.length];
  scheme.textContent = next;
  document.documentElement.style.colorScheme = next === "Auto" ? "" : schemes[next];
});

// Cases.
const us = (value) => (value < 100 ? value.toFixed(2) : value.toFixed(0)) + " µs";
const times = (value) => value.toFixed(2) + "×";
const caseName = ({ op, rows, hidden, dtype, variant }) =>
  `${op} ${rows}x${hidden} ${dtype}${variant ? " " + variant : ""}`;
const setting = (r) =>
  [r.schedule || "", ...Object.entries(r.knobs || {}).map(([k, v]) => `${k}=${v}`)].join(" ");
const numberOf = (link) => {
  const match = /^#case-(\d+)$/.exec(link || "");
  return match && data.cases[match[1]] ? Number(match[1]) : -1;
};

function summary(number) {
  const one = data.cases[number];
  return (one.record ? reported(one) : compared(one)).join("\n");
}
function compared(c) {
  const lines = [caseName(c.case)];
  lines.push(`${c.verdict}: ${c.ratio.toFixed(3)}× (${c.low.toFixed(3)} to ${c.high.toFixed(3)})`);
  for (const side of ["a", "b"])
    lines.push(`${side.toUpperCase()} ${us(c[side].us)}  ${setting(c[side])}`);
  lines.push(`compared ${c.method}` + (c.drift ? `, drift ${c.drift.toFixed(3)}` : ""));
  if (c.reason) lines.push(c.reason);
  return lines;
}
function reported({ record: r, figures: f }) {
  const lines = [caseName(r.case)];
  lines.push(Object.entries(r.timings).map(([k, t]) => `${k} ${us(t.median_us)}`).join(", "));
  const ratios = [];
  if (f.speedup) ratios.push(times(f.speedup) + " over eager");
  if (f.over_compile) ratios.push(times(f.over_compile) + " over torch.compile");
  if (f.over_default) ratios.push(times(f.over_default) + " over default knobs");
  if (ratios.length) lines.push(ratios.join(", "));
  const rates = [];
  if (f.gbps) rates.push(f.gbps.toFixed(1) + " GB/s");
  if (f.of_copy) rates.push((100 * f.of_copy).toFixed(0) + "% of a copy");
  if (f.gflops) rates.push(f.gflops.toFixed(1) + " GFLOP/s");
  if (rates.length) lines.push(rates.join(", "));
  lines.push(setting(r));
  if (f.trials) lines.push(`${f.trials} trials` + (f.found ? `, best at ${f.found}` : ""));
  if (f.disturbed) lines.push("disturbed: " + f.disturbed);
  if (f.stale) lines.push("stale: the schedule has changed since");
  return lines;
}

// Exact figures where the pointer is; thin lines count from a few pixels away.
const tip = document.getElementById("tip");
const near = [0, 3, -3, 6, -6];
function markAt(x, y) {
  for (const dy of near)
    for (const dx of near) {
      const link = document.elementFromPoint(x + dx, y + dy)?.closest("a[href^='#case-']");
      if (link) return link;
    }
  return null;
}
function tell(link, x, y) {
  const number = link ? numberOf(link.getAttribute("href")) : -1;
  tip.hidden = number < 0 || link.closest("table.cases") !== null;
  if (tip.hidden) return;
  tip.textContent = summary(number);
  const box = tip.getBoundingClientRect();
  const left = Math.min(x + 14, innerWidth - box.width - 8);
  const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18;
  tip.style.transform = `translate(${Math.max(8, left)}px, ${Math.max(8, top)}px)`;
}
document.addEventListener("pointermove", (event) => {
  if (event.pointerType === "touch") return;
  const inside = event.target.closest?.(".plot, .heat, .ratios");
  tell(inside && markAt(event.clientX, event.clientY), event.clientX, event.clientY);
});
document.addEventListener("focusin", (event) => {
  const box = event.target.getBoundingClientRect();
  tell(event.target.closest(".heat a"), box.left, box.bottom - 10);
});
document.addEventListener("scroll", () => (tip.hidden = true), { passive: true });
document.addEventListener("click", (event) => {
  const link = event.target.closest?.(".plot") && markAt(event.clientX, event.clientY);
  if (link && !event.target.closest("a")) location.hash = link.getAttribute("href");
});

// Records.
function element(name, text, className) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  if (className) made.className = className;
  return made;
}
function whole(number) {
  const { device, record } = data.cases[number];
  if (!record) return data.cases[number];
  const versions = data.versions[record.versions];
  return { ...record, device: data.devices[device], ...(versions && { versions }) };
}
function close(row) {
  row.classList.remove("open");
  if (row.nextElementSibling?.className === "record") row.nextElementSibling.remove();
}
function open(row, number) {
  const below = element("tr", "", "record");
  const cell = below.appendChild(element("td"));
  cell.colSpan = row.cells.length;
  cell.append(...details(number));
  row.classList.add("open");
  row.after(below);
}
function details(number) {
  const text = element("p", summary(number).split("\n").slice(1).join("\n"));
  text.style.whiteSpace = "pre-line";
  const fields = Object.entries(whole(number)).map(
    ([name, value]) => `${JSON.stringify(name)}: ${JSON.stringify(value)}`);
  const made = [text, element("pre", `{${fields.join(",\n ")}}`)];
  if (data.cases[number].record) {
    const c = data.cases[number].record.case;
    const why = `lntune why ${c.op} --hidden ${c.hidden} --dtype ${c.dtype} --rows ${c.rows}`;
    const again = element("p", "Which record serves, and why: ");
    again.append(element("code", why));
    made.splice(1, 0, again);
  }
  return made;
}
function toggle(row, number, opened = !row.classList.contains("open")) {
  close(row);
  if (opened) open(row, number);
}
function followHash() {
  const number = numberOf(location.hash);
  const row = number < 0 ? null : document.getElementById("case-" + number);
  if (!row) return;
  if (row.hidden) show(row.closest("table"), true);
  toggle(row, number, true);
  row.scrollIntoView({ block: "start" });
}
addEventListener("hashchange", followHash);
document.addEventListener("click", (event) => {
  const row = event.target.closest?.("table.cases tbody tr:not(.record)");
  if (!row || String(getSelection())) return;
  event.preventDefault();
  const number = numberOf("#" + row.id);
  if (number >= 0) toggle(row, number);
});

// Tables: a heading sorts, the controls above filter.
function key(row, column) {
  const text = row.cells[column].textContent.trim();
  const value = parseFloat(text);
  return /^[\d.]+\s*[×%]?$/.test(text) ? value : text === "-" || text === "–" ? null : text;
}
function sort(table, column) {
  const heading = table.tHead.rows[0].cells[column];
  const numeric = heading.classList.contains("n");
  const was = heading.getAttribute("aria-sort");
  const up = was ? was === "descending" : !numeric;
  all("[aria-sort]", table).forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const body = table.tBodies[0];
  const rows = all("tr:not(.record)", body);
  rows.forEach(close);
  const keyed = rows.map((row) => [key(row, column), row]);
  keyed.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null);
    const order = a < b ? -1 : a > b ? 1 : 0;
    return up ? order : -order;
  });
  body.append(...keyed.map(([, row]) => row));
}
function show(table, everything = false) {
  const filters = document.querySelector(`.filters[data-table="${table.id}"]`);
  if (!filters) return;
  const controls = all("select, input", filters);
  if (everything) controls.forEach((control) => (control.value = ""));
  const wanted = controls.map((c) => [c.dataset.column, c.value.trim().toLowerCase()]);
  let count = 0;
  for (const row of all("tbody tr:not(.record)", table)) {
    const hidden = !wanted.every(([column, value]) => {
      if (!value) return true;
      if (column) return row.cells[column].textContent.trim().toLowerCase() === value;
      const text = `${row.textContent} ${summary(numberOf("#" + row.id))}`.toLowerCase();
      return value.split(/[\s,]+/).every((word) => text.includes(word));
    });
    if (hidden) close(row);
    row.hidden = hidden;
    count += !hidden;
  }
  filters.querySelector("output").textContent = `${count} case${count === 1 ? "" : "s"}`;
}
all("table.cases").forEach((table) => {
  all("thead button", table).forEach((button) =>
    button.addEventListener("click", () => sort(table, button.parentElement.cellIndex)));
});
all(".filters").forEach((filters) => {
  const table = document.getElementById(filters.dataset.table);
  filters.addEventListener("input", () => show(table));
});

// A case followed through the charts.
all("select.follow").forEach((select) => {
  const article = select.closest("article");
  const fill = () => {
    const names = all("table.cases tbody a", article).map((link) => {
      const number = numberOf(link.getAttribute("href"));
      return new Option(caseName(data.cases[number].record.case), number);
    });
    select.append(...names);
  };
  select.addEventListener("focus", fill, { once: true }); // not before somebody asks
  select.addEventListener("input", () => {
    all("a.on", article).forEach((link) => link.classList.remove("on"));
    const output = select.closest(".pick").querySelector("output");
    output.textContent = "";
    if (!select.value) return;
    all(`.plot a[href="#case-${select.value}"], .heat a[href="#case-${select.value}"]`, article)
      .forEach((link) => {
        link.classList.add("on");
        if (link.closest(".plot")) link.parentElement.append(link); // above the others
      });
    const f = data.cases[select.value].figures;
    if (f.trials) output.textContent = `${f.trials} trials, the best at ${f.found}`;
  });
});
followHash();
