"""Named settings of the reward model's update: `--config.reward.recipe=NAME` in place of many flags.

A recipe overrides the config file's values of the fields below, and command-line flags override the recipe.
`launch/common.py` applies it before the run starts, so a run's config.json contains the values that were used
as well as the recipe's name.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from cooper_jax.configs import base
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


def apply_recipe(cfg: ConfigDict, explicit: Collection[str]) -> None:
    """Set the recipe's values in cfg, except those of the `explicit` fields.

    explicit: dotted names of the fields that were set on the command line.

    Raises SetupError for a recipe that is not in RECIPES.
    """
    name = cfg.reward.recipe
    if not name:
        return
    if name not in RECIPES:
        raise SetupError(
            f"reward.recipe is {name!r}; it is one of {', '.join(RECIPES)}, or empty: --config.reward.recipe="
            f"{next(iter(RECIPES))}"
        )
    values = {field: value for field, value in RECIPES[name].items() if field not in explicit}
    cfg.update_from_flattened_dict(values)


def find_contradictions(cfg: ConfigDict, explicit: Collection[str]) -> list[str]:
    """Write a message for each field that differs from its default and that the recipe would overwrite.

    explicit: dotted names of the fields whose values take precedence over the recipe.
    """
    values, defaults = flatten_config(cfg), flatten_config(base.get_config())
    messages = []
    for field, value in RECIPES.get(cfg.reward.recipe, {}).items():
        if field not in explicit and values[field] not in (value, defaults[field]):
            messages.append(
                f"{field}={values[field]!r}: the recipe {cfg.reward.recipe!r} sets {value!r}: give the field among "
                "the overrides, or leave reward.recipe empty"
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
