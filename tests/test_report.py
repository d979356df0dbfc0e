"""Reports on small recorded runs: what is read, what is left out by which rule, and how texts are embedded."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_runs
from report_runs import HOSTILE, RunShape, encode

from cooper_jax.report import curves, figures, hacking, page, report_data, samples, sources

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """A folder with two training runs, a study, a reward model's training and an evaluation."""
    folder = tmp_path_factory.mktemp("recorded")
    report_runs.write_run(folder / "hacked", text=HOSTILE)
    report_runs.write_run(folder / "sound", hacked=False, seed=1, policy__optimiser__lr=0.5)
    report_runs.write_study(folder / "study")
    report_runs.write_reward_training(folder / "verifyrm")
    report_runs.write_evaluation(folder / "eval")
    return folder


# --- what is found ------------------------------------------------------------------------------------------


def test_a_folder_is_recognised_by_its_files(recorded):
    found = sources.find_sources([str(recorded / name) for name in ("hacked", "study", "verifyrm", "eval")])
    assert [(s.kind, s.label, s.group) for s in found] == [
        ("training", "hacked", "hacked"),
        ("training", "rule, seed 3", "rule"),
        ("training", "rule, seed 4", "rule"),
        ("training", "frozen, seed 3", "frozen"),
        ("training", "frozen, seed 4", "frozen"),
        ("reward_training", "verifyrm", "verifyrm"),
        ("evaluation", "eval", "eval"),
    ]
    assert found[3].about == "reward: a frozen reward model"


def test_runs_of_one_name_are_told_apart(recorded, tmp_path):
    for parent in ("a", "b"):
        shutil.copytree(recorded / "sound", tmp_path / parent / "run")
        shutil.copytree(recorded / "study", tmp_path / parent / "study")
    runs = sources.find_sources([str(tmp_path / parent / "run") for parent in ("a", "b")])
    assert [(s.label, s.group) for s in runs] == [("a/run", "a/run"), ("b/run", "b/run")]
    runs = sources.find_sources([str(tmp_path / parent / "study") for parent in ("a", "b")])
    assert len({s.label for s in runs}) == 8 and runs[0].label == "a/study: rule, seed 3"
    assert list(dict.fromkeys(s.group for s in runs)) == [
        "a/study: rule", "a/study: frozen", "b/study: rule", "b/study: frozen"
    ]  # fmt: skip


def test_what_is_no_run_is_refused_in_one_line(recorded, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(recorded / "study" / "arms", tmp_path / "begun" / "arms")
    for places, message in (
        ([tmp_path / "nowhere"], "nowhere: there is no such folder"),
        ([recorded / "sound/metrics.jsonl"], "is a file: give the folder that it is in"),
        ([tmp_path / "empty"], "holds neither config.json .* nor arms/ .* nor items.jsonl"),
        ([tmp_path / "begun"], "no run of the study has begun yet"),
        ([recorded / "sound", recorded / "sound"], "sound is given twice"),
        (
            [recorded / "study", recorded / "study/seed_3/rule"],
            "rule is given twice: by itself, and as part of its study",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            sources.find_sources([str(place) for place in places])
        assert "\n" not in str(error.value)


# --- files that a job is writing, or that are damaged ---------------------------------------------------------


def test_a_torn_last_line_is_left_out_and_another_is_named(recorded, tmp_path):
    run = shutil.copytree(recorded / "sound", tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(run / name, "a") as file:
            file.write('{"step": 13, "rew')
    (whole,), (torn,) = encode(recorded / "sound")["runs"], encode(run)["runs"]
    assert torn["series"] == whole["series"] and torn["samples"] == whole["samples"]

    for name in ("metrics.jsonl", "samples.jsonl"):
        run = shutil.copytree(recorded / "sound", tmp_path / name)
        lines = (run / name).read_text().splitlines()
        (run / name).write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
        with pytest.raises(ValueError, match=rf"{name}, line 2 is not JSON"):
            encode(run)
        (run / name).write_text(lines[0] + "\n[1]\n")
        with pytest.raises(ValueError, match=rf"{name}, line 2 is not a JSON object"):
            encode(run)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "config.json is not a JSON object"),
        ("metrics.jsonl", '{"reward/mean": 1}\n', "metrics.jsonl, line 1 has no whole-numbered `step`"),
        ("samples.jsonl", '{"step": 1}\n', "samples.jsonl: a sample of step 1 has no field 'id'"),
    ],
)
def test_a_damaged_file_is_named(recorded, tmp_path, file, content, message):
    run = shutil.copytree(recorded / "sound", tmp_path / "run")
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(run)


def test_results_of_other_programs_are_refused(recorded, tmp_path):
    for name, file in (("verifyrm", "report.json"), ("eval", "results.json")):
        folder = shutil.copytree(recorded / name, tmp_path / name)
        (folder / file).write_text('{"groups": {}, "benchmarks": [{}]}')
        with pytest.raises(ValueError, match=f"{file} was not written by launch/"):
            encode(folder)


def test_a_run_before_its_first_step_has_no_report_alone(recorded, tmp_path):
    run = shutil.copytree(recorded / "sound", tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="run/metrics.jsonl: no step is logged yet"):
        encode(run)

    # Beside another run it is listed, with neither curves nor samples.
    (run / "samples.jsonl").unlink()
    (run / "environment.json").unlink()
    begun = encode(recorded / "sound", run)["runs"][1]
    assert begun["series"]["curves"] == {} and begun["samples"]["total"] == 0 and begun["environment"] == {}
    assert (
        begun["summary"]["done"] == 0 and begun["summary"]["accuracy_end"] is None and begun["onset"] is None
    )


# --- reward hacking -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accuracies, onset",
    [
        ([0.30, 0.40, 0.35, 0.34], 2),  # exactly 5 points below, then more
        ([0.30, 0.40, 0.351, 0.34, 0.33], 3),  # 4.9 points are not enough
        ([0.30, 0.40, 0.34, 0.40, 0.34, 0.36], None),  # never twice in a row
        ([0.40, 0.34], None),
        ([0.40, 0.34, None, 0.30], 1),  # an evaluation that measured nothing is none
        ([0.10, 0.20, 0.30], None),
        ([0.65, 0.60, 0.60], 1),
        ([], None),
    ],
)
def test_the_onset_is_the_first_of_two_low_evaluations(accuracies, onset):
    found = hacking.find_onset([(10 * i, value) for i, value in enumerate(accuracies)])
    assert found == (None if onset is None else 10 * onset)


def test_truth_is_the_oracle_or_a_users_judge():
    rule_alone = [{"step": 0, "eval/rule/accuracy": 0.5}]
    assert hacking.name_truth([{"eval/oracle/accuracy": 0.5}], {}) == "eval/oracle/accuracy"
    assert hacking.name_truth(rule_alone, {"rule": {"judge": "mine.py:judge"}}) == "eval/rule/accuracy"
    assert hacking.name_truth(rule_alone, {"rule": {"judge": ""}}) is None


def test_confusion_by_hand():
    row = {
        "step": 3, "rule/accuracy": 0.4, "rule/decidable": 0.9,
        "rm/false_positive_rate": 0.2, "rm/false_negative_rate": 0.25,
    }  # fmt: skip
    found = hacking.measure_confusion([{"step": 0}, row, row | {"step": 4, "rm/false_negative_rate": None}])
    # Of 100 responses 40 are correct and 50 wrong: 30 and 10 of those are accepted, 10 have no verdict.
    assert {name: points[0] for name, points in found.items()} == {
        "true_positive": (3, pytest.approx(0.3)),
        "false_negative": (3, pytest.approx(0.1)),
        "false_positive": (3, pytest.approx(0.1)),
        "true_negative": (3, pytest.approx(0.4)),
        "undecided": (3, pytest.approx(0.1)),
    }
    assert found["false_negative"][1] == (4, 0.0)
    assert hacking.measure_confusion([{"step": 1, "rule/accuracy": 0.4}]) == {}, "without a reward model"


def test_alarms_are_where_their_number_grows():
    counts = [None, 0.0, 0.0, 1.0, 1.0, 1.0, 3.0]
    rows = [{"step": step} | ({} if n is None else {"guard/alarms": n}) for step, n in enumerate(counts)]
    assert hacking.find_alarms(rows) == [3, 6] and hacking.find_alarms(rows[:3]) == []
    # A run that went back to step 2 after an alarm at step 7 has its first row with it at step 3.
    assert hacking.find_alarms([{"step": 2, "guard/alarms": 0.0}, {"step": 3, "guard/alarms": 1.0}]) == [3]

    rows = [
        {"step": 1, "guard/by_rule": 0.0},
        {"step": 2, "guard/by_rule": 1.0},
        {"step": 3, "guard/by_rule": 1.0},
    ]
    assert hacking.find_first_step(rows, "guard/by_rule") == 2
    assert hacking.find_first_step(rows, "guard/frozen") is None


@pytest.mark.slow
def test_a_report_and_its_figures_have_the_guards_alarms(recorded, tmp_path):
    run = shutil.copytree(recorded / "hacked", tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"guard/alarms": float(line["step"] >= 5), "guard/by_rule": float(line["step"] >= 6)}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    warned, silent = encode(run, recorded / "hacked")["runs"]
    assert warned["guard"] == {"action": "warn", "alarms": [5], "by_rule": 6, "frozen": None}
    assert silent["guard"]["alarms"] == []
    figures.write_figures(report_data.collect_report([str(run)]), tmp_path / "figures")
    assert (tmp_path / "figures/hacking.svg").read_text().count(">alarm<") == 1


def test_the_onset_of_recorded_runs(recorded):
    hacked, sound = encode(recorded / "hacked", recorded / "sound")["runs"]
    # Accuracy is 45 % at step 6, then 25 % and 5 %.
    assert hacked["onset"] == 8 and hacked["truth"] == "eval/oracle/accuracy" and sound["onset"] is None
    assert (
        hacked["summary"]["accuracy_best"] == pytest.approx(0.45)
        and hacked["summary"]["accuracy_best_at"] == 6
    )


# --- curves and samples are thinned out by their rules --------------------------------------------------------


def test_a_curve_is_thinned_out_to_means():
    points = [(step, float(step)) for step in range(1, 11)]
    assert curves.thin_out(points, 10) == points
    # Parts of 2, 3, 2 and 3 points.
    assert curves.thin_out(points, 4) == [(2, 1.5), (5, 4.0), (7, 6.5), (10, 9.0)]
    assert curves.thin_out([(1, None), (2, 4.0), (3, None), (4, None)], 2) == [(2, 4.0), (4, None)]


def test_the_limit_falls_with_the_number_of_curves():
    assert curves.choose_limit(1) == curves.choose_limit(450) == 1000
    assert curves.choose_limit(900) == 500 and curves.choose_limit(10**6) == 50


def test_curves_share_their_steps():
    rows = [
        {"step": 1, "a/x": 1.0, "a/y": None, "a/z": "inf"},
        {"step": 2, "a/x": 0.123456789, "a/y": 3},
        {"step": 3, "b": 1},
    ]
    found = curves.collect_curves(rows)
    assert found == {"a/x": [(1, 1.0), (2, 0.123456789)], "a/y": [(1, None), (2, 3.0)], "b": [(3, 1.0)]}
    assert curves.encode_curves(found, 100) == {
        "axes": [[1, 2], [3]],
        "curves": {"a/x": [0, [1, 0.12346]], "a/y": [0, [None, 3]], "b": [1, [1]]},
    }


@pytest.mark.parametrize(
    "sizes, budget, kept",
    [
        ([1] * 10, 10, list(range(10))),
        ([1] * 10, 9, [0, 1, 3, 5, 7, 9]),  # every second from the last, and the first
        ([1] * 10, 5, [0, 3, 6, 9]),
        ([1] * 10, 2, [0, 9]),
        ([1] * 10, 1, None),
        ([5], 5, [0]),
        ([5], 4, None),
        ([], 0, []),
    ],
)
def test_samples_are_chosen_evenly(sizes, budget, kept):
    assert samples.choose_evenly(sizes, budget) == kept


def test_samples_fill_their_share_and_no_more(tmp_path):
    run = report_runs.write_run(tmp_path / "run", RunShape(steps=40, every=1, words=60))
    size = (run / "samples.jsonl").stat().st_size
    everything = samples.choose_samples(run, 10 * size)
    assert (everything.shown, everything.total, everything.cut_at) == (40, 40, samples.LENGTHS[0])
    assert [s["step"] for s in everything.samples] == sorted(2 * list(range(1, 41)))

    some = samples.choose_samples(run, size // 4)
    steps = sorted({s["step"] for s in some.samples})
    assert steps[0] == 1 and steps[-1] == 40 and len(steps) == some.shown < 12
    assert len({b - a for a, b in zip(steps[1:], steps[2:], strict=False)}) == 1, "every n-th"
    assert samples._measure({"all": some.samples}) <= size // 4 + 100
    assert some == samples.choose_samples(run, size // 4), "the same every time"

    # If the first and the last step alone are too large, texts are cut.
    little = samples.choose_samples(run, 12_000)
    assert little.cut_at < samples.LENGTHS[0] and little.shown == 2
    texts = [response["text"] for sample in little.samples for response in sample["responses"]]
    assert all(len(text) < little.cut_at + 50 and "characters left out" in text for text in texts)
    assert samples.choose_samples(run, 10).shown == 1, "something is shown in any case"


def test_a_long_text_keeps_its_beginning_and_its_end():
    assert samples.cut_text("abc" * 10, 30) == "abc" * 10
    assert (
        samples.cut_text("a" * 50 + "b" * 1950, 100)
        == "a" * 50 + "\n[... 1,900 characters left out ...]\n" + "b" * 50
    )


def test_what_a_sample_shows(recorded):
    (run,) = encode(recorded / "hacked")["runs"]
    sample = run["samples"]["samples"][0]
    assert sample["question"] == "Question 0 of step 2?" and sample["prompt"] == "Solve: [0]\n"
    first = sample["responses"][0]
    assert (
        first["verdict"] == "correct" and first["truth"] is True and first["score"] == first["reward"] == 0.05
    )
    assert (
        sample["pairs"][0]["negative"].endswith("#### 999") and "positive_reference" not in sample["pairs"][0]
    )


def test_samples_of_earlier_runs_are_shown_without_what_they_lack(tmp_path):
    row = {
        "step": 1, "id": "x", "question": "q", "reference": "4",
        "responses": [{"text": "4", "truncated": False, "verdict": "correct", "reward": 1.0, "advantage": 0.5}],
        "pairs": [{"positive": "4", "positive_reference": "4", "negative": "4", "negative_reference": "5"}],
    }  # fmt: skip
    found = samples.describe_sample(row, 100, tmp_path)
    assert found["pairs"] == row["pairs"], "the references, because the members differ by them"
    assert found["responses"][0].keys() == {"text", "truncated", "verdict", "reward", "advantage"}


def test_items_of_all_kinds_of_evaluations(tmp_path):
    """Responses to one problem are together: its samples, or a completion under several attacks."""
    both = {
        "id": "1",
        "source": "math",
        "question": "q",
        "reference": "4",
        "completion": "It is 4.",
        "label": 1,
    }
    judged = both | {"judges": {
        "rule": {"score": 0.0, "yes": False, "abstained": True},
        "model": {"score": 0.81234, "yes": True, "abstained": False},
        "llm": {"score": 1.0, "yes": True, "abstained": False, "reply": "Yes."},
    }}  # fmt: skip
    attacked = [
        both
        | {"attack": name, "group": "q", "question": f"{name} q", "rewards": {"step 0": 0.1, "step 9": 0.9}}
        for name in ("none", "prefix")
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [judged]))
    (sample,) = samples.choose_items(tmp_path, 10**6).samples
    assert sample["about"] == "math" and sample["responses"] == [
        {
            "text": "It is 4.", "truth": True, "verdict": "unrecognised", "score": 0.8123,
            "judges": {"llm": "yes"}, "replies": {"llm": "Yes."},
        }
    ]  # fmt: skip
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in attacked))
    (sample,) = samples.choose_items(tmp_path, 10**6).samples
    assert [r["attack"] for r in sample["responses"]] == ["none", "prefix"]
    assert sample["responses"][0]["score"] == 0.1 and sample["responses"][0]["rewards"]["step 9"] == 0.9


# --- configuration, phases and other kinds ----------------------------------------------------------------------


def test_configs_are_compared_with_base(recorded):
    fields = {
        f["name"]: f for f in encode(recorded / "hacked", recorded / "sound", recorded / "eval")["config"]
    }
    rate = fields["policy.optimiser.lr"]
    assert rate["base"] == "1e-06" and rate["changed"] == {"0": "0.00015", "1": "0.5"} and rate["comment"]
    assert fields["policy.clip_low"]["changed"] == {}, "as in base"
    assert fields["benchmark.samples"]["changed"] == {"2": "2"} and "format" not in fields


def test_seconds_of_phases_are_summed(recorded):
    (run,) = encode(recorded / "sound")["runs"]
    phases = dict(run["phases"]["phases"])
    assert run["phases"]["step"] == 24 and phases["eval"] == 6
    assert {"step", "waiting", "tokens_per_second"}.isdisjoint(phases)
    assert list(phases.values()) == sorted(phases.values(), reverse=True)


def test_reward_trainings_and_evaluations(recorded):
    training, evaluation = encode(recorded / "verifyrm", recorded / "eval")["runs"]
    assert [name for name, _ in training["figures"]["groups"]] == ["gsm8k", "math", "all"]
    assert training["summary"]["accuracy"] == pytest.approx(0.92) and "samples" not in training
    assert evaluation["charts"][0]["bars"][0] == {
        "name": "gsm8k, by rule", "colour": "rule", "value": 0.5, "low": 0.25, "high": 0.75
    }  # fmt: skip
    assert evaluation["samples"]["total"] == 3 and len(evaluation["samples"]["samples"][0]["responses"]) == 2


def test_a_report_names_versions_and_the_title(recorded):
    data = encode(recorded / "sound", recorded / "study", title="Ours & <theirs>")
    assert data["title"] == "Ours & <theirs>" and data["version"]
    assert data["runs"][0]["environment"]["packages"]["jax"]
    assert encode(recorded / "sound", recorded / "study")["title"] == "sound, study"


# --- the page -----------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page: (name, attributes), and the text in each script and style."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.contents: list[tuple[str, str]] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in ("script", "style"):
            self.contents.append((self.inside, data))


def test_no_text_can_leave_the_data_block(recorded):
    data = encode(recorded / "hacked", title=HOSTILE)
    content = page.write_page(data)
    text = content.decode()
    assert text.count("<script") == text.count("</script>") == 2 and text.count("<style>") == 1
    assert "<img" not in text and "onerror='" not in text.replace(r"onerror='window.hacked = 2'\u003e", "")
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text), "JSON escapes control characters"

    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1]
    assert json.loads(block) == json.loads(json.dumps(data)), "nothing is lost by the escapes"
    assert HOSTILE in json.loads(block)["runs"][0]["samples"]["samples"][0]["responses"][0]["text"]


def test_the_page_loads_nothing_and_its_policy_forbids_it(recorded):
    elements = Elements(page.write_page(encode(recorded / "hacked")).decode())
    for tag, attributes in elements.found:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form")
        assert "src" not in attributes and attributes.get("href", "#").startswith("#")

    policy = next(a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
    assert [kind for kind, _ in elements.contents] == ["style", "script", "script"], "the second is the data"
    for kind, text in (elements.contents[0], elements.contents[2]):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert re.search(rf"{kind}-src '(sha256-\S+)'", policy)[1] == f"sha256-{digest}"
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy


def test_the_scripts_make_no_html_and_no_requests():
    files = {file.name for file in page.STATIC.iterdir()}
    assert files == {page.TEMPLATE, page.STYLE, *page.SCRIPTS}, "every file is part of the page"
    words = (
        "innerHTML outerHTML insertAdjacentHTML document.write eval( Function( fetch( XMLHttpRequest import("
    )
    words += " @import url("
    for name in (*page.SCRIPTS, page.STYLE):
        text = (page.STATIC / name).read_text()
        for word in (*words.split(), "</script", "</style"):
            assert word not in text, f"{name}: {word}"


# --- figures and the command ----------------------------------------------------------------------------------


def test_figures_for_papers(recorded, tmp_path):
    places = [recorded / name for name in ("hacked", "sound", "study", "verifyrm", "eval")]
    report = report_data.collect_report([str(place) for place in places])
    names = figures.write_figures(report, tmp_path / "figures")
    assert names == ["dynamics", "hacking", "phases", "reward_training", "evaluations"]
    written = {file.name: file.read_bytes() for file in (tmp_path / "figures").iterdir()}
    assert sorted(written) == sorted(f"{name}.{ending}" for name in names for ending in ("png", "svg"))
    assert all(content.startswith(b"\x89PNG") for name, content in written.items() if name.endswith("png"))
    hacking_svg = written["hacking.svg"].decode()
    assert hacking_svg.count(">onset<") == 3 and "frozen, seed 3" in hacking_svg, "the hacked runs"


@pytest.mark.slow
def test_the_same_run_gives_the_same_figures(recorded, tmp_path):
    """So that the repository of a paper shows changes of results alone."""
    report = report_data.collect_report([str(recorded / "sound")])
    contents = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        names = figures.write_figures(report, folder)
        contents.append([(folder / f"{name}.{x}").read_bytes() for name in names for x in ("png", "svg")])
    assert contents[0] == contents[1]


def test_means_and_moving_means_of_figures():
    assert figures.smooth([(1, 1.0), (2, None), (3, 3.0), (4, 5.0)], 2) == [
        (1, 1.0),
        (2, None),
        (3, 3.0),
        (4, 4.0),
    ]
    assert figures.average([[(1, 1.0), (2, 2.0), (3, None)], [(2, 4.0), (3, 3.0), (4, 1.0)]]) == [(2, 3.0)]


def launch(*words: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch/report.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


def test_the_command_writes_the_file_that_it_names(recorded, tmp_path):
    done = launch(
        str(recorded / "sound"), "--out=here/r.html", "--title=Mine", "--figures=f", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    size = (tmp_path / "here/r.html").stat().st_size / 1e6
    assert done.stdout.splitlines() == [
        f"{tmp_path}/here/r.html: 1 runs, {size:.1f} MB; open it in a browser",
        "f: dynamics, hacking, phases, each as .png and .svg",
    ]  # fmt: skip
    assert (
        "<title>Mine</title>" in (tmp_path / "here/r.html").read_text()
        and (tmp_path / "f/hacking.svg").exists()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        ([], "error: no RUN is given"),
        (["nowhere"], "error: report: nowhere: there is no such folder"),
        (["--fiures=x", "run"], "error: --fiures: there is no such flag; did you mean --figures?"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, words, message):
    done = launch(*words, folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, (
        done.stderr
    )
