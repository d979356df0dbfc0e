// Charts of shares, bars with intervals, and the reliability diagram.

// Stacked areas of shares that add up to one.  parts: [{name, ys, colour}] over the same xs, from the bottom up.
function makeStackedChart(options) {
  const plot = make("div");
  const tip = make("div", { class: "tip hidden" });
  const lines = options.parts.map((part) => ({ ...part, xs: options.xs }));
  const figure = makeFigure(
    options,
    plot,
    tip,
    makeKeys([...options.parts].reverse()),
    makeDataTable({ title: options.title, percent: true }, lines),
  );
  watchWidth(plot, (width) => plot.replaceChildren(drawStack(options, lines, width, tip)));
  return figure;
}

function drawStack(options, lines, width, tip) {
  const height = options.height ?? 240;
  const { xs } = options;
  const extent = { left: xs[0], right: Math.max(xs[xs.length - 1], xs[0] + 1), low: 0, high: 1 };
  const toX = (x) =>
    MARGIN.left + ((x - extent.left) / (extent.right - extent.left)) * (width - MARGIN.left - MARGIN.right);
  const toY = (y) => height - MARGIN.bottom - y * (height - MARGIN.top - MARGIN.bottom);
  const svg = makePlot(width, height, describeChart({ title: options.title, percent: true }, lines), true);
  svg.append(...drawAxes({ percent: true }, extent, toX, toY, width, height));

  let below = xs.map(() => 0);
  for (const part of options.parts) {
    const above = below.map((base, index) => base + (part.ys[index] ?? 0));
    const upper = xs.map((x, index) => `${toX(x).toFixed(1)} ${toY(above[index]).toFixed(1)}`);
    const lower = xs.map((x, index) => `${toX(x).toFixed(1)} ${toY(below[index]).toFixed(1)}`).reverse();
    svg.append(
      makeSvg("path", {
        class: `fill-${part.colour}`,
        d: `M${[...upper, ...lower].join("L")}Z`,
        opacity: 0.85,
      }),
    );
    below = above;
  }
  for (const mark of options.marks ?? []) svg.append(...drawMark(mark, toX, height, width));

  // The tip lists the parts from the top down, as they are stacked; there is no line for dots to lie on.
  const plot = {
    options: { percent: true },
    lines: [...lines].reverse(),
    extent,
    toX,
    toY: () => -20,
    width,
    height,
    tip,
  };
  addCursor(svg, plot);
  return svg;
}

// Horizontal bars, one for each row, of parts beside each other.  rows: [{name, parts: [{name, value, colour}]}].
function makePartsChart(options) {
  const plot = make("div");
  const keys = new Map();
  for (const row of options.rows) for (const part of row.parts) keys.set(part.name, part.colour);
  const names = [...keys.keys()];
  const columns = [{ title: "run" }, ...names.map((name) => ({ title: name, number: true }))];
  const cells = options.rows.map((row) => [
    row.name,
    ...names.map((name) => options.format(row.parts.find((part) => part.name === name)?.value)),
  ]);
  const figure = makeFigure(
    options,
    plot,
    makeKeys(names.map((name) => ({ name, colour: keys.get(name) }))),
    makeFoldedTable(columns, cells),
  );
  watchWidth(plot, (width) => plot.replaceChildren(drawParts(options, width)));
  return figure;
}

function drawParts(options, width) {
  const rowHeight = 44;
  const height = options.rows.length * rowHeight;
  const sums = options.rows.map((row) => row.parts.reduce((sum, part) => sum + part.value, 0));
  const scale = (width - 70) / Math.max(...sums, 1e-9);
  const words = options.rows.map((row, index) => `${row.name} ${options.format(sums[index])}`);
  const svg = makePlot(width, height, `${options.title}: ${words.join(", ")}`);
  options.rows.forEach((row, index) => {
    const top = index * rowHeight;
    let x = 0;
    svg.append(makeSvg("text", { class: "strong", x: 0, y: top + 14 }, row.name));
    for (const part of row.parts) {
      const size = part.value * scale;
      const title = makeSvg(
        "title",
        {},
        `${part.name}: ${options.format(part.value)} (${formatPercent(part.value / sums[index], 0)})`,
      );
      svg.append(
        makeSvg(
          "rect",
          { class: `fill-${part.colour}`, x, y: top + 20, width: Math.max(size - 0.7, 0.3), height: 16 },
          title,
        ),
      );
      x += size;
    }
    svg.append(makeSvg("text", { x: x + 6, y: top + 32 }, options.format(sums[index])));
  });
  return svg;
}

// Points with their 95 % intervals, one for each row.  bars: [{name, value, low, high, colour}], values are shares.
function makeIntervalChart(options) {
  const plot = make("div");
  const columns = [{ title: "" }, { title: "value", number: true }, { title: "95 % interval", number: true }];
  const cells = options.bars.map((bar) => [bar.name, formatPercent(bar.value), formatInterval(bar)]);
  const figure = makeFigure(
    options,
    plot,
    makeFoldedTable(columns, cells),
  );
  watchWidth(plot, (width) => plot.replaceChildren(drawIntervals(options, width)));
  return figure;
}

function formatInterval(bar) {
  if (bar.low === null || bar.low === undefined) return "–";
  return `${formatPercent(bar.low)} to ${formatPercent(bar.high)}`;
}

function drawIntervals(options, width) {
  const rowHeight = 40;
  const height = options.bars.length * rowHeight + 22;
  const right = width - 58;
  const toX = (value) => value * right;
  const words = options.bars.map((bar) => `${bar.name} ${formatPercent(bar.value)}`);
  const svg = makePlot(width, height, `${options.title}: ${words.join(", ")}`);
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(
      makeSvg("line", { class: "gridline", x1: toX(value), x2: toX(value), y1: 0, y2: height - 20 }),
    );
    const anchor = value === 0 ? "start" : "middle";
    svg.append(
      makeSvg("text", { x: toX(value), y: height - 5, "text-anchor": anchor }, formatPercent(value, 0)),
    );
  }
  options.bars.forEach((bar, index) => {
    const top = index * rowHeight;
    const y = top + 25;
    svg.append(makeSvg("text", { class: "strong", x: 1, y: top + 13 }, bar.name));
    if (bar.value === null || bar.value === undefined) return;
    svg.append(
      makeSvg("rect", {
        class: `fill-${bar.colour}`,
        x: 0,
        y: y - 6,
        width: Math.max(toX(bar.value), 1),
        height: 12,
        rx: 2,
        opacity: 0.85,
      }),
    );
    if (bar.low !== null && bar.low !== undefined) {
      svg.append(
        makeSvg("path", {
          class: "interval",
          d: `M${toX(bar.low)} ${y}H${toX(bar.high)}M${toX(bar.low)} ${y - 4}v8M${toX(bar.high)} ${y - 4}v8`,
        }),
      );
    }
    svg.append(
      makeSvg(
        "text",
        { x: Math.max(toX(bar.value), toX(bar.high ?? bar.value)) + 6, y: y + 4 },
        formatPercent(bar.value),
      ),
    );
  });
  return svg;
}

// The share of correct rows against the mean score, bin by bin.  bins: [{predicted, observed, count}].
function makeReliabilityChart(title, bins) {
  const plot = make("div");
  const columns = ["mean score", "correct", "rows"].map((name) => ({ title: name, number: true }));
  const cells = bins.map((bin) => [
    formatNumber(bin.predicted),
    formatPercent(bin.observed),
    String(bin.count),
  ]);
  const figure = makeFigure(
    { title, hint: "dashed: calibrated" },
    plot,
    makeFoldedTable(columns, cells),
  );
  watchWidth(plot, (width) => plot.replaceChildren(drawReliability(title, bins, width)));
  return figure;
}

function drawReliability(title, bins, width) {
  const height = Math.min(320, Math.max(220, width * 0.7));
  const extent = { left: 0, right: 1, low: 0, high: 1 };
  const toX = (x) => MARGIN.left + x * (width - MARGIN.left - MARGIN.right);
  const toY = (y) => height - MARGIN.bottom - y * (height - MARGIN.top - MARGIN.bottom);
  const words = bins.map(
    (bin) => `score ${formatNumber(bin.predicted)}, ${formatPercent(bin.observed, 0)} correct`,
  );
  const svg = makePlot(width, height, `${title}: ${words.join("; ")}`);
  svg.append(...drawAxes({ percent: true, columns: [] }, extent, toX, toY, width, height));
  for (const value of [0, 0.25, 0.5, 0.75, 1]) {
    svg.append(makeSvg("text", { x: toX(value), y: height - 6, "text-anchor": "middle" }, String(value)));
  }
  svg.append(
    makeSvg("path", {
      class: "line stroke-soft",
      d: `M${toX(0)} ${toY(0)}L${toX(1)} ${toY(1)}`,
      "stroke-dasharray": "4 4",
    }),
  );
  const largest = Math.max(...bins.map((bin) => bin.count), 1);
  svg.append(
    drawLine(
      { xs: bins.map((bin) => bin.predicted), ys: bins.map((bin) => bin.observed), colour: 0 },
      toX,
      toY,
    ),
  );
  for (const bin of bins) {
    const radius = 3 + 7 * Math.sqrt(bin.count / largest);
    const hover = makeSvg(
      "title",
      {},
      `${bin.count} rows, mean score ${formatNumber(bin.predicted)}, ${formatPercent(bin.observed)} correct`,
    );
    svg.append(
      makeSvg(
        "circle",
        { class: "fill-0", cx: toX(bin.predicted), cy: toY(bin.observed), r: radius, opacity: 0.8 },
        hover,
      ),
    );
  }
  return svg;
}
