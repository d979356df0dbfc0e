"""The setup of a run: what is refused, and the problems that it is evaluated on."""

import functools
import json
import sys

import pytest

from cooper_jax.rule.verifier import RuleVerifier
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import setup


def test_a_rule_verifier_that_does_not_start_is_a_setup_error(build, monkeypatch):
    """Before anything is trained, and not at the first verdict of step 1."""
    broken = functools.partial(RuleVerifier, command=(sys.executable, "-c", "raise SystemExit('no math')"))
    monkeypatch.setattr(setup, "RuleVerifier", broken)
    with pytest.raises(SetupError, match="^rule: the rule verifier does not work: .*no math"):
        with build():
            pass


def test_a_reward_input_without_room_for_a_response_is_a_setup_error(build):
    with pytest.raises(SetupError, match=r"reward\.max_tokens=96: .*rollout\.max_new_tokens=90"):
        with build(**{"rollout.max_new_tokens": 90, "reward.max_tokens": 96}):
            pass


def test_all_missing_files_are_reported_at_once(build, tmp_path):
    """Data, policy, reward model and a local assistant: each error names its field, and nothing is loaded."""
    wrong = {"data.train": "train.jsonl", "data.eval": "eval.jsonl", "policy.weights": "policy",
             "reward.weights": "reward", "assistant.weights": "assistant"}  # fmt: skip
    changes = {field: str(tmp_path / "absent" / name) for field, name in wrong.items()}
    with pytest.raises(SetupError) as raised:
        with build(**changes, **{"data.format": "auto", "assistant.kind": "local"}):
            pass
    messages = raised.value.messages
    assert len(messages) == len(wrong)
    for (field, name), message in zip(wrong.items(), messages, strict=True):
        assert field in message and str(tmp_path / "absent" / name) in message, message


def test_the_periodic_evaluation_samples_a_sorted_file(build, tmp_path):
    lines = [json.dumps({"question": f"how many {i} ?", "answer": str(i)}) for i in range(20)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:8]))
    (tmp_path / "eval.jsonl").write_text("\n".join(lines))
    files = {f"data.{name}": str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
    changes = {"data.format": "auto", "eval.problems": 5, "reward.arm": "rule", "pairs.negatives": ("swap",)}
    with build(**files, **changes, **{"data.max_prompt_tokens": 64}) as (components, _):
        assert [p.reference for p in components.held_out] == ["1", "2", "7", "11", "18"]
