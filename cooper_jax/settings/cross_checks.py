"""Checks of settings of different sections against each other, before anything is loaded.

The typed config of a section checks the settings of this section alone (typed_config.py).
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cooper_jax.settings.bounds import check_bounds
from cooper_jax.settings.renamed_flags import describe_removed_values
from cooper_jax.settings.secrets import check_secrets
from cooper_jax.settings.setup_errors import ErrorCollector

# The value of supervised.reward_from with which the reward model of start_from is not loaded.
OWN = "own"


def weighs_pairs(reward: ConfigDict) -> bool:
    """True if the loss of the reward model's update has a term on pairs.  reward: the config's section."""
    return bool(reward.pair_weight or reward.pair_bce)


def updates_reward_model(cfg: ConfigDict) -> bool:
    """True if a run updates its reward model, at its steps or in a warm-up before it is frozen."""
    return cfg.reward.arm == "cooper" or (cfg.reward.arm == "model" and cfg.reward.warmup_updates > 0)


def asks_assistant(cfg: ConfigDict) -> bool:
    """True if an assistant writes negatives for a run's pairs."""
    return updates_reward_model(cfg) and weighs_pairs(cfg.reward) and "assistant" in cfg.pairs.negatives


def check_fields(cfg: ConfigDict) -> None:
    """Raise SetupError with every field that is outside its bounds or may hold a secret.

    Every job calls this for its whole config, since a job stores the sections that it does not read, too.
    """
    errors = ErrorCollector()
    for check in (check_bounds, check_secrets):
        with errors.collect("config"):
            check(cfg)
    errors.raise_if_any()


def check_cross_sections(cfg: ConfigDict) -> None:
    """Raise SetupError with every setting that contradicts a setting of another section.

    trainer/run_settings.py calls this and the checks of all typed configs.
    """
    # All errors are collected, so that one start of a run shows them all.
    errors = ErrorCollector()
    with errors.collect("config"):
        check_fields(cfg)
    errors.require(
        cfg.reward.overlong_tokens <= cfg.rollout.max_new_tokens,
        f"reward.overlong_tokens={cfg.reward.overlong_tokens}: it is at most rollout.max_new_tokens="
        f"{cfg.rollout.max_new_tokens}",
    )
    errors.require(
        cfg.policy.kl_coef > 0 or not cfg.mesh.reference,
        f"mesh.reference={cfg.mesh.reference!r}: with policy.kl_coef=0 there is no reference policy; leave it out",
    )
    errors.require(
        cfg.data.refill_prompts == 0 or cfg.policy.baseline != "batch_mean",
        f"data.refill_prompts={cfg.data.refill_prompts}: with policy.baseline=batch_mean a group of equal rewards "
        "has advantages, too, so there is nothing to replace; leave one of them out",
    )
    errors.require(
        not (cfg.exact and cfg.policy.packing == "on"),
        "exact=True with policy.packing=on: an exact rollout repeats the learner's forward pass on rows of one "
        "response each; leave --config.policy.packing at auto",
    )
    _check_training_sampling(cfg, errors)
    _check_rollout_ahead(cfg, errors)
    _check_models(cfg, errors)
    _check_adapters(cfg, errors)
    _check_reward_updates(cfg, errors)
    _check_hacking_guard(cfg, errors)
    errors.raise_if_any()


def _check_training_sampling(cfg: ConfigDict, errors: ErrorCollector) -> None:
    """Check that rollouts are sampled from the distribution that the policy's loss evaluates."""
    rollout = cfg.rollout
    is_filtered = _is_filtered(rollout)
    filters = (
        f"rollout.top_k={rollout.top_k}, rollout.top_p={rollout.top_p} and rollout.min_p={rollout.min_p}"
    )
    # The loss renormalises over the tokens that the filters kept.  After an update others are the most likely ones,
    # and the rollout's threshold does not choose them.
    updates = cfg.policy.epochs * cfg.policy.minibatches
    errors.require(
        not is_filtered or updates == 1,
        f"{filters}: the tokens that they keep are known for one update per step, and there are {updates}; set "
        "policy.epochs=1 and policy.minibatches=1, or top_k=0, top_p=1.0 and min_p=0.0",
    )
    errors.require(
        not (is_filtered and cfg.exact),
        f"exact=True with {filters}: an exact rollout samples from the whole vocabulary; leave one of them out",
    )
    # A response's advantage is its distance from the others of its group, or of its step.
    errors.require(
        rollout.group_size != 1 or cfg.policy.baseline == "batch_mean",
        f"rollout.group_size={rollout.group_size}: with policy.baseline={cfg.policy.baseline} a response alone has "
        "no advantage; set it to 2 or more, or --config.policy.baseline=batch_mean",
    )
    # Greedy responses of one prompt are all equal, so that all advantages would be 0.  RolloutConfig refuses
    # temperatures below 0.
    errors.require(
        rollout.temperature != 0,
        f"rollout.temperature={rollout.temperature}: training samples, so it must be above 0",
    )


def _is_filtered(rollout: ConfigDict) -> bool:
    """True if responses are sampled from a part of the tokens.  rollout: the config's section."""
    return rollout.top_k != 0 or rollout.top_p != 1.0 or rollout.min_p != 0.0


def _check_rollout_ahead(cfg: ConfigDict, errors: ErrorCollector) -> None:
    """Check that rollouts one step ahead have devices of their own, and a loss that can correct their weights."""
    ahead = f"rollout.ahead={cfg.rollout.ahead}"
    errors.require(
        cfg.rollout.ahead == 0 or bool(cfg.mesh.rollout),
        f"{ahead}: the next step is sampled on devices of its own while a step trains; give their mesh, data x "
        "fsdp x tensor, as in --config.mesh.rollout=1x4x1",
    )
    errors.require(
        not cfg.mesh.rollout or cfg.rollout.ahead > 0,
        f"mesh.rollout={cfg.mesh.rollout!r} with {ahead}: these devices would be idle while a step trains; set "
        "--config.rollout.ahead=1, or leave it empty",
    )
    errors.require(
        cfg.rollout.ahead == 0 or not cfg.exact,
        f"exact=True with {ahead}: an exact rollout samples with the weights that the learner has; leave one of "
        "them out",
    )
    rollout = cfg.rollout
    errors.require(
        rollout.ahead == 0 or not _is_filtered(rollout),
        f"{ahead} with top_k={rollout.top_k}, top_p={rollout.top_p} and min_p={rollout.min_p}: the tokens that "
        "older weights kept are not those that the learner's keep; leave one of them out",
    )


def _check_models(cfg: ConfigDict, errors: ErrorCollector) -> None:
    """Check that each model that the run's arm uses has weights, and that no other model has devices."""
    # The rule arm has no reward model, so its weights may be empty.
    for name in ("policy", "reward"):
        used = name == "policy" or cfg.reward.arm != "rule"
        errors.require(
            bool(cfg[name].weights) or not used,
            f"{name}.weights is empty: give --config.{name}.weights=DIR, a hub id or a .gguf file",
        )

    # A supervised phase, or another run's, trains the reward model after the calibration was fitted.
    trained_before = _list_reward_phases(cfg)
    errors.require(
        not (cfg.reward.calibrated and trained_before),
        f"reward.calibrated=True: the calibration beside reward.weights does not fit the reward model that "
        f"supervised.{' and supervised.'.join(trained_before)} would start from; leave one of them out",
    )

    # A model with random weights cannot follow the request for a wrong solution.
    errors.require(
        not asks_assistant(cfg)
        or cfg.assistant.kind != "local"
        or cfg.assistant.weights not in ("", "random"),
        f"assistant.weights={cfg.assistant.weights!r}: a local assistant needs trained weights",
    )

    # A shorter limit would cut the rewrites of long positives, and mask their pairs.
    limit, longest = cfg.assistant.max_new_tokens, cfg.rollout.max_new_tokens
    errors.require(
        not asks_assistant(cfg) or cfg.assistant.kind == "corrupt" or limit == 0 or limit >= longest,
        f"assistant.max_new_tokens={limit} cuts the rewrites of responses of up to {longest} tokens "
        f"(rollout.max_new_tokens): raise it, or set 0 for the positive's number of words + 500",
    )

    # Devices given to a model that the run does not load would be idle.
    errors.require(
        not cfg.mesh.reward or cfg.reward.arm != "rule",
        f"mesh.reward={cfg.mesh.reward!r}: the rule arm has no reward model; leave it empty",
    )
    errors.require(
        not cfg.mesh.assistant or (cfg.assistant.kind == "local" and updates_reward_model(cfg)),
        f"mesh.assistant={cfg.mesh.assistant!r}: only the cooper arm with assistant.kind=local has an "
        "assistant on devices",
    )


def _list_reward_phases(cfg: ConfigDict) -> list[str]:
    """List the fields of the section `supervised` that put another reward model in the place of reward.weights."""
    fields = [name for name in ("reward_steps", "start_from", "reward_from") if cfg.supervised[name]]
    if cfg.supervised.reward_from == OWN:
        return [name for name in fields if name == "reward_steps"]
    return fields


def _check_adapters(cfg: ConfigDict, errors: ErrorCollector) -> None:
    """Check that the base of adapters is what `weights` names, since checkpoints do not store it."""
    phases = {"policy": [n for n in ("policy_steps", "start_from") if cfg.supervised[n]]}
    phases["reward"] = _list_reward_phases(cfg)
    for name, fields in phases.items():
        if cfg[name].lora.rank == 0 or (name == "reward" and cfg.reward.arm == "rule"):
            continue
        for field in fields:
            errors.messages.append(
                f"{name}.lora.rank={cfg[name].lora.rank} with supervised.{field}={cfg.supervised[field]}: adapters "
                f"are trained beside the weights that {name}.weights names; train those in a run without adapters, "
                f"export them (launch/export.py), and give the directory as --config.{name}.weights",
            )
    errors.require(
        cfg.policy.lora.rank == 0 or not cfg.mesh.reference,
        f"mesh.reference={cfg.mesh.reference!r}: with policy.lora the reference is the policy's own base, on the "
        "policy's devices; leave it out",
    )


def _check_reward_updates(cfg: ConfigDict, errors: ErrorCollector) -> None:
    """Check that the reward model's loss has a term, and that each source of negatives is used."""
    # Removed values are refused in every arm: a copied command should fail in all of them alike.
    errors.messages += describe_removed_values("pairs.negatives", cfg.pairs.negatives)
    if not updates_reward_model(cfg):
        return
    negatives = tuple(cfg.pairs.negatives)
    errors.require(
        weighs_pairs(cfg.reward) or bool(cfg.reward.rollout_bce),
        "reward.pair_weight=0 and no other term: the reward model's update has nothing to learn from; set "
        "--config.reward.rollout_bce, or freeze the reward model: --config.reward.arm=model "
        "--config.reward.warmup_updates=0",
    )
    # The pairs of a prompt take the sources in turn, so a prompt with fewer pairs never reaches the last one.
    errors.require(
        not weighs_pairs(cfg.reward) or len(negatives) <= cfg.pairs.per_prompt,
        f"pairs.negatives={negatives}: with pairs.per_prompt={cfg.pairs.per_prompt} the last is never used; "
        f"set --config.pairs.per_prompt={len(negatives)}",
    )


def _check_hacking_guard(cfg: ConfigDict, errors: ErrorCollector) -> None:
    """Check that the guard's action can do something in this run."""
    action, arm = cfg.hacking_guard, cfg.reward.arm
    acts = action in ("freeze", "rollback", "fallback", "stop")
    errors.require(
        arm != "rule" or not acts,
        f"hacking_guard={action}: the rule arm has no reward model that could be hacked, so there is never an "
        "alarm; leave it out",
    )
    errors.require(
        arm != "model" or action != "freeze",
        "hacking_guard=freeze with reward.arm=model: with a frozen policy and a frozen reward model nothing "
        "changes any more; take stop or fallback",
    )
    by_rule = action in ("rollback", "fallback")
    errors.require(
        not cfg.reward.functions or not by_rule,
        f"hacking_guard={action} with reward.functions={cfg.reward.functions!r}: the rule's verdict would replace "
        "your functions; take stop or warn, or add rule to them",
    )
    errors.require(
        cfg.checkpoint.keep != 1 or action != "rollback",
        "hacking_guard=rollback with checkpoint.keep=1: a run that is stopped after an alarm would have no "
        "checkpoint before it; set --config.checkpoint.keep=2 or more",
    )
