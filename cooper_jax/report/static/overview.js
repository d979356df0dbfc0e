// The runs of the report: their colours, their legend and the table of their summaries.

// Give each group of runs a colour and a dash; runs of one group share them.
function assignColours(runs) {
  const groups = [...new Set(runs.map((run) => run.group))];
  for (const run of runs) {
    const index = groups.indexOf(run.group);
    run.colour = index % COLOURS;
    run.dash = Math.floor(index / COLOURS) % DASHES.length;
    run.shown = true;
  }
}

function listGroups(runs) {
  return [...new Set(runs.map((run) => run.group))].map((name) => ({
    name,
    runs: runs.filter((run) => run.group === name),
  }));
}

// All legends of the page: {chips: name of a group -> its button, onChange}.  They show one state.
const legends = [];

function showGroup(name, members, shown) {
  for (const run of members) run.shown = shown;
  for (const legend of legends) {
    if (!legend.chips.has(name)) continue;
    legend.chips.get(name).setAttribute("aria-pressed", String(shown));
    legend.onChange();
  }
}

// Buttons that show and hide groups of runs in the charts of all sections.
function makeLegend(runs, onChange) {
  const byName = new Map();
  legends.push({ chips: byName, onChange });
  const chips = listGroups(runs).map(({ name, runs: members }) => {
    const sample = makeSvg("svg", { width: 18, height: 8, "aria-hidden": "true" });
    sample.append(
      makeSvg("line", {
        class: `stroke-${members[0].colour}`,
        x1: 1,
        x2: 17,
        y1: 4,
        y2: 4,
        "stroke-width": 3,
        "stroke-dasharray": DASHES[members[0].dash] || null,
      }),
    );
    const count = members.length > 1 ? ` (${members.length} seeds)` : "";
    const chip = make(
      "button",
      { class: "chip", type: "button", "aria-pressed": "true", title: members[0].about || null },
      sample,
      name + count,
    );
    chip.addEventListener("click", () =>
      showGroup(name, members, chip.getAttribute("aria-pressed") === "false"),
    );
    byName.set(name, chip);
    return chip;
  });
  return make("div", { class: "legend", role: "group", "aria-label": "Runs that are shown" }, chips);
}

function nameRun(run) {
  return [
    make("i", { class: `swatch fill-${run.colour}` }),
    ` ${run.label}`,
    run.about && make("small", {}, run.about),
  ];
}

function describeProgress(summary) {
  const total = summary.steps;
  if (!total || summary.done >= total) return String(summary.done);
  return `${summary.done} of ${total}`;
}

function formatOnset(run) {
  if (run.onset !== null) return make("span", { class: "badge bad" }, `step ${run.onset}`);
  if (run.truth) return make("span", { class: "badge good" }, "none");
  return make("span", { title: "exact truth is not known" }, "unknown");
}

function makeTrainingTable(runs) {
  const columns = [
    { title: "run" },
    { title: "reward by" },
    { title: "steps", number: true },
    { title: "held out, start", number: true },
    { title: "best", number: true },
    { title: "end", number: true },
    { title: "onset of hacking" },
    { title: "reward, end", number: true },
    { title: "false positives, end", number: true },
    { title: "s/step", number: true },
  ];
  const rows = runs.map((run) => {
    const { summary } = run;
    return [
      nameRun(run),
      [summary.arm, summary.recipe && make("small", {}, `recipe ${summary.recipe}`)],
      describeProgress(summary),
      formatPercent(summary.accuracy_start),
      [
        formatPercent(summary.accuracy_best),
        summary.accuracy_best_at !== null && make("small", {}, `step ${summary.accuracy_best_at}`),
      ],
      formatPercent(summary.accuracy_end),
      formatOnset(run),
      formatNumber(summary.reward_end),
      formatPercent(summary.false_positives_end),
      formatNumber(summary.seconds_per_step),
    ];
  });
  return makeTable(columns, rows);
}

function makeRewardTrainingTable(runs) {
  const columns = [
    { title: "run" },
    { title: "updates", number: true },
    { title: "held-out accuracy", number: true },
    { title: "AUROC", number: true },
    { title: "loss", number: true },
    { title: "best model" },
  ];
  const rows = runs.map((run) => [
    nameRun(run),
    String(run.summary.done),
    formatPercent(run.summary.accuracy),
    formatNumber(run.summary.auroc),
    formatNumber(run.summary.loss),
    run.figures ? `update ${run.figures.best.step}` : "not finished",
  ]);
  return makeTable(columns, rows);
}

function makeEvaluationTable(runs) {
  const rows = runs.map((run) => [
    nameRun(run),
    run.summary.measured || "not finished",
    String(run.samples.total),
  ]);
  return makeTable(
    [{ title: "evaluation" }, { title: "measures" }, { title: "problems", number: true }],
    rows,
  );
}

function makeOverview(report, byKind) {
  const parts = [];
  const add = (table) => parts.push(make("div", { class: "card" }, table));
  if (byKind.training.length) add(makeTrainingTable(byKind.training));
  if (byKind.reward_training.length) add(makeRewardTrainingTable(byKind.reward_training));
  if (byKind.evaluation.length) add(makeEvaluationTable(byKind.evaluation));
  const about = byKind.training.length
    ? "Held out: accuracy on problems that are not trained on, by exact truth where it is known and by the rule verifier elsewhere. " +
      "Ends of reward and false positives are means over the last ten steps."
    : null;
  return makeSection("overview", "Overview", about, null, make("div", { class: "stack" }, parts));
}
