// Charts of curves over steps.

const MARGIN = { left: 46, right: 12, top: 8, bottom: 22 };
const DASHES = ["", "6 4", "2 4", "9 3 2 3"];

// Redraws a chart when its width changes.  draw: called with the width in pixels.
function watchWidth(element, draw) {
  let width = 0;
  new ResizeObserver((entries) => {
    const next = Math.round(entries[0].contentRect.width);
    if (next > 0 && next !== width) {
      width = next;
      draw(width);
    }
  }).observe(element);
}

// A figure of a chart.  heading: {title, hint}
function makeFigure(heading, ...content) {
  const caption = make(
    "figcaption",
    {},
    make("h3", {}, heading.title),
    heading.hint && make("span", { class: "hint" }, heading.hint),
  );
  return make("figure", { class: "chart" }, caption, ...content);
}

// The drawing of a chart.  words: what a screen reader says; takesKeys: arrow keys move through its steps.
function makePlot(width, height, words, takesKeys = false) {
  return makeSvg("svg", {
    class: "plot",
    viewBox: `0 0 ${width} ${height}`,
    height,
    role: "img",
    tabindex: takesKeys ? "0" : null,
    "aria-label": words,
  });
}

// The values of a chart as a table, which is folded away.
function makeFoldedTable(columns, cells) {
  return make("details", { class: "data" }, make("summary", {}, "Values"), makeTable(columns, cells));
}

// A chart.  options:
//   title, hint
//   lines: [{name, xs, ys, colour, dash, faint}]; faint lines are single runs behind their group's mean
//   percent: the values are shares
//   low, high: limits of the vertical axis; left out: those of the values
//   marks: [{x, text, line}]: vertical lines; `line` is the row of the label, from 0
//   keys: list the names of the lines under the chart
//   height in pixels
function makeLineChart(options) {
  const lines = options.lines.filter((line) => line.ys.some((y) => y !== null));
  const plot = make("div");
  const tip = make("div", { class: "tip hidden" });
  const figure = makeFigure(
    options,
    plot,
    tip,
    options.keys && lines.length ? makeKeys(lines) : null,
    lines.length ? makeDataTable(options, lines) : null,
  );
  if (!lines.length) {
    plot.append(make("p", { class: "hint" }, "Not measured in the runs that are shown."));
    return figure;
  }
  watchWidth(plot, (width) => plot.replaceChildren(drawPlot(options, lines, width, tip)));
  return figure;
}

function formatValue(options, value) {
  return options.percent ? formatPercent(value) : formatNumber(value);
}

function findExtent(options, lines) {
  let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
  for (const { xs, ys } of lines) {
    ys.forEach((y, index) => {
      if (y === null) return;
      left = Math.min(left, xs[index]);
      right = Math.max(right, xs[index]);
      low = Math.min(low, y);
      high = Math.max(high, y);
    });
  }
  // Training begins at step 1 and evaluations at step 0: one axis for both.
  if (left === 1) left = 0;
  if (right === left) right = left + 1;
  low = options.low ?? low;
  high = options.high ?? high;
  // Not above 100 % for shares, and not below 0 for what never is.
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  const top = options.high ?? (options.percent ? Math.min(1, high + room) : high + room);
  const bottom = options.low ?? (low >= 0 ? Math.max(0, low - room) : low - room);
  return { left, right, low: bottom, high: top > bottom ? top : bottom + 1 };
}

function drawPlot(options, lines, width, tip) {
  const height = options.height ?? 190;
  const extent = findExtent(options, lines);
  const toX = (x) =>
    MARGIN.left + ((x - extent.left) / (extent.right - extent.left)) * (width - MARGIN.left - MARGIN.right);
  const toY = (y) =>
    height -
    MARGIN.bottom -
    ((y - extent.low) / (extent.high - extent.low)) * (height - MARGIN.top - MARGIN.bottom);

  const svg = makePlot(width, height, describeChart(options, lines), true);
  svg.append(...drawAxes(options, extent, toX, toY, width, height));
  for (const mark of options.marks ?? []) svg.append(...drawMark(mark, toX, height, width));
  for (const line of [...lines].sort((a, b) => Boolean(b.faint) - Boolean(a.faint)))
    svg.append(drawLine(line, toX, toY));
  addCursor(svg, { options, lines, extent, toX, toY, width, height, tip });
  return svg;
}

function drawAxes(options, extent, toX, toY, width, height) {
  const parts = [];
  const rows = chooseTicks(extent.low, extent.high, height > 220 ? 6 : 4);
  // All labels of an axis have the same number of digits.
  const step = rows.length > 1 ? rows[1] - rows[0] : 1;
  const format = (value) => {
    if (!options.percent) return formatTick(value, step);
    return `${(100 * value).toFixed(step < 0.01 ? 1 : 0)} %`;
  };
  for (const value of rows) {
    parts.push(
      makeSvg("line", {
        class: "gridline",
        x1: MARGIN.left,
        x2: width - MARGIN.right,
        y1: toY(value),
        y2: toY(value),
      }),
    );
    parts.push(
      makeSvg("text", { x: MARGIN.left - 6, y: toY(value) + 4, "text-anchor": "end" }, format(value)),
    );
  }
  const columns =
    options.columns ?? chooseTicks(extent.left, extent.right, width > 420 ? 7 : 4).filter(Number.isInteger);
  for (const value of columns) {
    parts.push(
      makeSvg(
        "text",
        { x: toX(value), y: height - 6, "text-anchor": "middle" },
        value.toLocaleString("en-US"),
      ),
    );
  }
  const bottom = height - MARGIN.bottom;
  parts.push(
    makeSvg("line", { class: "baseline", x1: MARGIN.left, x2: width - MARGIN.right, y1: bottom, y2: bottom }),
  );
  return parts;
}

function formatTick(value, step) {
  if (value === 0) return "0";
  if (Math.abs(value) >= 1e5 || step < 1e-4)
    return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  const digits = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
  // A step of 2.5 needs one more digit than one of 2.
  const exact = Math.abs(step * 10 ** digits - Math.round(step * 10 ** digits)) < 1e-6;
  return value.toFixed(exact ? digits : digits + 1);
}

function drawMark(mark, toX, height, width) {
  const x = toX(mark.x);
  const anchor = x > width - 90 ? "end" : "start";
  // Marks of different kinds may be close to each other.
  const y = MARGIN.top + 10 + 13 * (mark.line ?? 0);
  return [
    makeSvg("line", { class: "mark", x1: x, x2: x, y1: MARGIN.top, y2: height - MARGIN.bottom }),
    makeSvg(
      "text",
      { class: "mark-label", x: x + (anchor === "end" ? -5 : 5), y, "text-anchor": anchor },
      mark.text,
    ),
  ];
}

function drawLine(line, toX, toY) {
  // A missing value is a gap.
  let path = "";
  let pen = false;
  line.ys.forEach((y, index) => {
    if (y === null) {
      pen = false;
      return;
    }
    path += `${pen ? "L" : "M"}${toX(line.xs[index]).toFixed(1)} ${toY(y).toFixed(1)}`;
    pen = true;
  });
  return makeSvg("path", {
    class: `line stroke-${line.colour}`,
    d: path,
    "stroke-width": line.faint ? 1 : 2,
    opacity: line.faint ? 0.35 : 1,
    "stroke-dasharray": DASHES[line.dash ?? 0] || null,
  });
}

// --- the values under the pointer ---------------------------------------------------------------------------

function addCursor(svg, plot) {
  const cursor = makeSvg("line", { class: "cursor hidden", y1: MARGIN.top, y2: plot.height - MARGIN.bottom });
  const dots = makeSvg("g");
  svg.append(cursor, dots);
  const steps = [...new Set(plot.lines.filter((line) => !line.faint).flatMap((line) => line.xs))].sort(
    (a, b) => a - b,
  );
  let place = -1;

  const show = (index) => {
    place = index;
    const x = steps[index];
    cursor.setAttribute("x1", plot.toX(x));
    cursor.setAttribute("x2", plot.toX(x));
    cursor.classList.remove("hidden");
    showTip(plot, x, dots);
  };
  const hide = () => {
    place = -1;
    cursor.classList.add("hidden");
    dots.replaceChildren();
    plot.tip.classList.add("hidden");
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const share = (event.clientX - box.left - MARGIN.left) / (plot.width - MARGIN.left - MARGIN.right);
    show(findNearest(steps, plot.extent.left + share * (plot.extent.right - plot.extent.left)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: steps.length - 1 };
    if (event.key === "Escape") hide();
    if (!(event.key in moves)) return;
    event.preventDefault();
    show(Math.min(steps.length - 1, Math.max(0, moves[event.key])));
  });
}

function findNearest(sorted, value) {
  let best = 0;
  sorted.forEach((candidate, index) => {
    if (Math.abs(candidate - value) < Math.abs(sorted[best] - value)) best = index;
  });
  return best;
}

function showTip(plot, x, dots) {
  const rows = [];
  dots.replaceChildren();
  for (const line of plot.lines) {
    const index = line.xs.indexOf(x);
    if (line.faint || index < 0 || line.ys[index] === null) continue;
    const value = line.ys[index];
    dots.append(
      makeSvg("circle", { class: `fill-${line.colour}`, cx: plot.toX(x), cy: plot.toY(value), r: 3.5 }),
    );
    rows.push(
      make(
        "div",
        {},
        make("i", { class: `swatch fill-${line.colour}` }),
        make("span", {}, line.name),
        make("b", {}, formatValue(plot.options, value)),
      ),
    );
  }
  plot.tip.replaceChildren(make("b", {}, `step ${x.toLocaleString("en-US")}`), ...rows.slice(0, 14));
  plot.tip.classList.remove("hidden");

  // Beside the cursor, on the side that has room.
  const figure = plot.tip.parentElement;
  const scale = figure.clientWidth / plot.width;
  const left = plot.toX(x) * scale;
  const goesLeft = left > figure.clientWidth / 2;
  plot.tip.style.left = `${goesLeft ? Math.max(0, left - plot.tip.offsetWidth - 12) : left + 12}px`;
  plot.tip.style.top = "2.2rem";
}

// --- the same in words --------------------------------------------------------------------------------------

function describeChart(options, lines) {
  const ends = lines
    .filter((line) => !line.faint)
    .slice(0, 10)
    .map((line) => `${line.name} ends at ${formatValue(options, lastValue(line.ys))}`);
  return `${options.title}, over steps: ${ends.join(", ")}. Arrow keys move through the steps.`;
}

// A table of the chart's values, which is filled when it is opened: at most 40 steps, evenly chosen.
function makeDataTable(options, lines) {
  const shown = lines.filter((line) => !line.faint);
  const details = make("details", { class: "data" }, make("summary", {}, "Values"));
  details.addEventListener("toggle", () => {
    if (!details.open || details.children.length > 1) return;
    const steps = [...new Set(shown.flatMap((line) => line.xs))].sort((a, b) => a - b);
    const stride = Math.ceil(steps.length / 40);
    const chosen = steps.filter((_, index) => (steps.length - 1 - index) % stride === 0);
    const columns = [
      { title: "step", number: true },
      ...shown.map((line) => ({ title: line.name, number: true })),
    ];
    const rows = chosen.map((x) => [
      String(x),
      ...shown.map((line) => {
        const index = line.xs.indexOf(x);
        return index < 0 ? "" : formatValue(options, line.ys[index]);
      }),
    ]);
    details.append(makeTable(columns, rows));
  });
  return details;
}
