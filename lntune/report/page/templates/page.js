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
const figure = (value) => (value == null ? "unbounded" : value.toFixed(3));
function compared(c) {
  return [
    caseName(c.case),
    `${c.verdict}: ${figure(c.ratio)}× (${figure(c.low)} to ${figure(c.high)})`,
    ...["a", "b"].map((s) => `${s.toUpperCase()} ${us(c[s].us)}  ${setting(c[s])}`),
    `compared ${c.method}` + (c.drift ? `, drift ${figure(c.drift)}` : ""),
    c.reason,
  ].filter(Boolean);
}
const said = (...parts) => parts.filter(Boolean).join(", ");
function reported({ record: r, figures: f }) {
  return [
    caseName(r.case),
    Object.entries(r.timings).map(([k, t]) => `${k} ${us(t.median_us)}`).join(", "),
    said(
      f.speedup && times(f.speedup) + " over eager",
      f.over_compile && times(f.over_compile) + " over torch.compile",
      f.over_default && times(f.over_default) + " over default knobs"),
    said(
      f.gbps && f.gbps.toFixed(1) + " GB/s",
      f.of_copy && (100 * f.of_copy).toFixed(0) + "% of a copy",
      f.gflops && f.gflops.toFixed(1) + " GFLOP/s"),
    setting(r),
    said(f.trials && `${f.trials} trials`, f.found && `best at ${f.found}`),
    f.disturbed && "disturbed: " + f.disturbed,
    f.stale && "stale: the schedule has changed since",
  ].filter(Boolean);
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
  tip.hidden = number < 0;
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
function whole({ device, record }) {
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
  cell.append(element("p", summary(number).split("\n").slice(1).join("\n"), "lines"));
  const one = data.cases[number];
  if (one.record) {
    const { op, hidden, dtype, rows } = one.record.case;
    const why = `lntune why ${op} --hidden ${hidden} --dtype ${dtype} --rows ${rows}`;
    cell.appendChild(element("p", "Which record serves, and why: ")).append(element("code", why));
  }
  const fields = Object.entries(one.record ? whole(one) : one).map(
    ([name, value]) => `${JSON.stringify(name)}: ${JSON.stringify(value)}`);
  cell.append(element("pre", `{${fields.join(",\n ")}}`));
  row.classList.add("open");
  row.after(below);
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
