"""A report in headless Chromium: what is on the page, what its controls do, and that no request leaves it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import report_runs
import tiny_runs
from report_runs import HOSTILE

from cooper_jax.report import page, report_data

pytestmark = pytest.mark.browser

# A desktop and a phone, light and dark.
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        # Continuous integration runs as root, where Chromium's sandbox does not start.
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """A report on everything, and one on a run with hostile texts."""
    folder = tmp_path_factory.mktemp("reports")
    places = [
        report_runs.write_study(folder / "study"),
        report_runs.write_reward_training(folder / "verifyrm"),
        report_runs.write_evaluation(folder / "eval"),
    ]
    hostile = report_runs.write_run(folder / "hostile", text=HOSTILE)
    written = {}
    for name, chosen, title in (("all", places, "All"), ("hostile", [hostile], HOSTILE)):
        report = report_data.collect_report([str(place) for place in chosen], title)
        written[name] = folder / f"{name}.html"
        written[name].write_bytes(page.write_page(report_data.encode_report(report)))
    return written


class OpenedPage:
    """A page with everything that it said and asked for while it was open."""

    def __init__(self, browser, file: Path, width: str = "desktop", scheme: str = "light"):
        self.context = browser.new_context(
            viewport=dict(zip(("width", "height"), WIDTHS[width], strict=True)), color_scheme=scheme
        )
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("svg.plot")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_everything_is_there_and_nothing_is_asked_for(browser, reports, width, scheme):
    with OpenedPage(browser, reports["all"], width, scheme) as opened:
        shown = opened.page
        assert shown.locator("h1").inner_text() == "All"
        assert shown.locator("h2").all_inner_texts() == [
            "Overview", "Curves", "Reward hacking", "Reward-model training", "Evaluations", "Samples", "Phases",
            "All metrics", "Configuration", "Environment",
        ]  # fmt: skip
        for section, charts in (
            ("curves", 10),
            ("hacking", 2),
            ("reward-training", 6),
            ("evaluations", 1),
            ("phases", 2),
        ):
            assert shown.locator(f"#{section} svg.plot").count() == charts, section
        assert shown.locator("#overview tbody tr").count() == 6
        assert "onset" in shown.locator("#hacking svg.plot").first.inner_html()

        # Scrolled to its end, the page is not wider than the window: wide tables scroll by themselves.
        shown.mouse.wheel(0, 100_000)
        wide = shown.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0
        # Every image, button and field has a name for a screen reader.
        unnamed = shown.evaluate(
            """[...document.querySelectorAll('svg[role=img], button, select, input')].filter((e) =>
                ![e.ariaLabel, e.textContent, e.closest('label')?.textContent].some((x) => x?.trim())).length"""
        )
        assert unnamed == 0
        assert opened.said == [] and opened.requests == [reports["all"].as_uri()]


def test_text_has_enough_contrast(browser, reports):
    """The inks on the grounds that they are printed on, by the formula of WCAG 2: at least 4.5 to 1."""
    pairs = [(ink, ground) for ink in ("ink", "soft", "accent") for ground in ("surface", "sunken", "ground")]
    pairs += [(kind, f"{kind}-ground") for kind in ("good", "bad", "unsure")]

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in ("light", "dark"):
        with OpenedPage(browser, reports["all"], scheme=scheme) as opened:
            for names in pairs:
                read = "(name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()"
                low, high = sorted(luminance(opened.page.evaluate(read, name)) for name in names)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, names)


def test_hostile_texts_are_shown_as_they_are(browser, reports):
    with OpenedPage(browser, reports["hostile"]) as opened:
        shown = opened.page
        assert shown.evaluate("window.hacked") is None
        assert shown.locator("img").count() == 0 and shown.locator("body").is_visible()
        text = shown.locator("#samples .response .text").first.inner_text()
        assert (
            "</script><script>window.hacked = 1</script><img src=x" in text and "&lt;b&gt; {{script}}" in text
        )
        # Invisible characters, and those that reverse the text behind them, are shown by their numbers.
        for code in ("U+0000", "U+0007", "U+001B", "U+202E", "U+202C"):
            assert code in text
        assert "مرحبا بالعالم" in text and "U+202E" in shown.locator("h1").inner_text()
        for place in ("title", "header", "main"):
            assert "\u202e" not in shown.locator(place).first.inner_html()
        assert (
            shown.locator("#samples .text").first.evaluate("(e) => getComputedStyle(e).unicodeBidi")
            == "plaintext"
        )
        assert opened.said == [] and opened.requests == [reports["hostile"].as_uri()]


def test_the_policy_blocks_what_a_text_could_ask_for(browser, reports):
    """If HTML got into the page after all, it could neither run nor load anything."""
    with OpenedPage(browser, reports["hostile"]) as opened:
        blocked = opened.page.evaluate(
            """async () => {
                const seen = [];
                document.addEventListener('securitypolicyviolation', (e) => seen.push(e.effectiveDirective));
                const add = (html) => document.body.append(document.createRange().createContextualFragment(html));
                add('<img src="http://127.0.0.1:9/a.png">');
                add('<script>window.hacked = 3</script>');
                add('<link rel="stylesheet" href="http://127.0.0.1:9/a.css">');
                await fetch('http://127.0.0.1:9/').catch(() => {});
                await new Promise((done) => setTimeout(done, 200));
                return seen.sort();
            }"""
        )
        assert blocked == ["connect-src", "img-src", "script-src-elem", "style-src-elem"]
        assert opened.page.evaluate("window.hacked") is None


def test_samples_are_filtered(browser, reports):
    with OpenedPage(browser, reports["all"]) as opened:
        shown = opened.page
        samples = shown.locator("#samples")
        status = samples.locator("[role=status]")
        assert status.inner_text() == "48 responses to 12 prompts"

        samples.get_by_label("wrong (12)").check()
        assert status.inner_text() == "12 responses to 12 prompts"
        badges = samples.locator(".response .badge", has_text="rule:").all_inner_texts()
        assert set(badges) == {"rule: wrong"}
        samples.get_by_label("wrong (12)").uncheck()

        # Scores rise with the responses' numbers: of the first prompt those of the second half are accepted.
        samples.get_by_label("Disagreement").select_option("rm")
        found = samples.locator(".response")
        assert 0 < found.count() == samples.locator(".badge", has_text="disagree").count()
        samples.get_by_label("Disagreement").select_option("")

        samples.get_by_label("Contains").fill("of step 6?")
        assert status.inner_text() == "8 responses to 2 prompts"
        samples.get_by_label("Contains").fill("no such text")
        assert status.inner_text() == "0 responses to 0 prompts"
        samples.get_by_label("Contains").fill("")
        samples.get_by_label("Step").select_option("4")
        assert status.inner_text() == "8 responses to 2 prompts"

        samples.get_by_label("Run").select_option(label="eval")
        assert status.inner_text() == "6 responses to 3 prompts"
        assert opened.said == []


def test_a_pairs_difference_is_marked(browser, reports):
    with OpenedPage(browser, reports["all"]) as opened:
        pair = opened.page.locator("#samples .pair").first
        # The members differ in their answers alone.
        assert pair.locator("ins").all_inner_texts() == ["20"] and pair.locator("del").all_inner_texts() == [
            "999"
        ]
        texts = pair.locator(".text").all_inner_texts()
        assert texts[0].replace("#### 20", "#### 999") == texts[1]


def test_groups_are_hidden_and_a_run_is_chosen(browser, reports):
    with OpenedPage(browser, reports["all"]) as opened:
        shown = opened.page
        lines = shown.locator("#curves svg.plot").first.locator("path.line")
        assert lines.count() == 6, "two seeds and their mean, of two arms"
        chip = shown.locator("#curves .chip", has_text="rule")
        chip.click()
        assert chip.get_attribute("aria-pressed") == "false"
        other = shown.locator("#metrics .chip", has_text="rule")
        assert other.get_attribute("aria-pressed") == "false", "the legends of all sections agree"
        shown.wait_for_function(
            "document.querySelectorAll('#curves svg.plot')[0].querySelectorAll('path.line').length === 3"
        )

        # The hacked run is shown first; another has no onset.
        assert "Hacked from step 8" in shown.locator("#hacking .note").inner_text()
        shown.locator("#hacking").get_by_label("Run").select_option("0")
        assert "No onset" in shown.locator("#hacking .note").inner_text()

        # Values under the pointer, and by the keyboard.
        chart = shown.locator("#curves svg.plot").nth(1)
        chart.focus()
        chart.press("End")
        tip = shown.locator("#curves .tip").nth(1)
        assert tip.is_visible() and "step 12" in tip.inner_text() and "frozen, mean" in tip.inner_text()
        chart.press("ArrowLeft")
        assert "step 10" in tip.inner_text()

        shown.locator("#config").get_by_label("Contains").fill("policy.arch.width")
        assert shown.locator("#config tbody tr").count() == 1
        assert opened.said == []


# --- real and long runs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_of_a_run_opens_on_a_desktop_and_a_phone(browser, tmp_path):
    """The two commands of docs/quick_start.md, with a smaller run."""
    done = tiny_runs.run(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "report.html"
    command = [
        sys.executable,
        str(tiny_runs.ROOT / "launch/report.py"),
        str(tmp_path / "run"),
        f"--out={file}",
    ]
    written = subprocess.run(command, env=tiny_runs.environment(), capture_output=True, text=True)
    assert written.returncode == 0, written.stderr
    for width in WIDTHS:
        with OpenedPage(browser, file, width) as opened:
            shown = opened.page
            assert shown.locator("svg.plot").count() > 5 and shown.locator("#samples .response").count() > 0
            root = "document.documentElement"
            assert shown.evaluate(f"{root}.scrollWidth <= {root}.clientWidth"), "nothing lies beside the page"
            assert opened.said == [] and all(url.startswith("file:") for url in opened.requests)


@pytest.mark.slow
@pytest.mark.parametrize("runs, steps", [(10, 500), (1, 2000)])
def test_pages_of_long_runs_are_below_10_mb(tmp_path, runs, steps):
    """The sizes of tests/measure_report.py."""
    shape = report_runs.RunShape(steps=steps, every=10, group=16, prompts=2, words=150)
    places = [str(report_runs.write_run(tmp_path / f"run_{i}", shape, seed=i)) for i in range(runs)]
    content = page.write_page(report_data.encode_report(report_data.collect_report(places)))
    assert 2e6 < len(content) < 10e6
