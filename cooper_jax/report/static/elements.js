// Elements of the page, and numbers and texts in them.  Texts enter the page as text nodes only.

const SVG = "http://www.w3.org/2000/svg";

// Make an element.  Properties that are functions are event listeners; null and false leave an attribute out.
function make(tag, properties = {}, ...children) {
  return fill(document.createElement(tag), properties, children);
}

function makeSvg(tag, properties = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
  return element;
}

// --- texts of models ---------------------------------------------------------------------------------------

// Characters that are invisible or that reorder the text around them: controls but tab and line feed, soft hyphens,
// zero-width characters, directional marks, overrides and isolates, and tags.
const INVISIBLE =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]|[\u{e0000}-\u{e007f}]/gu;

// The nodes of a model's text: invisible characters are shown by their code points.
function textNodes(text) {
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    if (match.index > end) nodes.push(text.slice(end, match.index));
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(make("span", { class: "control", title: "an invisible character" }, `U+${code}`));
    end = match.index + match[0].length;
  }
  nodes.push(text.slice(end));
  return nodes;
}

function modelText(text, properties = {}) {
  return make("div", { class: "text", dir: "auto", ...properties }, textNodes(text));
}

// --- numbers -----------------------------------------------------------------------------------------------

function formatNumber(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return size >= 100 ? value.toFixed(1) : value.toPrecision(3);
}

function formatPercent(value, digits = 1) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return `${(100 * value).toFixed(digits)} %`;
}

function formatSeconds(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds >= 5400) return `${(seconds / 3600).toFixed(1)} h`;
  return seconds >= 90 ? `${(seconds / 60).toFixed(1)} min` : `${formatNumber(seconds)} s`;
}

// --- sections, tables and controls -------------------------------------------------------------------------

// A section of the page: a heading, a sentence, controls at the right, and its content.
function makeSection(id, title, about, controls, ...content) {
  const head = make(
    "div",
    { class: "head" },
    make("div", {}, make("h2", { id: `${id}-title` }, title), about && make("p", {}, about)),
    controls && make("div", { class: "controls" }, controls),
  );
  return make("section", { id, "aria-labelledby": `${id}-title` }, head, content);
}

// A table; columns: {title, number}.  A row's first cell is its heading.  Cells are texts or nodes, or {span, cell} for
// one cell in the place of several.  kind: a class of the table; tall: it scrolls by itself.
function makeTable(columns, rows, { kind = null, tall = false } = {}) {
  const head = columns.map((column) =>
    make("th", { scope: "col", class: column.number ? "number" : null }, column.title),
  );
  const body = rows.map((cells) =>
    make(
      "tr",
      {},
      cells.map((cell, index) => {
        const side = columns[index].number ? "number" : null;
        if (index === 0) return make("th", { scope: "row", class: side }, cell);
        return cell?.span ? make("td", { colspan: cell.span }, cell.cell) : make("td", { class: side }, cell);
      }),
    ),
  );
  const table = make(
    "table",
    { class: kind },
    make("thead", {}, make("tr", {}, head)),
    make("tbody", {}, body),
  );
  return make("div", { class: tall ? "scroll tall" : "scroll", tabindex: "0" }, table);
}

// A drop-down list; options: {value, text}.
function makeSelect(label, options, selected, onChange) {
  const items = options.map(({ value, text }) =>
    make("option", { value, selected: String(value) === String(selected) }, text),
  );
  const select = make("select", { change: (event) => onChange(event.target.value) }, items);
  return make("label", { class: "above" }, label, select);
}

function makeCheckbox(label, checked, onChange) {
  return make(
    "label",
    {},
    make("input", { type: "checkbox", checked, change: (event) => onChange(event.target.checked) }),
    label,
  );
}

// The key under a chart; entries: {name, colour}.
function makeKeys(entries) {
  return make(
    "div",
    { class: "keys" },
    entries.map(({ name, colour }) => make("span", {}, make("i", { class: `swatch fill-${colour}` }), name)),
  );
}
