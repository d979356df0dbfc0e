"""What a training run shows of its steps, and what it says at its end."""

from __future__ import annotations

import io
import math
import sys
from collections import Counter

import numpy as np
import pytest

from cooper_jax.configs import tiny
from cooper_jax.runtime.console import Console
from cooper_jax.runtime.metrics import PhaseTimer
from cooper_jax.trainer import closing_summary
from cooper_jax.trainer.run_display import RunDisplay, describe_sample
from cooper_jax.trainer.samples import StepRecord
from cooper_jax.trainer.setup import read_settings
from cooper_jax.types import Completion, Problem, Verdict


def decode_tokens(tokens):
    return "prompt of " + " ".join(map(str, tokens))


def make_settings(**changes):
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict({"steps": 4, "log.show_samples": 0} | changes)
    return read_settings(cfg)


def make_record(text="so 4"):
    return StepRecord(
        problems=[Problem("2 + 2 ?", "4")],
        completions=[Completion(text, tokens=4, truncated=True), Completion("5", tokens=1)],
        verdicts=[Verdict.CORRECT, Verdict.WRONG],
        rewards=np.array([0.75, 0.25], np.float32),
        advantages=np.array([1, -1], np.float32),
        pairs=[],
        refused=Counter(),
        prompt_tokens=[[1, 2]],
    )


@pytest.fixture
def console():
    return Console(io.StringIO())


def said(console) -> list[str]:
    return console._out.getvalue().splitlines()


def test_phases_of_the_first_step_are_named_once_as_they_begin(console):
    display = RunDisplay(make_settings(), [], 0, decode_tokens, console)
    phases = PhaseTimer(observer=display)
    for step in (1, 2):
        with phases.in_step(step):
            for name in ("rollout", "rule", "score", "rule", "policy"):
                with phases.phase(name):
                    pass
            # The step before is completed within the next.
            if step == 2:
                with phases.in_step(1), phases.phase("reward"):
                    pass
    assert said(console) == [
        "step 1: rollout (1 of 5) ...",
        "step 1: verdicts of the rule verifier ...",
        "step 1: scores of the reward model (2 of 5) ...",
        "step 1: policy update (3 of 5) ...",
        "step 1: reward model update (5 of 5) ...",
    ]


def test_arms_that_update_no_reward_model_have_three_points(console):
    display = RunDisplay(make_settings(**{"reward.arm": "rule"}), [], 7, decode_tokens, console)
    with display.open_phase(8, "rollout"):
        pass
    assert said(console) == ["step 8: rollout (1 of 3) ..."]


def test_evaluations_are_rows_under_one_header(console):
    start = {
        "step": 0.0,
        "eval/oracle/accuracy": 0.25,
        "eval/rule/accuracy": 0.125,
        "eval/rm/false_positive_rate": math.nan,
        "eval/response/tokens_mean": 17.25,
        "time/eval": 5.0,
    }
    display = RunDisplay(make_settings(), [start], 0, decode_tokens, console)
    display.show_step(1, {"reward/mean": 0.5, "policy/kl": 0.001}, make_record())
    display.show_step(2, {"reward/mean": 0.75, "policy/kl": 0.01, "eval/rule/accuracy": 0.5}, make_record())
    header, first, step_1, step_2, second = said(console)
    assert header.split() == "step held-out reward false pos. KL tokens s/step ETA".split()
    # Exact truth where it is known, and a share of nothing is no figure.
    assert first.split() == ["0", "25.0%", "-", "-", "-", "17.2", "-", "-"]
    assert step_1.startswith("step 1/4  reward 0.500") and step_2.startswith("step 2/4  ")
    assert second.split()[:6] == ["2", "50.0%", "0.750", "-", "1.0e-02", "-"]
    ends = [len(line) for line in (header, first, second)]
    assert len(set(ends)) == 1, "columns are aligned"


def test_samples_are_shown_at_step_1_and_when_due(console):
    display = RunDisplay(make_settings(**{"log.show_samples": 2}), [], 0, decode_tokens, console)
    for step in range(1, 5):
        display.show_step(step, {}, make_record())
    assert [line.split(":")[0] for line in said(console) if line.startswith("a response")] == [
        f"a response of step {step}" for step in (1, 2, 4)
    ]


def test_a_sample_is_short_and_harmless():
    text = describe_sample(3, make_record("first\n\x1b[2Jsecond " + "x" * 1000), decode_tokens)
    assert text.splitlines()[:4] == [
        "a response of step 3: correct by the rule, reward 0.750, advantage +1.00, cut off at the limit of tokens",
        "  prompt     prompt of 1 2",
        "  reference  4",
        "  response   first",
    ]
    assert text.splitlines()[4].startswith(r"             \x1b[2Jsecond xxx")
    assert text.endswith("x ... (417 more characters)") and "\x1b" not in text
    many = describe_sample(3, make_record("\n".join(map(str, range(20)))), decode_tokens)
    assert many.endswith(" 11 ... (24 more characters)"), "lines 12 to 19, each with its line break"


# --- the end ---


ROWS = [
    {"step": 0.0, "eval/oracle/accuracy": 0.25, "eval/rm/false_positive_rate": math.nan},
    {"step": 1.0, "reward/mean": 0.375, "policy/kl": 0.0},
    {"step": 2.0, "reward/mean": 0.5, "policy/kl": 0.02, "eval/oracle/accuracy": 0.75},
]


def test_the_summary_says_what_changed_where_things_are_and_what_is_next(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--config=tiny"])
    text = closing_summary.describe_end(make_settings(), "runs/my run", ROWS, 185.0)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "runs/my run: 4 steps complete; this command took 3 min 05 s"
    assert "held-out accuracy 25.0% 75.0% steps 0 and 2" in lines
    assert "reward 0.375 0.500 steps 1 and 2" in lines
    assert not any(line.startswith(("false positives", "tokens")) for line in lines), "not measured twice"
    assert any(line.startswith("supervised.jsonl ") for line in lines)
    assert "python launch/report.py 'runs/my run'" in lines
    assert any(line.startswith("python launch/export.py --run_dir='runs/my run'") for line in lines)
    monkeypatch.setattr(sys, "argv", ["cooper-jax train", "--config=tiny"])
    text = closing_summary.describe_end(make_settings(), "runs/a", ROWS[1:2], 1.0)
    assert "cooper-jax report runs/a" in text and "start" not in text.splitlines()[1]


@pytest.mark.parametrize(
    "argv, hint",
    [
        (
            ["launch/train.py", "--config=tiny", "--config.name=a b"],
            "to resume: python launch/train.py --config=tiny '--config.name=a b'",
        ),
        (["cooper-jax train", "--config=tiny"], "to resume: cooper-jax train --config=tiny"),
        (["mine.py"], "the same call resumes"),
    ],
)
def test_how_to_resume(monkeypatch, argv, hint):
    monkeypatch.setattr(sys, "argv", argv)
    assert closing_summary.describe_resumption() == hint
