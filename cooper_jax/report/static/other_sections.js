// Sections about trainings of reward models, evaluations, configuration and environment.

const REWARD_CURVES = [
  { title: "Training loss", metric: "train_rm/loss" },
  { title: "Held-out loss", metric: "eval/loss", evaluated: true },
  { title: "Held-out accuracy", metric: "eval/accuracy", percent: true, evaluated: true },
  { title: "Held-out AUROC", metric: "eval/auroc", evaluated: true },
  { title: "Calibration error", hint: "ECE, held out", metric: "eval/ece", low: 0, evaluated: true },
  { title: "Tokens per second", metric: "time/tokens_per_second", low: 0 },
];

function makeRewardTraining(runs) {
  if (!runs.length) return null;
  let width = 5;
  const grid = make("div", { class: "grid" });
  const draw = () => {
    const charts = REWARD_CURVES.filter(({ metric }) => runs.some((run) => readCurve(run, metric)));
    grid.replaceChildren(
      ...charts.map((chart) =>
        make(
          "div",
          { class: "card" },
          makeLineChart({ ...chart, lines: makeLines(runs, chart.metric, chart.evaluated ? 1 : width) }),
        ),
      ),
    );
  };
  draw();
  const slider = makeSmoothing(width, (next) => {
    width = next;
    draw();
  });
  const finished = runs.filter((run) => run.figures).map(drawRewardFigures);
  const legend = runs.length > 1 ? makeLegend(runs, draw) : null;
  return makeSection(
    "reward-training",
    "Reward-model training",
    "Training and held-out curves, and the best model's figures by source with 95 % intervals.",
    slider,
    legend,
    grid,
    make("div", { class: "stack" }, make("div"), finished),
  );
}

function drawRewardFigures(run) {
  const { groups, best, training_rows: rows, calibration_note: note } = run.figures;
  const names = ["accuracy", "balanced_accuracy", "auroc", "precision", "recall", "f1", "ece"];
  const columns = [
    { title: "rows of" },
    { title: "rows", number: true },
    { title: "positive", number: true },
    ...names.map((name) => ({ title: name.replace("_", " "), number: true })),
  ];
  const cells = groups.map(([name, group]) => [
    name,
    group.rows.toLocaleString("en-US"),
    formatPercent(group.positives / group.rows),
    ...names.map((figure) => formatFigure(group.figures[figure])),
  ]);
  const all = groups[groups.length - 1][1];
  return make(
    "div",
    { class: "card stack" },
    make(
      "div",
      {},
      make("h3", {}, `${run.label}: the model of update ${best.step}`),
      make("p", { class: "hint" }, `${rows.toLocaleString("en-US")} training rows; ${note}.`),
    ),
    makeTable(columns, cells),
    make("div", { class: "grid" }, makeReliabilityChart("Reliability, all rows", all.reliability)),
  );
}

function formatFigure(figure) {
  if (!figure || figure.value === null) return "–";
  const interval =
    figure.low !== undefined &&
    figure.low !== null &&
    make("small", {}, `${figure.low.toFixed(3)} to ${figure.high.toFixed(3)}`);
  return [figure.value.toFixed(3), interval];
}

// --- evaluations -------------------------------------------------------------------------------------------

function makeEvaluations(runs) {
  if (!runs.length) return null;
  const cards = runs.map((run) => {
    const names = [...new Set(run.charts.flatMap((chart) => chart.bars.map((bar) => bar.colour)))];
    const charts = run.charts.map((chart) => {
      const bars = chart.bars.map((bar) => ({ ...bar, colour: names.indexOf(bar.colour) % COLOURS }));
      return makeIntervalChart({ title: chart.title, hint: "95 % intervals", bars });
    });
    const table =
      run.table &&
      make(
        "details",
        { open: charts.length === 0 },
        make("summary", {}, "The table of the evaluation"),
        make("pre", { class: "table", tabindex: "0" }, textNodes(run.table)),
      );
    return make(
      "div",
      { class: "card stack" },
      make("h3", {}, run.label),
      run.summary.finished
        ? null
        : make("p", { class: "note" }, "This evaluation has not ended: there is no results.json yet."),
      make("div", { class: "grid wide" }, charts),
      table || null,
    );
  });
  return makeSection(
    "evaluations",
    "Evaluations",
    "Figures of launch/evaluate.py, with intervals that resample whole questions.",
    null,
    make("div", { class: "stack" }, cards),
  );
}

// --- configuration -----------------------------------------------------------------------------------------

function makeConfig(report) {
  const { runs, config } = report;
  const groups = listGroups(runs);
  let [scope, words] = ["changed", ""];
  const place = make("div", { class: "card" });
  const valueOf = (field, run) =>
    field.changed[runs.indexOf(run)] ?? (run.kind === "evaluation" ? null : field.base);
  const scopes = {
    changed: (field) => Object.keys(field.changed).length > 0,
    // Folders differ in all runs, which says nothing.
    different: (field) =>
      field.name !== "run_dir" && new Set(runs.map((run) => valueOf(field, run))).size > 1,
    all: () => true,
  };
  const draw = () => {
    const fields = config.filter(
      (field) => scopes[scope](field) && `${field.name} ${field.comment}`.toLowerCase().includes(words),
    );
    const columns = [
      { title: "field" },
      { title: "configs/base.py" },
      ...groups.map((group) => ({ title: group.name })),
    ];
    const rows = fields.map((field) => [
      [make("span", { class: "code" }, field.name), field.comment && make("small", {}, field.comment)],
      makeValue(field.base, true),
      ...makeValues(field, groups, valueOf),
    ]);
    place.replaceChildren(
      rows.length
        ? makeTable(columns, rows, { kind: "config", tall: true })
        : make("p", { class: "hint" }, "No field matches."),
    );
  };
  draw();
  const options = [
    { value: "changed", text: "different from base" },
    { value: "all", text: "all fields" },
  ];
  if (runs.length > 1) options.splice(1, 0, { value: "different", text: "different between runs" });
  const search = make("input", {
    type: "search",
    placeholder: "field",
    input: (event) => {
      words = event.target.value.toLowerCase();
      draw();
    },
  });
  const select = makeSelect("Fields", options, scope, (next) => {
    scope = next;
    draw();
  });
  const about =
    "Settings as the runs stored them, beside the defaults of configs/base.py." +
    (groups.length < runs.length ? " Runs of one arm are one column." : "");
  return makeSection(
    "config",
    "Configuration",
    about,
    [select, make("label", { class: "above" }, "Contains", search)],
    place,
  );
}

// A field's cells: one for each group of runs, or a single one if all have the same value.
function makeValues(field, groups, valueOf) {
  const texts = groups.map(({ runs }) => [...new Set(runs.map((run) => valueOf(field, run)))]);
  const isSame = new Set(texts.map((values) => JSON.stringify(values))).size === 1;
  const cells = texts.map((values) =>
    values.map((value) => make("div", {}, makeValue(value, value === field.base))),
  );
  return isSame ? [{ span: groups.length, cell: cells[0] }] : cells;
}

function makeValue(text, unchanged) {
  if (text === null || text === undefined) return make("span", { class: "hint" }, "–");
  return make("span", { class: unchanged ? "code hint" : "code" }, textNodes(text));
}

// --- environment -------------------------------------------------------------------------------------------

function makeEnvironment(runs) {
  const known = runs.filter((run) => Object.keys(run.environment).length);
  if (!known.length) {
    return makeSection(
      "environment",
      "Environment",
      null,
      null,
      make("p", { class: "note" }, "The runs have no environment.json: they are from an earlier version."),
    );
  }
  const tables = known.map((run) => flatten(run.environment));
  const names = [...new Set(tables.flatMap((table) => Object.keys(table)))];
  // One column for all runs whose values are the same; the start of each run is its own.
  const columns = [];
  known.forEach((run, index) => {
    const text = JSON.stringify({ ...tables[index], started: "" });
    const same = columns.find((column) => column.text === text);
    if (same) same.runs.push(run);
    else columns.push({ text, table: tables[index], runs: [run] });
  });
  const titles = columns.map(({ runs: members }) => {
    if (members.length === known.length)
      return { title: known.length > 1 ? `all ${known.length} runs` : known[0].label };
    return {
      title: members.length > 3 ? `${members.length} runs` : members.map((run) => run.label).join("; "),
    };
  });
  const rows = names.map((name) => [
    name,
    ...columns.map(({ table, runs: members }) =>
      name === "started" && members.length > 1
        ? `${members.length} starts`
        : textNodes(String(table[name] ?? "–")),
    ),
  ]);
  const about = "Versions and devices of each run's latest start. A commit with + had changed files.";
  return makeSection(
    "environment",
    "Environment",
    about,
    null,
    make("div", { class: "card" }, makeTable([{ title: "" }, ...titles], rows, { kind: "config" })),
  );
}

// Nested objects as one table, with dotted names.
function flatten(object, prefix = "") {
  const table = {};
  for (const [name, value] of Object.entries(object)) {
    if (value && typeof value === "object" && !Array.isArray(value))
      Object.assign(table, flatten(value, `${prefix}${name}.`));
    else table[prefix + name] = value;
  }
  return table;
}
