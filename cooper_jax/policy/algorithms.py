"""Named policy-gradient algorithms: `--config.policy.algorithm=NAME` in place of many flags.

An algorithm sets the fields of the config's `policy` section below, as a recipe sets those of the reward model's
update (trainer/recipes.py): it overrides the config file, and flags override it.  docs/algorithms.md has their
equations, their papers, and what of each paper is not set by these fields.

Learning rates, batch sizes and numbers of updates stay those of the config.
"""

from __future__ import annotations

from typing import Any

# The fields that every algorithm sets, with the values of the authors' released code.
_RELEASED: dict[str, Any] = {
    "policy.loss": "clip",
    "policy.aggregation": "token_mean",
    "policy.clip_low": 0.2,
    "policy.clip_high": 0.2,
    "policy.dual_clip": 3.0,
    "policy.baseline": "group_mean",
    "policy.std": "group",
    "policy.kl_coef": 0.001,
    "policy.kl_estimator": "k3",
    "policy.mask_truncated": False,
    "policy.mask_flat_groups": False,
}

# Without a KL term and without a dual clip, as in most of the papers.
_PLAIN = _RELEASED | {"policy.kl_coef": 0.0, "policy.dual_clip": 0.0}

ALGORITHMS: dict[str, dict[str, Any]] = {
    # Cooper's policy update as released (arXiv 2508.05613): GRPO with a mean over tokens and a dual clip.
    "released": _RELEASED,
    # DeepSeekMath, arXiv 2402.03300: eq. 3; the KL weight of its section 4.2.
    "grpo": _PLAIN | {"policy.aggregation": "sequence_mean", "policy.kl_coef": 0.04},
    # arXiv 2503.20783: neither the length nor the deviation of a group changes its weight.
    "dr_grpo": _PLAIN | {"policy.aggregation": "sequence_sum", "policy.std": "none"},
    # arXiv 2503.14476: the asymmetric clip, the mean over tokens, no loss on truncated responses.  Groups of equal
    # rewards are left out of the loss; its dynamic sampling, which replaces them, is --config.data.refill_prompts,
    # and its penalty on long responses --config.reward.overlong_tokens.
    "dapo": _PLAIN
    | {"policy.clip_high": 0.28, "policy.mask_truncated": True, "policy.mask_flat_groups": True},
    # arXiv 2507.18071: one ratio for each response; the clip range of its section 5.
    "gspo": _PLAIN
    | {
        "policy.loss": "gspo",
        "policy.aggregation": "sequence_mean",
        "policy.clip_low": 3e-4,
        "policy.clip_high": 4e-4,
    },
    "gspo_token": _PLAIN
    | {
        "policy.loss": "gspo_token",
        "policy.aggregation": "sequence_mean",
        "policy.clip_low": 3e-4,
        "policy.clip_high": 4e-4,
    },
    # arXiv 2506.13585: clipped importance weights, without a lower bound.  The paper does not give the upper one;
    # 5 is that of arXiv 2510.13786.
    "cispo": _PLAIN | {"policy.loss": "cispo", "policy.clip_low": 1.0, "policy.clip_high": 4.0},
    # arXiv 2402.14740: REINFORCE with the mean of the other responses as the baseline.  (With one update per step
    # the ratio is 1 and the clip without effect.)
    "rloo": _PLAIN
    | {"policy.aggregation": "sequence_sum", "policy.baseline": "leave_one_out", "policy.std": "none"},
    # arXiv 2501.03262: rewards normalised over the step; the second, for several responses to a prompt, subtracts
    # the group's mean first.
    "reinforce_pp": _PLAIN | {"policy.baseline": "batch_mean", "policy.std": "batch"},
    "reinforce_pp_baseline": _PLAIN
    | {"policy.std": "batch", "policy.kl_coef": 0.001, "policy.kl_estimator": "k2"},
}
