// The sample browser: prompts, responses and pairs of one run, filtered.

const VERDICTS = ["correct", "wrong", "no_answer", "unrecognised", "timeout"];
const PAGE = 6; // problems that are shown at once

// The kinds of disagreement that can be asked for, with what a response must satisfy.
const DISAGREEMENTS = [
  { value: "", text: "any", test: () => true },
  { value: "rm", text: "rule and reward model disagree", test: (r) => disagrees(r) },
  {
    value: "false_positive",
    text: "reward model accepts, rule says wrong",
    test: (r) => disagrees(r) && r.score > 0.5,
  },
  {
    value: "false_negative",
    text: "reward model rejects, rule says correct",
    test: (r) => disagrees(r) && r.score <= 0.5,
  },
  {
    value: "rule",
    text: "rule and truth disagree",
    test: (r) => "truth" in r && isDecided(r) && (r.verdict === "correct") !== r.truth,
  },
  {
    value: "truth",
    text: "reward model and truth disagree",
    test: (r) => "truth" in r && hasScore(r) && r.score > 0.5 !== r.truth,
  },
];

function hasScore(response) {
  return response.score !== null && response.score !== undefined;
}

// Abstentions are no opinion that one could disagree with.
function isDecided(response) {
  return ["correct", "wrong", "no_answer"].includes(response.verdict);
}

function disagrees(response) {
  return (
    isDecided(response) && hasScore(response) && (response.verdict === "correct") !== response.score > 0.5
  );
}

function makeSampleBrowser(runs, rules) {
  const sampled = runs.filter((run) => run.samples?.samples.length);
  if (!runs.length) return null;
  if (!sampled.length) {
    return makeSection(
      "samples",
      "Samples",
      null,
      null,
      make(
        "p",
        { class: "note" },
        "The runs have no samples.jsonl (log.samples_every=0), or no step is sampled yet.",
      ),
    );
  }
  const first = sampled.find((run) => run.onset) ?? sampled[0];
  const state = { run: first, step: "", verdicts: new Set(), disagreement: "", words: "", page: 0 };
  const filters = make("div", { class: "filters card" });
  const list = make("div", { class: "stack" });
  const update = (changes = {}, rebuild = false) => {
    Object.assign(state, { page: 0 }, changes);
    if (rebuild) filters.replaceChildren(...makeFilters(sampled, state, update));
    list.replaceChildren(...drawSamples(state, update));
  };
  update({}, true);
  const about =
    "What the policy wrote, how it was judged, and the pairs that the reward model learns from. " +
    "Rule and reward model disagree where the rule decides and the score is on the other side of ½.";
  return makeSection("samples", "Samples", about, null, filters, list, makeRule(sampled, rules));
}

function makeFilters(sampled, state, update) {
  const steps = [...new Set(state.run.samples.samples.map((sample) => sample.step))].filter(
    (step) => step !== undefined,
  );
  const stepOptions = [
    { value: "", text: "all" },
    ...steps.map((step) => ({ value: step, text: `step ${step}` })),
  ];
  const runOptions = sampled.map((run, index) => ({ value: index, text: run.label }));
  const responses = state.run.samples.samples.flatMap((sample) => sample.responses);
  const verdicts = VERDICTS.filter((verdict) => responses.some((response) => response.verdict === verdict));
  const kinds = DISAGREEMENTS.filter((kind) => kind.value === "" || responses.some(kind.test));

  const search = make("input", {
    type: "search",
    placeholder: "text",
    value: state.words,
    input: (event) => update({ words: event.target.value.toLowerCase() }),
  });
  const row = make(
    "div",
    { class: "controls" },
    makeSelect("Run", runOptions, sampled.indexOf(state.run), (index) =>
      update({ run: sampled[index], step: "", verdicts: new Set(), disagreement: "" }, true),
    ),
    steps.length > 1 && makeSelect("Step", stepOptions, state.step, (step) => update({ step })),
    kinds.length > 1 &&
      makeSelect("Disagreement", kinds, state.disagreement, (disagreement) => update({ disagreement })),
    make("label", { class: "above" }, "Contains", search),
  );
  const boxes = verdicts.map((verdict) => {
    const count = responses.filter((response) => response.verdict === verdict).length;
    return makeCheckbox(`${nameVerdict(verdict)} (${count})`, state.verdicts.has(verdict), (checked) => {
      if (checked) state.verdicts.add(verdict);
      else state.verdicts.delete(verdict);
      update();
    });
  });
  const set =
    verdicts.length > 1 && make("fieldset", {}, make("legend", {}, "Verdict of the rule (none: all)"), boxes);
  return [row, set].filter(Boolean);
}

function nameVerdict(verdict) {
  return verdict.replace("_", " ");
}

// The samples that have a response which passes all filters, each with those responses.
function filterSamples(state) {
  const { test } = DISAGREEMENTS.find((kind) => kind.value === state.disagreement);
  const found = [];
  for (const sample of state.run.samples.samples) {
    if (state.step !== "" && String(sample.step) !== state.step) continue;
    const asked = `${sample.question}\n${sample.reference}`.toLowerCase().includes(state.words);
    const responses = sample.responses.filter(
      (response) =>
        (!state.verdicts.size || state.verdicts.has(response.verdict)) &&
        test(response) &&
        (asked || response.text.toLowerCase().includes(state.words)),
    );
    const isFiltered = state.verdicts.size || state.disagreement || state.words;
    const pairs = isFiltered && !responses.length ? [] : sample.pairs;
    if (responses.length)
      found.push({ ...sample, responses, pairs, hidden: sample.responses.length - responses.length });
  }
  return found;
}

function drawSamples(state, update) {
  const found = filterSamples(state);
  const responses = found.reduce((sum, sample) => sum + sample.responses.length, 0);
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  const move = (by) => update({ page: Math.min(pages - 1, Math.max(0, state.page + by)) });
  const pager = make(
    "div",
    { class: "controls" },
    make(
      "span",
      { role: "status" },
      `${responses.toLocaleString("en-US")} responses to ${found.length} prompts`,
    ),
    pages > 1 &&
      make("button", { type: "button", disabled: state.page === 0, click: () => move(-1) }, "Previous"),
    pages > 1 && make("span", {}, `page ${state.page + 1} of ${pages}`),
    pages > 1 &&
      make("button", { type: "button", disabled: state.page === pages - 1, click: () => move(1) }, "Next"),
  );
  const shown = found.slice(state.page * PAGE, (state.page + 1) * PAGE);
  return [pager, ...shown.map(drawSample)];
}

function drawSample(sample) {
  const meta = [sample.step !== undefined && `step ${sample.step}`, sample.id, sample.about].filter(Boolean);
  const shown = sample.responses.slice(0, 4);
  const rest = sample.responses.slice(4);
  const more = make("details", {}, make("summary", {}, `${rest.length} more responses`));
  // Built when it is opened: most are never looked at.
  more.addEventListener("toggle", () => {
    if (more.open && more.children.length === 1) more.append(...rest.map(drawResponse));
  });
  return make(
    "article",
    { class: "card sample" },
    make(
      "div",
      { class: "ask" },
      make("div", { class: "meta" }, textNodes(meta.join(" · "))),
      modelText(sample.question),
      sample.prompt &&
        make(
          "details",
          {},
          make("summary", {}, "Prompt as the policy reads it, without special tokens"),
          modelText(sample.prompt),
        ),
      make(
        "div",
        { class: "badges" },
        make("span", { class: "meta" }, "Reference"),
        modelText(sample.reference),
      ),
    ),
    shown.map(drawResponse),
    rest.length ? more : null,
    sample.hidden
      ? make("p", { class: "meta" }, `${sample.hidden} other responses do not match the filters.`)
      : null,
    sample.pairs.length ? drawPairs(sample) : null,
  );
}

function drawResponse(response) {
  return make(
    "div",
    { class: "response" },
    make("div", { class: "badges" }, makeBadges(response)),
    modelText(response.text),
    drawReplies(response),
  );
}

function makeBadges(response) {
  const badges = [];
  const add = (text, kind, title) =>
    badges.push(make("span", { class: `badge ${kind}`, title: title ?? null }, textNodes(text)));
  if (response.attack) add(`attack: ${response.attack}`, "plain");
  if (response.verdict) {
    const kinds = { correct: "good", wrong: "bad", no_answer: "bad" };
    add(
      `rule: ${nameVerdict(response.verdict)}`,
      kinds[response.verdict] ?? "unsure",
      "verdict of the rule verifier",
    );
  }
  if ("truth" in response)
    add(
      response.truth ? "truth: correct" : "truth: wrong",
      response.truth ? "good" : "bad",
      "exact truth, or the label",
    );
  if ("reward" in response) add(`reward ${formatNumber(response.reward)}`, "plain");
  if (hasScore(response) && response.score !== response.reward)
    add(`reward model ${formatNumber(response.score)}`, "plain");
  if ("advantage" in response) add(`advantage ${formatSigned(response.advantage)}`, "plain");
  for (const [name, value] of Object.entries(response.rewards ?? {}))
    add(`${name} ${formatNumber(value)}`, "plain");
  for (const [name, opinion] of Object.entries(response.judges ?? {}))
    add(`${name}: ${opinion}`, opinion === "yes" ? "good" : "bad");
  if (response.truncated) add("truncated", "unsure", "the length limit was reached");
  if (disagrees(response)) add("rule and reward model disagree", "unsure");
  return badges;
}

function formatSigned(value) {
  return value > 0 ? `+${formatNumber(value)}` : formatNumber(value);
}

function drawReplies(response) {
  return Object.entries(response.replies ?? {}).map(([name, reply]) =>
    make("details", {}, make("summary", {}, `Reply of ${name}`), modelText(reply)),
  );
}

// The chosen pairs, with the words that only one member has.
function drawPairs(sample) {
  const pairs = sample.pairs.map((pair) => {
    const [positive, negative] = compareTexts(pair.positive, pair.negative);
    const describe = (name, kind, parts, tag, reference) =>
      make(
        "div",
        {},
        make(
          "div",
          { class: "badges" },
          make("span", { class: `badge ${kind}` }, name),
          reference !== undefined &&
            make("span", { class: "meta" }, "beside the reference ", make(tag, {}, textNodes(reference))),
        ),
        makeMarkedText(parts, tag),
      );
    return make(
      "div",
      { class: "pair" },
      describe("positive", "good", positive, "ins", pair.positive_reference),
      describe("negative", "bad", negative, "del", pair.negative_reference),
    );
  });
  const heading = pairs.length === 1 ? "Chosen pair" : `${pairs.length} chosen pairs`;
  return make("div", {}, make("h4", {}, heading), pairs);
}

// What part of the samples the report has.
function makeRule(sampled, rules) {
  const lines = sampled.map((run) => {
    const { shown, total, cut_at: cut } = run.samples;
    const unit = run.kind === "training" ? "sampled steps" : "problems";
    const part =
      shown === total
        ? `all ${total} ${unit}`
        : `${shown} of ${total} ${unit}, evenly chosen from the last backwards, with the first`;
    return make(
      "li",
      {},
      `${run.label}: ${part}; longer texts are cut in their middle to ${cut.toLocaleString("en-US")} characters.`,
    );
  });
  return make(
    "details",
    { class: "data" },
    make("summary", {}, "Which samples are here"),
    make(
      "p",
      { class: "hint" },
      `A report has room for ${(rules.text_bytes / 1e6).toFixed(1)} MB of samples of each run.`,
    ),
    make("ul", { class: "hint" }, lines),
  );
}
