// Sections about training runs: curves of all runs, reward hacking, phases, and every other metric.

// The charts of the first section.  A metric may be a function of the run.  `skipsZero`: a curve that is 0 at all steps
// is left out, since its run does not have what it measures.
const CURVES = [
  { title: "Reward", hint: "mean of a step", metric: "reward/mean" },
  {
    title: "Held-out accuracy",
    hint: "exact truth, or the rule's",
    metric: (run) => run.held_out,
    percent: true,
    evaluated: true,
  },
  { title: "Correct by the rule", hint: "in training", metric: "rule/accuracy", percent: true },
  {
    title: "False positives",
    hint: "wrong by the rule, score above ½",
    metric: "rm/false_positive_rate",
    percent: true,
    low: 0,
  },
  {
    title: "Reward model's accuracy",
    hint: "on held-out responses",
    metric: "eval/rm_policy/accuracy",
    percent: true,
    evaluated: true,
  },
  { title: "KL to step 0", hint: "of the policy", metric: "policy/kl" },
  { title: "Response length", hint: "tokens, mean", metric: "response/tokens_mean" },
  { title: "Entropy", hint: "of the policy, nats", metric: "policy/entropy" },
  { title: "Pair loss", hint: "of the reward model", metric: "rm/pair_loss" },
  {
    title: "Valid pairs",
    hint: "of those requested",
    metric: "pairs/valid_share",
    percent: true,
    low: 0,
    skipsZero: true,
  },
];

function nameMetric(metric, run) {
  return typeof metric === "function" ? metric(run) : metric;
}

// A chart's lines: one for each run, or for a group of several runs their mean, with the runs behind it.
function makeLines(runs, metric, width, skipsZero = false) {
  const lines = [];
  for (const { name, runs: members } of listGroups(runs.filter((run) => run.shown))) {
    const curves = members
      .map((run) => ({ run, curve: readCurve(run, nameMetric(metric, run)) }))
      .filter(({ curve }) => curve && !(skipsZero && curve.ys.every((y) => !y)))
      .map(({ run, curve }) => ({ run, xs: curve.xs, ys: smooth(curve.ys, width) }));
    if (!curves.length) continue;
    const { colour, dash } = curves[0].run;
    const single = curves.length === 1;
    for (const { run, xs, ys } of curves)
      lines.push({ name: single ? name : run.label, xs, ys, colour, dash, faint: !single });
    const mean = single ? null : averageCurves(curves);
    if (mean) lines.push({ name: `${name}, mean`, ...mean, colour, dash });
  }
  return lines;
}

// A slider for the width of the moving mean.
function makeSmoothing(start, onChange) {
  const format = (steps) => (Number(steps) === 1 ? "off" : `${steps} steps`);
  const value = make("output", {}, format(start));
  const slider = make("input", {
    type: "range",
    min: 1,
    max: 50,
    value: start,
    input: (event) => {
      value.textContent = format(event.target.value);
      onChange(Number(event.target.value));
    },
  });
  return make("label", {}, "Moving mean", slider, value);
}

function makeCurves(runs) {
  let width = 5;
  const grid = make("div", { class: "grid" });
  const draw = () => {
    const charts = CURVES.filter(({ metric }) => runs.some((run) => readCurve(run, nameMetric(metric, run))));
    grid.replaceChildren(
      ...charts.map((chart) => {
        const lines = makeLines(runs, chart.metric, chart.evaluated ? 1 : width, chart.skipsZero);
        return make("div", { class: "card" }, makeLineChart({ ...chart, lines }));
      }),
    );
  };
  draw();
  const controls = makeSmoothing(width, (next) => {
    width = next;
    draw();
  });
  const several = listGroups(runs).some((group) => group.runs.length > 1);
  const about =
    "Training dynamics of all runs, laid over each other. The moving mean smooths what is measured at every step; " +
    "evaluations are shown as they are." +
    (several ? " Thin lines are seeds, thick ones their mean at the steps that all have." : "");
  const legend = makeLegend(runs, draw);
  return makeSection("curves", "Curves", about, controls, legend, grid);
}

// --- reward hacking ----------------------------------------------------------------------------------------

const CONFUSION = [
  { name: "correct, accepted", key: "confusion/true_positive", colour: 2 },
  { name: "correct, rejected", key: "confusion/false_negative", colour: 4 },
  { name: "wrong, accepted (false positives)", key: "confusion/false_positive", colour: 1 },
  { name: "wrong, rejected", key: "confusion/true_negative", colour: 0 },
  { name: "no verdict by the rule", key: "confusion/undecided", colour: "grid" },
];

function makeHacking(runs, drop) {
  const measured = runs.filter((run) => readCurve(run, "reward/mean") || run.held_out);
  if (!measured.length) return null;
  const place = make("div", { class: "grid wide" });
  let chosen = measured.find((run) => run.onset !== null) ?? measured[0];
  const draw = () => place.replaceChildren(...drawHacking(chosen));
  draw();
  const options = measured.map((run, index) => ({
    value: index,
    text: run.label + (run.onset === null ? "" : ` (onset: step ${run.onset})`),
  }));
  const select = makeSelect("Run", options, measured.indexOf(chosen), (index) => {
    chosen = measured[index];
    draw();
  });
  const about =
    "A policy that is rewarded by a reward model may find text that scores high and is wrong: the reward rises while accuracy falls. " +
    `The onset is the first of two evaluations in a row that are at least ${Math.round(100 * drop)} points below the highest held-out accuracy so far; ` +
    "it is defined where exact truth is known.";
  return makeSection("hacking", "Reward hacking", about, select, place);
}

function drawHacking(run) {
  const marks = run.guard.alarms.map((step) => ({ x: step, text: "alarm", line: 1 }));
  if (run.onset !== null) marks.push({ x: run.onset, text: "onset" });
  const lines = [];
  const add = (name, metric, colour, width, faint) => {
    const curve = metric && readCurve(run, metric);
    if (curve) lines.push({ name, xs: curve.xs, ys: smooth(curve.ys, width), colour, faint });
  };
  add("reward", "reward/mean", "ink", 5);
  add("correct by the rule, in training", "rule/accuracy", 0, 5);
  if (run.truth) add("held-out accuracy by exact truth", run.truth, 2, 1);
  else add("held-out accuracy by the rule", run.held_out, 2, 1);
  add("false positives", "rm/false_positive_rate", 1, 5);
  // Rewards are shares in all arms, but not those of a user's functions.
  const values = lines.flatMap((line) => line.ys.filter((y) => y !== null));
  const isShare = values.every((value) => value >= 0 && value <= 1);
  const chart = makeLineChart({
    title: "Reward against rule and truth",
    hint: "moving mean of 5 steps",
    lines,
    marks,
    height: 300,
    keys: true,
    ...(isShare ? { low: 0, high: 1 } : {}),
  });
  const cards = [make("div", { class: "card" }, chart, makeVerdict(run), makeAlarms(run))];

  const first = readCurve(run, CONFUSION[0].key);
  if (first) {
    const parts = CONFUSION.map(({ name, key, colour }) => ({ name, colour, ys: readCurve(run, key).ys }));
    const stack = makeStackedChart({
      title: "Reward model against rule",
      hint: "share of a step's responses",
      xs: first.xs,
      parts,
      marks,
      height: 300,
    });
    cards.push(make("div", { class: "card" }, stack));
  }
  return cards;
}

// A sentence on a run's onset.
function makeVerdict(run) {
  const { accuracy_start: start, accuracy_best: best, accuracy_end: end } = run.summary;
  if (run.onset !== null) {
    return make(
      "p",
      { class: "note bad" },
      `Hacked from step ${run.onset}: held-out accuracy was ${formatPercent(best)} at its best ` +
        `and is ${formatPercent(end)} at the last evaluation.`,
    );
  }
  if (run.truth) {
    const change = `held-out accuracy went from ${formatPercent(start)} to ${formatPercent(end)}`;
    return make("p", { class: "note" }, `No onset: ${change}.`);
  }
  return make(
    "p",
    { class: "note" },
    "Exact truth is not known for this task, so no onset is defined. Where false positives rise and rule accuracy " +
      "falls, read the samples.",
  );
}

// A sentence on the guard's alarms; none where it watched and raised none, or did not watch.
function makeAlarms(run) {
  const { action, alarms, by_rule: byRule, frozen } = run.guard;
  if (!alarms.length) return null;
  const parts = [`The guard (${action}) raised an alarm at step ${alarms.join(", ")}.`];
  if (byRule !== null) parts.push(`From step ${byRule} on the rule's verdict is the reward.`);
  if (frozen !== null) parts.push(`The policy was first left as it is at step ${frozen}.`);
  return make("p", { class: "note bad" }, parts.join(" "));
}

// --- phases ------------------------------------------------------------------------------------------------

function makePhases(runs) {
  const timed = runs.filter((run) => run.phases.phases.length);
  if (!timed.length) return null;
  // The largest phases of all runs have colours of their own; the others are one part.
  const totals = new Map();
  for (const run of timed)
    for (const [name, seconds] of run.phases.phases) totals.set(name, (totals.get(name) ?? 0) + seconds);
  const names = [...totals.keys()].sort((a, b) => totals.get(b) - totals.get(a)).slice(0, COLOURS - 1);

  const rows = timed.map((run) => {
    const parts = [];
    let others = 0;
    const seconds = new Map(run.phases.phases);
    for (const name of names)
      if (seconds.has(name)) parts.push({ name, value: seconds.get(name), colour: names.indexOf(name) });
    for (const [name, value] of seconds) if (!names.includes(name)) others += value;
    if (others) parts.push({ name: "others", value: others, colour: "soft" });
    return { name: run.label, parts };
  });
  const bars = makePartsChart({ title: "Seconds of all steps, by phase", rows, format: formatSeconds });
  const lines = makeLines(
    timed.map((run) => ({ ...run, shown: true })),
    "time/step",
    1,
  );
  const line = makeLineChart({ title: "Seconds of a step", lines, low: 0, height: 240 });
  const about =
    "Where the time went: the sums of time/* over all steps, with evaluations and checkpoints. Phases of the host (rule, pairs) " +
    "overlap those of the devices, so their sum may exceed the time of the steps. The first steps include compilation.";
  return makeSection(
    "phases",
    "Phases",
    about,
    null,
    make(
      "div",
      { class: "grid wide" },
      make("div", { class: "card" }, bars),
      make("div", { class: "card" }, line),
    ),
  );
}

// --- every metric ------------------------------------------------------------------------------------------

function makeMetrics(runs) {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.series.curves)))]
    .filter((name) => !name.startsWith("confusion/"))
    .sort();
  if (!names.length) return null;
  const preferred =
    ["policy/grad_norm", "reward/std", "train_rm/grad_norm"].find((name) => names.includes(name)) ?? names[0];
  const place = make("div", { class: "card" });
  let [chosen, width] = [preferred, 1];
  const draw = () =>
    place.replaceChildren(
      makeLineChart({ title: chosen, lines: makeLines(runs, chosen, width), height: 280 }),
    );
  draw();
  const select = makeSelect(
    "Metric",
    names.map((name) => ({ value: name, text: name })),
    chosen,
    (name) => {
      chosen = name;
      draw();
    },
  );
  const slider = makeSmoothing(1, (next) => {
    width = next;
    draw();
  });
  const legend = makeLegend(runs, draw);
  return makeSection(
    "metrics",
    "All metrics",
    `One of the ${names.length} metrics in metrics.jsonl.`,
    [select, slider],
    runs.length > 1 ? legend : null,
    place,
  );
}
