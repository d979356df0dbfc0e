"""Problems of the training file that are held out for the periodic evaluation (data.eval_from_train)."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cooper_jax.configs import base, qwen_1p5b
from cooper_jax.data import contamination, seen_questions
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.run_problems import load_problems
from cooper_jax.trainer.run_settings import RunSettings


def write_problems(path, count: int, repeated: int = 0):
    """GSM8K's format; the last `repeated` rows ask the first questions again."""
    asked = [*range(count), *range(repeated)]
    rows = [{"question": f"How much is {i} and 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def a_config(path: str, held_out: int, seed: int = 0):
    cfg = base.get_config()
    cfg.data.train, cfg.data.eval_from_train, cfg.seed = path, held_out, seed
    return cfg


def test_they_are_not_trained_on_and_are_the_same_for_all_seeds(tmp_path):
    path = write_problems(tmp_path / "train.jsonl", 100, repeated=100)
    loaded = load_problems(RunSettings.from_config(a_config(path, 10)))
    train, held_out = loaded.train, loaded.held_out
    asked = {p.question for p in held_out}
    assert len(held_out) == 10 and not asked & {p.question for p in train}
    assert len(train) == 200 - 2 * len(asked)  # every question stands in the file twice
    assert load_problems(RunSettings.from_config(a_config(path, 10, seed=1))).held_out == held_out
    # They come from all of the file, not from its beginning.
    assert {p.question for p in held_out} != {p.question for p in (train + held_out)[:10]}


def test_a_file_for_evaluation_goes_first(tmp_path):
    cfg = a_config(write_problems(tmp_path / "train.jsonl", 100), 10)
    cfg.data.eval = write_problems(tmp_path / "eval.jsonl", 7)
    loaded = load_problems(RunSettings.from_config(cfg))
    train, held_out = loaded.train, loaded.held_out
    assert (len(train), len(held_out)) == (100, 7)
    cfg.data.eval, cfg.eval.every = "", 0
    loaded = load_problems(RunSettings.from_config(cfg))
    assert (len(loaded.train), len(loaded.held_out)) == (100, 0)  # nobody would evaluate on them


def test_some_must_be_left_to_train_on(tmp_path):
    path = write_problems(tmp_path / "train.jsonl", 5)
    with pytest.raises(
        SetupError, match=r"eval_from_train=5: the training file has 5 problems.*data\.eval=FILE"
    ):
        load_problems(RunSettings.from_config(a_config(path, 5)))


def test_they_are_kept_though_the_reward_model_has_seen_them(tmp_path):
    """With data.eval they are left out; of the training file nothing might be left."""
    cfg = a_config(write_problems(tmp_path / "train.jsonl", 20), 5)
    loaded = load_problems(RunSettings.from_config(cfg))
    train, held_out = loaded.train, loaded.held_out
    seen = seen_questions.record_questions([p.question for p in (*train, *held_out)], "train.jsonl")
    assert contamination.drop_seen(cfg, held_out, seen) == held_out
    assert "5 of 5 held-out questions (kept, as data.eval_from_train" in contamination.describe_overlap(
        cfg, seen, held_out, train, None
    )
    cfg.data.eval = cfg.data.train
    other = [dataclasses.replace(held_out[0], question="How much is 1,000 less 1?")]
    assert contamination.drop_seen(cfg, [*held_out, *other], seen) == other


def test_the_main_run_has_a_curve_and_keeps_its_checkpoints():
    cfg = qwen_1p5b.get_config()
    assert cfg.data.eval_from_train > 0 and cfg.eval.every == cfg.checkpoint.every == 20
    assert cfg.checkpoint.keep == 0 and cfg.steps % cfg.checkpoint.every == 0
