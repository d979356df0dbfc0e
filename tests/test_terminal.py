"""What a user sees of a run: on a terminal of tmux, and in a log file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import terminal_recording
import tiny_runs

# Runs of minutes.
pytestmark = pytest.mark.slow

# Setup stages in their order.
STAGES = (
    "loading the libraries",
    "finding the devices",
    "reading the problems",
    "comparing held-out problems with training questions",
    "starting the rule verifier",
    "loading the policy",
    "loading the reward model",
    "encoding the problems",
    "waiting for the rule verifier",
    "starting the assistant",
    "opening the run directory",
    "supervised training of the policy",
    "supervised training of the reward model",
    "saving the policy as the reference",
    "warm-up of the reward model on rollouts",
    "evaluation on 8 held-out problems",
    "saving step 0",
)
# Phases of the first step in the order of their beginning.
PHASES = (
    "step 1: rollout (1 of 5)",
    "step 1: scores of the reward model (2 of 5)",
    "step 1: log-probabilities",
    "step 1: rewards (2 of 5)",
    "step 1: policy update (3 of 5)",
    "step 1: verdicts of the rule verifier",
    "step 1: pairs for the reward model (4 of 5)",
    "step 1: reward model update (5 of 5)",
)
# Settings with which a run has all of them.
WARM_UP = {"reward__warmup_updates": 1}
HEADER = "step  held-out    reward  false pos."


def assert_in_order(lines, parts) -> None:
    """Check that a line begins with each part, in this order."""
    position = 0
    for part in parts:
        found = [i for i in range(position, len(lines)) if lines[i].strip().startswith(part)]
        assert found, f"no line with {part!r} after line {position} of\n" + "\n".join(lines)
        position = found[0] + 1


def test_a_log_has_a_line_for_each_stage_phase_step_and_evaluation(tmp_path):
    done = tiny_runs.run(tmp_path / "run", **WARM_UP)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "loading the libraries ..." and "\x1b" not in done.stdout
    assert_in_order(lines, [f"{part} ..." for part in (*STAGES, *PHASES)])
    assert_in_order(lines, [HEADER, "0 ", "step 1/4 ", "a response of step 1", "step 2/4 ", "2 ", "4 "])
    assert_in_order(lines, [f"{tmp_path / 'run'}: 4 steps complete", "held-out accuracy", "files", "next"])

    # The same command again has nothing to do; a step more resumes, and with --quiet says little.
    command = [*tiny_runs.command(tmp_path / "run", steps=5, **WARM_UP), "--quiet"]
    again = subprocess.run(command, env=tiny_runs.environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    lines = again.stdout.splitlines()
    assert_in_order(lines, [HEADER, "4 ", "5 ", f"{tmp_path / 'run'}: 5 steps complete"])
    assert not any(line.startswith(("step 5", "loading", "resumed", "a response")) for line in lines)


def test_a_stopped_run_says_how_to_resume(tmp_path):
    out = tmp_path / "said"
    with open(out, "wb") as file:
        process = subprocess.Popen(
            tiny_runs.command(tmp_path / "run", steps=500, checkpoint__every=100, eval__every=0),
            env=tiny_runs.environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 600
    while "step 2/500" not in out.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75, out.read_text()
    last = out.read_text().splitlines()[-1]
    assert last.startswith("stopped by a signal; step ") and "is saved; to resume: python " in last
    assert f"--config.run_dir={tmp_path / 'run'}" in last


@pytest.mark.skipif(not terminal_recording.is_available(), reason="tmux is not installed")
def test_a_terminal_shows_each_phase_as_it_begins(tmp_path):
    run = tmp_path / "run"
    recording = terminal_recording.record_terminal(
        tiny_runs.command(run, **WARM_UP), tmp_path, tiny_runs.environment() | {"NO_COLOR": "1"}
    )
    shown = [frame.last_line for frame in recording.frames]
    # Phases of milliseconds may begin and end between two looks at the screen.
    long = ("loading the libraries", "supervised training of the policy", "step 1: policy update (3 of 5)")
    assert_in_order(shown, long)
    assert any(", compiling " in line for line in shown), "a program that compiles is named"
    assert any(", 100/250  loss " in line or "/250  loss " in line for line in shown)

    # What stays: each stage and phase with its seconds, in the order of their end; no step but by its row.
    lines = recording.text.splitlines()
    assert_in_order(lines, [f"{part}  " for part in (*STAGES, *PHASES)])
    assert_in_order(lines, [HEADER, "0 ", "a response of step 1", "2 ", "4 "])
    assert_in_order(lines, [f"{run}: 4 steps complete", "held-out accuracy", "files", "next"])
    assert not any(line.startswith("step 2/4") for line in lines)
    # The live line is gone.
    assert lines[-1].strip().startswith("python launch/evaluate.py")
    assert recording.text.count("loading the libraries") == 1


def test_an_error_of_the_setup_leaves_a_clean_terminal(tmp_path):
    if not terminal_recording.is_available():
        pytest.skip("tmux is not installed")
    command = [sys.executable, str(tiny_runs.ROOT / "launch/train.py"), "--config=tiny"]
    recording = terminal_recording.record_terminal(
        [*command, "--config.eval.problems=0"], tmp_path, os.environ
    )
    assert recording.text.splitlines()[-1].startswith("error: eval.problems=0")
