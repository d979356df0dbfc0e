"""Recipes: what they set, what wins over them, and that a misspelt one is an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import environment

from cooper_jax.configs import base, tiny
from cooper_jax.settings import cross_checks
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import recipes
from cooper_jax.trainer.recipes import RECIPES
from cooper_jax.trainer.rewards import ARMS
from cooper_jax.trainer.run_settings import RunSettings

ROOT = Path(__file__).resolve().parents[1]


def get(cfg, name):
    for part in name.split("."):
        cfg = cfg[part]
    return cfg


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("arm", ARMS)
def test_every_recipe_makes_a_config_that_holds_together(name, arm):
    cfg = tiny.get_config().lock()
    cfg.reward.recipe, cfg.reward.arm = name, arm
    recipes.apply_presets(cfg, ())
    RunSettings.from_config(cfg)
    assert cfg.reward.recipe == name
    for field, value in RECIPES[name].items():
        assert get(cfg, field) == value, field


def test_recipes_set_the_same_fields():
    """So that nothing of one that a config file names is left under another."""
    assert len({frozenset(values) for values in RECIPES.values()}) == 1


def test_without_a_recipe_nothing_changes():
    cfg = base.get_config()
    before = cfg.to_json()
    recipes.apply_presets(cfg, ())
    assert cfg.to_json() == before
    cfg.reward.recipe = "released"  # the defaults are the authors' code
    recipes.apply_presets(cfg, ())
    cfg.reward.recipe = ""
    assert cfg.to_json() == before


def test_an_unknown_recipe_is_an_error():
    cfg = base.get_config()
    cfg.reward.recipe = "robsut"
    with pytest.raises(SetupError, match="'robsut'; it is one of released, sigmoid, robust"):
        recipes.apply_presets(cfg, ())


SAY = """
import sys, json
sys.path.insert(0, {root!r})
from absl import app
from cooper_jax.launch import common

def main(argv):
    with common.run_job("testing"):
        cfg = common.read_config()
        print(json.dumps([cfg.reward.to_dict(), cfg.pairs.to_dict()], default=str))

app.run(main, flags_parser=common.parse_flags)
"""


def flags(*given):
    """What launchers see of the tiny config under these flags."""
    command = [
        sys.executable,
        "-c",
        SAY.format(root=str(ROOT)),
        f"--config={ROOT / 'configs/tiny.py'}",
        *given,
    ]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_an_explicit_flag_wins():
    done = flags(
        "--config.reward.recipe=robust", "--config.reward.pair_bce=0.25", "--config.reward.warmup_updates=0",
        "--config.pairs.negatives=('own_answer','swap')",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    reward, pairs = json.loads(done.stdout)
    assert (reward["recipe"], reward["pair_bce"], reward["warmup_updates"]) == ("robust", 0.25, 0)
    assert reward["updates"] == RECIPES["robust"]["reward.updates"]
    assert pairs["negatives"] == ["own_answer", "swap"]
    done = flags("--config.reward.recipe=paper")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: reward.recipe is 'paper'")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pairs.negatives": ("assistant", "swop")}, "pairs.negatives=.*assistant, own_answer, swap"),
        ({"pairs.negatives": ("mined",)}, "pairs.negatives: 'mined' was removed: "),
        ({"pairs.negatives": ()}, "pairs.negatives="),
        ({"pairs.negatives": ("assistant", "swap"), "pairs.per_prompt": 1}, "--config.pairs.per_prompt=2"),
        ({"reward.pair_weight": 0.0}, "nothing to learn from"),
        ({"reward.pair_weight": -1.0}, "reward.pair_weight=-1.0: it must be at least 0"),
        ({"reward.rollout_bce": 1.0, "reward.rollout_rows": 0}, "needs rows"),
        ({"reward.replay": 8, "reward.replay_rows": 8}, "set all three"),
        ({"reward.rollout_bce": 1.0, "reward.replay_rows": 8}, "set all three"),
        ({"reward.updates": 0}, "reward.updates=0: it must be at least 1"),
        (
            {"reward.arm": "rule", "reward.answer_required": True, "reward.rule_or_model": True},
            "reward.rule_or_model and reward.answer_required",
        ),
        (
            {"reward.arm": "rule", "reward.rule_then_model": True},
            "reward.rule_then_model: the rule arm has no",
        ),
        ({"reward.arm": "rule", "reward.calibrated": True}, "reward.calibrated: the rule arm has no"),
        (
            {"reward.rule_or_model": True, "reward.rule_then_model": True},
            "reward.rule_or_model=True and reward.rule_then_model=True exclude each other",
        ),
        ({"reward.calibrated": True, "supervised.reward_steps": 1}, "supervised.reward_steps would start"),
        (
            {"reward.calibrated": True, "supervised.reward_steps": 0, "supervised.start_from": "runs/x"},
            "does not fit the reward model that supervised.start_from",
        ),
    ],
)
def test_updates_that_contradict_themselves(fields, message):
    cfg = tiny.get_config()
    cfg.update_from_flattened_dict(fields)
    with pytest.raises(SetupError, match=message):
        RunSettings.from_config(cfg)


def test_whether_the_assistant_is_asked():
    cfg = tiny.get_config()
    assert cross_checks.asks_assistant(cfg)
    for field, value in {
        "pairs.negatives": ("swap",),
        "reward.pair_weight": 0.0,
        "reward.arm": "model",
    }.items():
        cfg = tiny.get_config()
        cfg.update_from_flattened_dict({field: value})
        assert not cross_checks.asks_assistant(cfg), field


@pytest.mark.parametrize(
    "arm, recipe, fields, warned",
    [
        ("cooper", "", {}, True),
        ("cooper", "released", {}, True),
        ("cooper", "", {"reward.rollout_bce": 1.0}, False),  # a recipe of the user's own
        ("cooper", "sigmoid", {}, False),
        ("cooper", "robust", {}, False),
        ("model", "", {}, False),
        ("rule", "released", {}, False),
    ],
)
def test_a_run_with_the_released_update_is_told_of_robust(arm, recipe, fields, warned):
    cfg = base.get_config()
    cfg.reward.arm, cfg.reward.recipe = arm, recipe
    recipes.apply_presets(cfg, ())
    cfg.update_from_flattened_dict(fields)
    warning = recipes.warn_about_released_update(cfg)
    assert ("--config.reward.recipe=robust" in warning) is warned
    assert warning.count("\n") == 0
