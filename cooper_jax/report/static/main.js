// Builds the page from the data block.

function groupByKind(runs) {
  const byKind = { training: [], reward_training: [], evaluation: [] };
  for (const run of runs) byKind[run.kind].push(run);
  return byKind;
}

function describeContents(byKind) {
  const names = {
    training: "training run",
    reward_training: "reward-model training",
    evaluation: "evaluation",
  };
  return Object.entries(names)
    .filter(([kind]) => byKind[kind].length)
    .map(([kind, name]) => `${byKind[kind].length} ${name}${byKind[kind].length > 1 ? "s" : ""}`)
    .join(", ");
}

function makeHeader(report, byKind, sections) {
  const links = sections.map((section) =>
    make("a", { href: `#${section.id}` }, section.querySelector("h2").textContent),
  );
  return [
    make(
      "div",
      { class: "title" },
      make("h1", {}, textNodes(report.title)),
      make("p", {}, `${describeContents(byKind)} · made ${report.made} by cooper-jax ${report.version}`),
    ),
    links,
  ];
}

// Mark the link of the section that is at the top of the window.
function markCurrentLink(links, sections) {
  const mark = () => {
    let current = 0;
    sections.forEach((section, index) => {
      if (section.getBoundingClientRect().top < 120) current = index;
    });
    links.forEach((link, index) => {
      if (index === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    });
  };
  window.addEventListener("scroll", mark, { passive: true });
  mark(); // once the sections are in the page
}

function makeFooter(report) {
  return [
    make(
      "p",
      {},
      `Curves of more than ${report.rules.points.toLocaleString("en-US")} points are thinned out: ` +
        "neighbouring points become one, their mean at the last step among them.",
    ),
    make("p", {}, "This file is complete: it loads nothing from a network."),
  ];
}

function buildPage() {
  const report = JSON.parse(document.getElementById("data").textContent);
  assignColours(report.runs);
  const byKind = groupByKind(report.runs);
  const withCurves = [...byKind.training, ...byKind.reward_training];
  const withSamples = [...byKind.training, ...byKind.evaluation];
  const sections = [
    makeOverview(report, byKind),
    byKind.training.length ? makeCurves(byKind.training) : null,
    makeHacking(byKind.training, report.rules.drop),
    makeRewardTraining(byKind.reward_training),
    makeEvaluations(byKind.evaluation),
    makeSampleBrowser(withSamples, report.rules),
    makePhases(byKind.training),
    makeMetrics(withCurves),
    makeConfig(report),
    makeEnvironment(report.runs),
  ].filter(Boolean);
  const [title, links] = makeHeader(report, byKind, sections);
  document
    .getElementById("header")
    .replaceWith(
      make("header", { id: "header" }, title),
      make("nav", { class: "bar", "aria-label": "Sections" }, make("div", {}, links)),
    );
  document.getElementById("content").replaceChildren(...sections);
  markCurrentLink(links, sections);
  document.getElementById("footer").append(...makeFooter(report));
}

buildPage();
