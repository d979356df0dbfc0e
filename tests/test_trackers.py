"""Trackers: what they get, in which order, what a resumed run sends, and that none of them stops a run."""

import json
import re
import sys
import threading
import time
from pathlib import Path

import pytest

from cooper_jax.configs import base
from cooper_jax.runtime.metric_glossary import find_entry
from cooper_jax.runtime.metrics import read_lines
from cooper_jax.runtime.run_directory import RunDirectory
from cooper_jax.runtime.trackers import run_trackers, sample_tables, tracker_thread
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.loop_config import LogConfig

# Writes what it is given to calls.jsonl of the run directory.
RECORDER = """
import json
import time

class Recorder:
    def __init__(self, run):
        self.file = run.folder / "calls.jsonl"
        self.write("open", name=run.name, first=run.first_step, resumes=run.resumes, id=run.state.get("id"))
        run.state["id"] = "abc"

    def write(self, call, **fields):
        with open(self.file, "a") as file:
            file.write(json.dumps({"call": call, **fields}) + "\\n")

    def log(self, step, metrics):
        self.write("log", step=step, metrics=dict(metrics))

    def log_samples(self, step, samples):
        self.write("samples", step=step, samples=list(samples))

    def close(self):
        self.write("close")


class PhaseRecorder(Recorder):
    def log_phase(self, phase, step, figures):
        self.write("phase", phase=phase, step=step, figures=dict(figures))


class Raising(Recorder):
    def log(self, step, metrics):
        raise ConnectionError("no  route\\nto host")

    log_samples = log

    def close(self):
        raise SystemExit(3)


class NeverOpens(Raising):
    def __init__(self, run):
        raise OSError("no such server")


class Slow(Recorder):
    def log(self, step, metrics):
        time.sleep(0.1)
        super().log(step, metrics)


class FailsOnce(Recorder):
    has_failed = False

    def log(self, step, metrics):
        if not self.has_failed:
            self.has_failed = True
            raise TimeoutError
        super().log(step, metrics)


class RefusesStepTwo(Recorder):
    def log(self, step, metrics):
        if step == 2:
            raise ValueError("two")
        super().log(step, metrics)


def write(run, step, metrics):
    with open(run.folder / "function.jsonl", "a") as file:
        file.write(json.dumps([step, metrics["a/b"]]) + "\\n")


def of_other_arguments(step, loss):
    pass


class Incomplete:
    def log(self, step, metrics):
        pass


number = 3
"""


@pytest.fixture
def own(tmp_path) -> str:
    path = tmp_path / "own.py"
    path.write_text(RECORDER)
    return str(path)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(tracker_thread, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(tracker_thread, "OPEN_PAUSES", (0.0,))


def open_run(path: Path, trackers: str) -> RunDirectory:
    config = base.get_config()
    config.log.to = trackers
    return RunDirectory(path, config, resume=True)


def calls(path: Path, *kinds: str) -> list[dict]:
    found = read_lines(path / "calls.jsonl")
    return [call for call in found if not kinds or call["call"] in kinds]


def log_steps(path: Path, trackers: str, resumed: int | None, steps: range, before=lambda run: None) -> None:
    """Log some steps, with samples of the even ones, after a checkpoint of the step `resumed`."""
    with open_run(path, trackers) as run:
        before(run)
        run.truncate(resumed)
        for step in steps:
            run.log(step, {"a/b": step / 4})
            if step % 2 == 0:
                run.dump_samples(step, [{"id": step}])


# --- what they get ---------------------------------------------------------------------------------------


def test_a_class_and_a_function_get_all_rows(tmp_path, own):
    log_steps(tmp_path / "run", f"{own}:Recorder, {own}:write", None, range(1, 4))
    assert calls(tmp_path / "run") == [
        {"call": "open", "name": "run", "first": 0, "resumes": False, "id": None},
        {"call": "log", "step": 1, "metrics": {"a/b": 0.25}},
        {"call": "log", "step": 2, "metrics": {"a/b": 0.5}},
        {"call": "samples", "step": 2, "samples": [{"id": 2}]},
        {"call": "log", "step": 3, "metrics": {"a/b": 0.75}},
        {"call": "close"},
    ]
    assert read_lines(tmp_path / "run" / "function.jsonl") == [[1, 0.25], [2, 0.5], [3, 0.75]]


def test_a_resumed_run_sends_each_row_once(tmp_path, own):
    """Killed after step 3, resumed from the checkpoint of step 2: step 3 is there already."""
    log_steps(tmp_path / "run", f"{own}:Recorder", None, range(1, 4))
    log_steps(tmp_path / "run", f"{own}:Recorder", 2, range(3, 5))
    steps = [(call["call"], call["step"]) for call in calls(tmp_path / "run", "log", "samples")]
    assert steps == [("log", 1), ("log", 2), ("samples", 2), ("log", 3), ("log", 4), ("samples", 4)]
    again = calls(tmp_path / "run", "open")[1]
    assert again == {"call": "open", "name": "run", "first": 4, "resumes": True, "id": "abc"}


def test_a_run_that_goes_back_begins_a_new_run(tmp_path, own):
    """Its rows after the checkpoint may differ: an assistant over HTTP need not reply as before."""
    folder = tmp_path / "run"
    log_steps(folder, f"{own}:Recorder", None, range(1, 4))
    (folder / "calls.jsonl").unlink()
    log_steps(folder, f"{own}:Recorder", 2, range(3, 5), before=lambda run: run.keep_copies("before"))
    assert calls(folder, "open")[0] == {
        "call": "open",
        "name": "run",
        "first": 0,
        "resumes": False,
        "id": None,
    }
    steps = [(call["call"], call["step"]) for call in calls(folder, "log", "samples")]
    assert steps == [("log", 1), ("log", 2), ("samples", 2), ("log", 3), ("log", 4), ("samples", 4)]
    assert json.loads((folder / "trackers.before.json").read_text())["own.py:Recorder"]["metrics"] == 3


def test_rows_that_still_wait_when_a_run_goes_back_are_of_the_old_run(tmp_path, own):
    """The guard takes a run back while its trackers are open; a slow one has not taken all rows by then."""
    folder = tmp_path / "run"
    with open_run(folder, f"{own}:Slow") as run:
        run.truncate(None)
        for step in range(1, 5):
            run.log(step, {"a/b": step / 4})
        run.keep_copies("before")
        (folder / "calls.jsonl").rename(folder / "old_calls.jsonl")
        run.truncate(2)
        for step in range(3, 6):
            run.log(step, {"a/b": step / 4})
    old = [call["step"] for call in read_lines(folder / "old_calls.jsonl") if call["call"] == "log"]
    assert old == [1, 2, 3, 4]
    assert calls(folder, "open")[0]["resumes"] is False
    assert [call["step"] for call in calls(folder, "log")] == [1, 2, 3, 4, 5]


def test_a_tracker_that_is_named_later_gets_the_rows_before(tmp_path, own):
    log_steps(tmp_path / "run", "", None, range(1, 4))
    log_steps(tmp_path / "run", f"{own}:Recorder", 2, range(3, 4))
    found = [(call["call"], call.get("step")) for call in calls(tmp_path / "run")]
    assert found == [("open", None), ("log", 1), ("log", 2), ("samples", 2), ("log", 3), ("close", None)]


def test_rows_that_a_tracker_lost_are_sent_at_the_next_start(tmp_path, own):
    """What it has taken is known by its entry, whatever the reason for which it lacks the rest."""
    log_steps(tmp_path / "run", f"{own}:Recorder", None, range(1, 5))
    state = tmp_path / "run" / run_trackers.STATE_FILE
    stored = json.loads(state.read_text())
    assert stored == {"own.py:Recorder": {"metrics": 4, "samples": 4, "phases": 0, "state": {"id": "abc"}}}
    stored["own.py:Recorder"] |= {"metrics": 2, "samples": -1}
    state.write_text(json.dumps(stored))
    (tmp_path / "run" / "calls.jsonl").unlink()
    log_steps(tmp_path / "run", f"{own}:Recorder", 4, range(5, 6))
    found = [(call["call"], call["step"]) for call in calls(tmp_path / "run", "log", "samples")]
    assert found == [("samples", 2), ("log", 3), ("log", 4), ("samples", 4), ("log", 5)]


def test_phases_before_step_1(tmp_path, own):
    """A class that takes them gets them once, also if it is named after they ended."""
    for trackers, steps in ((f"{own}:Recorder,{own}:write", (0, 1)), (f"{own}:PhaseRecorder", (2,))):
        with open_run(tmp_path / "run", trackers) as run:
            run.truncate(None if 0 in steps else 1)
            if 0 in steps:
                run.log_phase("policy", 1, {"loss": 2})
                run.log_phase("policy", 2, {"loss": 1})
            for step in steps:
                run.log(step, {"a/b": step})
    found = calls(tmp_path / "run")
    assert [call["step"] for call in found if call["call"] == "phase"] == [1, 2]
    assert found[-6:] == [
        {"call": "phase", "phase": "policy", "step": 1, "figures": {"loss": 2.0}},
        {"call": "phase", "phase": "policy", "step": 2, "figures": {"loss": 1.0}},
        *({"call": "log", "step": step, "metrics": {"a/b": float(step)}} for step in range(3)),
        {"call": "close"},
    ]
    log_steps(tmp_path / "run", f"{own}:PhaseRecorder", 2, range(3, 4))
    assert len(calls(tmp_path / "run", "phase")) == 2


def test_a_run_that_begins_again_is_a_new_run(tmp_path, own):
    for _ in range(2):
        log_steps(tmp_path / "run", f"{own}:Recorder", None, range(1, 2))
    assert [call["id"] for call in calls(tmp_path / "run", "open")] == [None, None]
    assert [call["step"] for call in calls(tmp_path / "run", "log")] == [1, 1]


EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "accuracy_tracker.py"


def test_the_example(tmp_path):
    page = (EXAMPLE.parents[1] / "docs" / "trackers.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        # The page leaves out what the repository's own conventions ask for.
        lines = [line for line in block.splitlines() if line.strip()]
        assert all(line in EXAMPLE.read_text() for line in lines), block

    with open_run(tmp_path / "run", f"{EXAMPLE}:write,{EXAMPLE}:Notebook") as run:
        run.truncate(None)
        run.log(0, {"eval/rule/accuracy": 0.25})
        run.log(1, {"reward/mean": 0.5})
        run.dump_samples(1, [{"question": "1 + 1?", "responses": [{"text": "2"}, {"text": "3"}]}])
    assert (tmp_path / "run" / "accuracy.csv").read_text() == "0,0.25\n"
    notes = "step 0: reward nan\nstep 1: reward 0.500\n  1 + 1? -> 2\n"
    assert (tmp_path / "run" / "notes.txt").read_text() == notes


def test_samples_as_tables_and_as_text():
    samples = [
        {
            "id": "p1",
            "question": "1 + 1?",
            "prompt": "User: 1 + 1?",
            "reference": "2",
            "responses": [
                {"text": "two\n# 2", "verdict": "correct", "reward": 0.5, "rewards": {"length": 0.25}},
                {"text": "3", "verdict": "wrong", "reward": 0.125, "truth": False},
            ],
            "pairs": [
                {"positive": "2", "positive_reference": "2", "negative": "4", "negative_reference": "2"}
            ],
        }
    ]
    problem = {"step": 7, "id": "p1", "question": "1 + 1?", "prompt": "User: 1 + 1?", "reference": "2"}
    tables = sample_tables.make_tables(7, samples)
    assert tables["samples/responses"] == [
        {**problem, "text": "two\n# 2", "verdict": "correct", "reward": 0.5, "rewards/length": 0.25},
        {**problem, "text": "3", "verdict": "wrong", "reward": 0.125, "truth": False},
    ]
    assert tables["samples/pairs"] == [
        {"step": 7, "id": "p1", "question": "1 + 1?", "positive": "2", "positive_reference": "2"}
        | {"negative": "4", "negative_reference": "2"}
    ]
    columns = ["step", "id", "question", "prompt", "reference", "text", "verdict", "reward"]
    assert sample_tables.list_columns(tables["samples/responses"]) == [*columns, "rewards/length", "truth"]
    text = sample_tables.format_samples(7, samples)
    # A line that Markdown would make a heading stays in its block.
    assert "    two\n    # 2\n" in text and "verdict correct, reward 0.5" in text and "problem p1" in text
    assert "samples/pairs" not in sample_tables.make_tables(7, [{**samples[0], "pairs": []}])


# --- failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, first",
    [
        ("Raising", "failed at step 1: ConnectionError: no route to host"),
        ("NeverOpens", "cannot be opened: OSError"),
    ],
)
def test_a_tracker_that_raises_in_every_method_stops_nothing(tmp_path, own, capsys, name, first):
    log_steps(tmp_path / "run", f"{own}:{name},{own}:write", None, range(1, 9))
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [step for step, _ in read_lines(tmp_path / "run" / "function.jsonl")] == list(range(1, 9))
    said = capsys.readouterr().out
    assert said.count(f"own.py:{name} {first}") == 1, said
    assert said.count(f"own.py:{name} is off until the next start of the run") == 1
    assert f"own.py:{name}: " in said.splitlines()[-1] and "has all rows" in said.splitlines()[-1]
    assert "own.py:write" not in said


def test_failures_are_a_metric(tmp_path, own):
    with open_run(tmp_path / "run", f"{own}:Raising") as run:
        run.truncate(None)
        run.log(1, {"a/b": 1})
        thread = next(t for t in threading.enumerate() if t.name == "tracker own.py:Raising")
        for step in range(2, 4):
            run.log(step, {"a/b": step})
        thread.join()  # three rows in a row failed, and so did `close`
        run.log(4, {"a/b": 4})
        run.log(5, {"a/b": 5})
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-2:]
    assert find_entry("trackers/failures") == "trackers/failures"
    assert [row["trackers/failures"] for row in last] == [
        4.0,
        5.0,
    ]  # a row that it does not get counts as well


def test_a_failing_call_is_repeated(tmp_path, own, capsys):
    log_steps(tmp_path / "run", f"{own}:FailsOnce", None, range(1, 3))
    assert [call["step"] for call in calls(tmp_path / "run", "log")] == [1, 2]
    assert capsys.readouterr().out == ""
    assert "trackers/failures" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_row_that_is_refused_is_left_out(tmp_path, own, capsys):
    log_steps(tmp_path / "run", f"{own}:RefusesStepTwo", None, range(1, 5))
    assert [call["step"] for call in calls(tmp_path / "run", "log")] == [1, 3, 4]
    said = capsys.readouterr().out
    assert "own.py:RefusesStepTwo failed at step 2: ValueError: two" in said and ": 1 calls failed" in said
    assert "is off" not in said


class Blocked:
    """A tracker that hangs until it is released."""

    def __init__(self):
        self.begun, self.release = threading.Event(), threading.Event()
        self.steps = []

    def log(self, step, metrics):
        self.begun.set()
        self.release.wait()
        self.steps.append(step)

    def log_samples(self, step, samples):
        pass

    def close(self):
        pass


def test_a_tracker_that_hangs_is_left_behind(monkeypatch):
    monkeypatch.setattr(tracker_thread, "WAITING_ROWS", 2)
    tracker = Blocked()
    thread = tracker_thread.TrackerThread("slow", lambda: tracker)
    thread.put(tracker_thread.Row(1, metrics={}))
    tracker.begun.wait()
    for step in range(2, 6):  # two of these rows wait, two are left out
        thread.put(tracker_thread.Row(step, metrics={}))
    assert thread.failures == 2
    assert thread.take_messages() == [
        "slow 2 rows wait for it, so the next ones are left out; the run continues, and failures are counted"
    ]
    thread.begin_close()
    thread.wait(deadline=0.0)
    assert thread.take_messages() == ["slow has not ended and is left behind; 2 rows wait for it"]
    tracker.release.set()
    thread.wait(deadline=time.monotonic() + 600)
    assert tracker.steps == [1, 2, 3]


# --- settings --------------------------------------------------------------------------------------------


def test_unknown_names_are_named():
    section = base.get_config().log
    section.to = "wandbb, tensorboard, tensorboard"
    with pytest.raises(SetupError) as caught:
        LogConfig.from_config(section)
    assert caught.value.messages == (
        "log.to='wandbb': it is one of tensorboard, wandb, trackio, mlflow, or PATH.py:NAME, a class or function "
        "of your own",
        "log.to: tensorboard occurs twice",
    )


@pytest.mark.parametrize("library", ["wandb", "trackio", "mlflow"])
def test_a_missing_library_is_named_before_anything_is_written(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        SetupError,
        match=rf"^log.to={library}: {library} is not installed: pip install 'cooper-jax\[{library}\]'$",
    ):
        open_run(tmp_path / "run", f"tensorboard,{library}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, message",
    [
        (
            "Incomplete",
            r"the class has no log_samples, close; a tracker has the methods log\(step, metrics\)",
        ),
        ("of_other_arguments", "it takes loss, but a function is given run, step and metrics"),
        ("number", "it is int, which cannot be called"),
        ("missing", "has no 'missing'"),
    ],
)
def test_code_that_is_no_tracker(tmp_path, own, name, message):
    with pytest.raises(SetupError, match=message):
        open_run(tmp_path / "run", f"{own}:{name}")


def test_two_trackers_of_one_name(tmp_path, own):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "own.py").write_text(RECORDER)
    with pytest.raises(SetupError, match="two trackers are called own.py:write: rename one"):
        open_run(tmp_path / "run", f"{own}:write,{tmp_path}/other/own.py:write")


@pytest.mark.parametrize("text", ["{", "[]", '{"wandb": {"metrics": "3"}}', '{"wandb": {"step": 3}}'])
def test_a_malformed_state(tmp_path, own, text):
    log_steps(tmp_path / "run", f"{own}:Recorder", None, range(1, 2))
    (tmp_path / "run" / run_trackers.STATE_FILE).write_text(text)
    with pytest.raises(ValueError, match="trackers.json is malformed .*: delete it, and the trackers begin"):
        log_steps(tmp_path / "run", f"{own}:Recorder", 1, range(2, 3))
