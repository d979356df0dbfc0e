"""Size of reports, the time to make them, and the time to open them in headless Chromium.

    python tests/measure_report.py
    python tests/measure_report.py --keep=FOLDER     # keep the pages

The runs are made up, with the number of metrics of a run with `recipe=robust`, samples every 10 steps, 16 responses
to a prompt and 150 words in a response.  A page is open when all its charts are drawn; the median of five times.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

# Run as a file, so the checkout's root is not on the path yet.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report_runs
from playwright.sync_api import Browser, sync_playwright

from cooper_jax.report import page, report_data

# Runs and steps of each.
CASES = ((1, 100), (10, 500), (1, 2000), (10, 2000), (80, 500))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="a folder for the pages")
    parser.add_argument("--times", type=int, default=5, help="how often a page is opened")
    flags = parser.parse_args()

    print("runs  steps  files MB  page MB  make s  open s")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for runs, steps in CASES:
            measure_case(Path(folder), browser, runs, steps, flags)
        browser.close()


def measure_case(folder: Path, browser: Browser, runs: int, steps: int, flags: argparse.Namespace) -> None:
    """Make runs and a page of them, and print a row of the table."""
    shape = report_runs.RunShape(steps=steps, every=10, group=16, prompts=2, words=150)
    places = []
    for index in range(runs):
        place = folder / f"{runs}x{steps}" / f"run_{index}"
        places.append(report_runs.write_run(place, shape, seed=index, hacked=index % 2 == 0))
    files = sum(file.stat().st_size for place in places for file in place.glob("*.jsonl")) / 1e6

    began = time.perf_counter()
    report = report_data.collect_report([str(place) for place in places])
    content = page.write_page(report_data.encode_report(report))
    seconds = time.perf_counter() - began
    target = (flags.keep or folder) / f"report_{runs}x{steps}.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    shutil.rmtree(folder / f"{runs}x{steps}")

    opened = statistics.median(open_page(browser, target) for _ in range(flags.times))
    print(f"{runs:4}{steps:7}{files:10.1f}{len(content) / 1e6:9.1f}{seconds:8.1f}{opened:8.2f}", flush=True)


def open_page(browser: Browser, file: Path) -> float:
    """Open a page in a fresh context; returns the seconds until its charts are drawn."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    began = time.perf_counter()
    opened.goto(file.as_uri())
    opened.wait_for_function(
        """() => {
            const charts = document.querySelectorAll('figure.chart').length;
            return charts > 0 && document.querySelectorAll('figure.chart svg.plot').length >= charts;
        }"""
    )
    seconds = time.perf_counter() - began
    context.close()
    return seconds


if __name__ == "__main__":
    main()
