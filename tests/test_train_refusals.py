"""Bad input to `python launch/train.py`: one clear message."""

import pytest
from tiny_runs import assert_refused


def test_misspelt_flag(tmp_path):
    assert_refused(tmp_path / "r", "error: --config.stepz: ", "did you mean --config.steps?", stepz=3)


def test_missing_config_file(tmp_path):
    assert_refused(tmp_path / "r", "error:", "nowhere.py", config="configs/nowhere.py")


@pytest.mark.slow
def test_missing_file(tmp_path):
    assert_refused(
        tmp_path / "r", "error:", "nowhere.jsonl", data__train="nowhere.jsonl", data__format="gsm8k"
    )


def test_malformed_row(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1 + 1?", "answer": "It is 2.\\n#### 2"}\n{"question": "2 + 2?"\n')
    assert_refused(tmp_path / "r", "error:", "bad.jsonl:2", data__train=bad, data__format="gsm8k")


@pytest.mark.slow
def test_untrained_head_is_refused(tmp_path):
    assert_refused(tmp_path / "r", "error:", "score head", "allow_untrained_head", supervised__reward_steps=0)


@pytest.mark.slow
def test_filtered_sampling_is_refused_with_several_updates_a_step(tmp_path):
    assert_refused(tmp_path / "r", "error:", "top_p", rollout__top_p=0.9, policy__epochs=2)
