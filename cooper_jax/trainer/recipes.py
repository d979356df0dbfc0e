"""Named settings in place of many flags: `--config.reward.recipe=NAME` and `--config.policy.algorithm=NAME`.

A recipe is of the reward model's update (RECIPES below), an algorithm of the policy's (policy/algorithms.py).
Each overrides the config file's values of its fields, and command-line flags override it.  `launch/common.py`
applies both before the run starts, so a run's config.json contains the values that were used as well as their
names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.configs import base
from cooper_jax.policy.algorithms import ALGORITHMS
from cooper_jax.settings.config_fields import flatten_config
from cooper_jax.settings.setup_errors import SetupError

# The update of the paper (arXiv 2508.05613), without the choice of the pair loss.
_PAPER = {
    # Loss: the contrastive term alone.
    "reward.pair_weight": 1.0,
    "reward.pair_bce": 0.0,
    "reward.rollout_bce": 0.0,
    # Updates: one per step, from step 1 on.
    "reward.updates": 1,
    "reward.warmup_updates": 0,
    # No labelled rows from earlier steps.
    "reward.replay": 0,
    "reward.replay_rows": 0,
    # Pairs: one per prompt, whose negative the assistant writes.
    "pairs.per_prompt": 1,
    "pairs.negatives": ("assistant",),
}

RECIPES: dict[str, dict[str, Any]] = {
    # The contrastive loss on logits, as in the authors' released code.
    "released": _PAPER | {"reward.pair_loss": "logit"},
    # The contrastive loss on rewards, which are the sigmoids of the logits.
    "sigmoid": _PAPER | {"reward.pair_loss": "sigmoid"},
    # Not in the paper.  A contrastive loss fixes only the difference of a pair's rewards; the cross-entropy
    # term fixes their level as well.  In two of three pairs the members differ in the reference alone, so the
    # reward model must read it.
    "robust": _PAPER
    | {
        "reward.pair_loss": "sigmoid",
        "reward.pair_bce": 2.0,
        "reward.warmup_updates": 20,
        "reward.updates": 2,
        "pairs.per_prompt": 3,
        "pairs.negatives": ("assistant", "swap", "own_answer"),
    },
}


# Field that names a preset -> name -> the fields that the preset sets.  No field is in two of the tables.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {"reward.recipe": RECIPES, "policy.algorithm": ALGORITHMS}


def apply_presets(cfg: ConfigDict, explicit: Collection[str]) -> None:
    """Set the values of the config's recipe and algorithm in cfg, except those of the `explicit` fields.

    explicit: dotted names of the fields that were set on the command line.

    Raises SetupError for a name that is in none of the tables.
    """
    values = list_preset_values(flatten_config(cfg))
    cfg.update_from_flattened_dict({field: value for field, value in values.items() if field not in explicit})


def list_preset_values(names: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that presets set, by dotted name.

    names: maps the keys of PRESETS to names of presets; a key that is missing or "" sets nothing.

    Raises SetupError for a name that is in none of the tables.
    """
    values: dict[str, Any] = {}
    for field, table in PRESETS.items():
        name = names.get(field, "")
        if name and name not in table:
            raise SetupError(
                f"{field} is {name!r}; it is one of {', '.join(table)}, or empty: --config.{field}="
                f"{next(iter(table))}"
            )
        values |= table.get(name, {})
    return values


def list_preset_fields() -> set[str]:
    """The dotted names of all fields that a preset may set."""
    return {field for table in PRESETS.values() for values in table.values() for field in values}


def find_contradictions(cfg: ConfigDict, explicit: Collection[str]) -> list[str]:
    """Write a message for each field that differs from its default and that a preset would overwrite.

    explicit: dotted names of the fields whose values take precedence over the presets.
    """
    values, defaults = flatten_config(cfg), flatten_config(base.get_config())
    messages = []
    for preset, table in PRESETS.items():
        for field, value in table.get(values[preset], {}).items():
            if field not in explicit and values[field] not in (value, defaults[field]):
                messages.append(
                    f"{field}={values[field]!r}: {preset}={values[preset]!r} sets {value!r}: give the field among "
                    f"the overrides, or leave {preset} empty"
                )
    return messages


def warn_about_released_update(cfg: ConfigDict) -> str:
    """A warning for runs that update the reward model as the authors' released code does; else "".

    In the small-scale study of docs/results.md the policy hacks such a reward model on 10 of 10 seeds.
    """
    if cfg.reward.arm != "cooper" or cfg.reward.recipe not in ("", "released"):
        return ""

    # Without a recipe, a cross-entropy term is the user's own protection.
    if cfg.reward.pair_bce or cfg.reward.rollout_bce:
        return ""
    return (
        f"warning: reward.recipe={cfg.reward.recipe or '(empty)'}: the reward model is updated as in the "
        "authors' released code. In the small-scale study the policy hacks it on 10 of 10 seeds "
        "(docs/results.md), and never with --config.reward.recipe=robust; evaluate often in any case"
    )
