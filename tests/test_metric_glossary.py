"""The glossary of metrics: it has every name that runs write, and no name that none of them writes."""

import re
from pathlib import Path

import jax
import pytest
import tiny_steps
from tiny_reward_training import run_config, write_place
from tiny_runs import metrics

from cooper_jax.reward_training import rm_loop
from cooper_jax.runtime.metric_glossary import (
    REFUSAL_REASONS,
    REWARD_TRAINING_METRICS,
    RUN_METRICS,
    TRACKER_FAILURES,
    describe_metric,
    find_entry,
)
from cooper_jax.trainer import train_loop

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = [entry for section in RUN_METRICS.values() for entry in section]

# A function that has nothing to say, and one that fails for every second prompt.
FUNCTIONS = """
calls = []

def silent(completions, **columns):
    return [None] * len(completions)

def flaky(completions, **columns):
    calls.append(1)
    return [1.0] * len(completions) if len(calls) % 2 else [1.0]
"""
EVERY_STEP = {"steps": 2, "eval.every": 1, "checkpoint.every": 1, "log.samples_every": 0}
# Runs that write all metrics together: what each has that the others lack.
RUNS = {
    "rule": {
        "reward.arm": "rule",
        "policy.packing": "on",
        "reward.overlong_tokens": 2,
        "data.refill_prompts": 6,
    },
    "functions": {"reward.arm": "model", "reward.functions": "rule,{path}:silent,{path}:flaky"},
    "cooper": tiny_steps.ALL_TERMS
    | {
        "hacking_anchor": 2,
        "log.pair_motion": True,
        "log.giveaway_every": 1,
        "eval.greedy": True,
        "eval.reward_rows": 8,
    },
    "exact": {"reward.arm": "rule", "exact": True},
    "ahead": {"reward.arm": "rule", "rollout.ahead": 1, "mesh.rollout": "1x1x1", "mesh.data": 1},
}
written: dict[str, set[str]] = {}  # run -> names, of the runs so far


def write_metrics(run: str, path: Path, monkeypatch) -> set[str]:
    """The names of the metrics that a run of RUNS writes."""
    if run not in written:
        devices = jax.devices()[: 2 if run == "ahead" else 1]
        monkeypatch.setattr(jax, "devices", lambda *_: devices)
        (path / "functions.py").write_text(FUNCTIONS)
        changes = {
            name: value.format(path=path / "functions.py") if isinstance(value, str) else value
            for name, value in RUNS[run].items()
        }
        cfg = tiny_steps.config(**EVERY_STEP | {"run_dir": str(path / "run")} | changes)
        train_loop.train(cfg.lock())
        written[run] = {name for row in metrics(path / "run") for name in row} - {"step"}
    return written[run]


# The other runs add few names.
DEFAULT_RUNS = ("rule", "cooper")


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [run if run in DEFAULT_RUNS else pytest.param(run, marks=pytest.mark.slow) for run in RUNS]
)
def test_every_metric_of_a_run_is_described(run, tmp_path, monkeypatch):
    names = write_metrics(run, tmp_path, monkeypatch)
    assert len(names) > 30
    assert [name for name in sorted(names) if find_entry(name) is None] == []
    # reward/NAME describes any name, so a metric without an entry of its own would pass as a function's.
    functions = sorted(name for name in names if find_entry(name) in ("reward/NAME", "reward/NAME/REASON"))
    expected = [
        "reward/flaky",
        "reward/flaky/wrong_length",
        "reward/rule",
        "reward/silent",
        "reward/silent/none",
    ]
    assert functions == (expected if run == "functions" else [])
    reasons = [n.removeprefix("pairs/refused_") for n in names if n.startswith("pairs/refused_")]
    assert set(reasons) <= set(REFUSAL_REASONS)


@pytest.mark.slow
def test_every_entry_is_of_a_metric_that_some_run_writes(tmp_path, monkeypatch):
    found = set()
    for run in RUNS:
        path = tmp_path / run
        path.mkdir()
        with monkeypatch.context() as patch:
            found |= {find_entry(name) for name in write_metrics(run, path, patch)}
    # tests/test_trackers.py has runs whose trackers fail.
    assert sorted(set(ENTRIES) - found) == [TRACKER_FAILURES]


@pytest.mark.slow
def test_metrics_of_a_reward_models_training_are_described(tmp_path, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    cfg = run_config(write_place(tmp_path), tmp_path / "run", train_rm__epochs=1)
    rm_loop.train_reward_model(cfg.lock())
    names = {name for row in metrics(tmp_path / "run") for name in row} - {"step"}
    assert any(name.startswith("eval/odd/") for name in names)
    found = {find_entry(name, REWARD_TRAINING_METRICS) for name in names} | {TRACKER_FAILURES}
    assert found == {entry for section in REWARD_TRAINING_METRICS.values() for entry in section}


@pytest.mark.parametrize(
    "name, entry",
    [
        ("rule/accuracy", "rule/accuracy"),
        ("eval/rule/accuracy", "rule/accuracy"),
        ("eval/greedy/rule/accuracy", "rule/accuracy"),
        ("eval/by_source/gsm8k/rm/mean", "rm/mean"),
        ("eval/greedy/response/habit", "eval/response/habit"),
        ("oracle/accuracy_words", "oracle/accuracy_SUBJECT"),
        ("pairs/refused_giveaway_note", "pairs/refused_REASON"),
        ("reward/format_reward/timeout", "reward/NAME/REASON"),
        ("rule/acuracy", None),
        ("eval/nothing", None),
    ],
)
def test_names_are_found_with_their_prefixes(name, entry):
    assert find_entry(name) == entry
    if entry is None:
        with pytest.raises(KeyError):
            describe_metric(name)
    else:
        assert describe_metric(name) in [
            section[entry] for section in RUN_METRICS.values() if entry in section
        ]


def test_an_entry_stands_once():
    assert len(ENTRIES) == len(set(ENTRIES))


def test_reasons_for_refused_pairs_are_those_of_the_code():
    """Each is a text in the code that refuses; giveaways are named by their kind alone."""
    files = [*(ROOT / "cooper_jax/reward/pairs").glob("*.py"), ROOT / "cooper_jax/reward/assistants.py"]
    literals = set(re.findall(r'"([a-z_ ]+)"', "\n".join(file.read_text() for file in files)))
    for reason in REFUSAL_REASONS:
        if reason != "assistant_WHY":
            assert reason.removeprefix("giveaway_") in literals, reason
    refused = set(re.findall(r'refus(?:al|ed) = "(\w+)"', "\n".join(file.read_text() for file in files)))
    assert refused and refused <= set(REFUSAL_REASONS)
