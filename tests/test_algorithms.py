"""Each policy-gradient algorithm against scalar computations with torch: advantages, loss and gradient."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cooper_jax.configs import base, tiny
from cooper_jax.policy import losses
from cooper_jax.policy.advantages import BASELINES, STDS, normalise_rewards
from cooper_jax.policy.algorithms import ALGORITHMS
from cooper_jax.policy.surrogates import SURROGATES
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer.policy_stages import find_excluded
from cooper_jax.trainer.rewards import penalise_length
from cooper_jax.trainer.run_settings import RunSettings
from cooper_jax.trainer.step_metrics import measure_flat_groups
from cooper_jax.types import Completion

GROUP, LONGEST, VOCABULARY = 4, 9, 6
# Of baselines and standard deviations; a step's mean is not combined with a group's deviation.
COMBINATIONS = [
    (baseline, std) for baseline in BASELINES for std in STDS if (baseline, std) != ("batch_mean", "group")
]


def section(algorithm: str = "", **changes):
    c = base.get_config().policy
    c.update({field.removeprefix("policy."): value for field, value in ALGORITHMS.get(algorithm, {}).items()})
    c.update(dict(algorithm=algorithm, kl_clamp=0.0) | changes)
    return losses.PolicyConfig.from_config(c)


# --- advantages --------------------------------------------------------------------------------------


def expected_advantages(rewards, cfg):
    """One reward at a time, in plain Python."""
    groups = [rewards[i : i + GROUP] for i in range(0, len(rewards), GROUP)]
    finite = [r for r in rewards if math.isfinite(r)]
    centred = []
    for group in groups:
        known = [r for r in group if math.isfinite(r)]
        for i, r in enumerate(group):
            others = [x for j, x in enumerate(group) if j != i and math.isfinite(x)]
            pool = {"group_mean": known, "leave_one_out": others, "batch_mean": finite}[cfg.baseline]
            is_flat = len(set(finite if cfg.baseline == "batch_mean" else known)) < 2
            centred.append(0.0 if is_flat or not math.isfinite(r) else r - statistics.fmean(pool))
    counted = [c for c, r in zip(centred, rewards, strict=True) if math.isfinite(r)]
    result = []
    for i, c in enumerate(centred):
        known = [r for r in groups[i // GROUP] if math.isfinite(r)]
        scale = 1.0
        if cfg.std == "group":
            scale = max(statistics.stdev(known) if len(known) > 1 else 0.0, cfg.std_floor) + cfg.std_eps
        elif cfg.std == "batch":
            deviation = math.sqrt(sum(x * x for x in counted) / (len(counted) - 1))
            scale = max(deviation, cfg.std_floor) + cfg.std_eps
        result.append(c / scale)
    return result


@pytest.mark.parametrize(("baseline", "std"), COMBINATIONS)
def test_advantages_equal_those_of_single_rewards(baseline, std):
    """Groups that differ, with equal rewards, with rewards that are not finite, with a single finite one."""
    nan, inf = math.nan, math.inf
    rewards = [
        *(0.1, 0.9, 0.4, 1.0),
        *(0.3, 0.3, 0.3, 0.3),
        *(nan, 1.0, 0.0, 0.5),
        *(inf, nan, 0.7, -inf),
        *(0.0, 0.0, 1.0, 1.0),
    ]
    cfg = section(baseline=baseline, std=std)
    got, flat = normalise_rewards(
        jnp.asarray(rewards, jnp.float32),
        GROUP,
        baseline=baseline,
        std=std,
        eps=cfg.std_eps,
        floor=cfg.std_floor,
    )
    expected = np.array(expected_advantages(rewards, cfg))
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)
    assert float(flat) == pytest.approx(2 / 5)


def test_leave_one_out_by_hand():
    options = dict(std="none", eps=0.0, floor=0.0)
    got, _ = normalise_rewards(jnp.array([1.0, 0, 0, 1, 0, 0]), 3, baseline="leave_one_out", **options)
    np.testing.assert_allclose(got, [1, -0.5, -0.5] * 2, rtol=1e-6)
    # A response that is alone, or alone with a reward, has nothing to be compared with.
    alone, flat = normalise_rewards(jnp.array([0.3, 0.8]), 1, baseline="leave_one_out", **options)
    assert alone.tolist() == [0, 0] and float(flat) == 1


def test_a_step_of_equal_rewards_has_no_signal():
    for baseline, std in COMBINATIONS:
        got, flat = normalise_rewards(jnp.full(8, 0.1), 4, baseline=baseline, std=std, eps=0.0, floor=0.0)
        assert got.tolist() == [0.0] * 8 and float(flat) == 1.0, (baseline, std)
    with pytest.raises(ValueError, match="policy.baseline is 'mean'; it is one of group_mean, leave_one_out"):
        normalise_rewards(jnp.zeros(4), 2, baseline="mean", std="none", eps=0.0, floor=0.0)
    with pytest.raises(ValueError, match="use std batch or none"):
        normalise_rewards(jnp.zeros(4), 2, baseline="batch_mean", std="group", eps=0.0, floor=0.0)


# --- losses ------------------------------------------------------------------------------------------


def make_batch(seed=5):
    """Responses of 0 to LONGEST tokens under three policies, in groups one of which has equal rewards."""
    rng = np.random.default_rng(seed)
    lengths = np.array([9, 1, 0, 5, 3, 9, 7, 2, 4, 6, 8, 0])
    rows = len(lengths)
    mask = np.arange(LONGEST) < lengths[:, None]
    logits = rng.normal(size=(rows, LONGEST, VOCABULARY))
    targets = rng.integers(0, VOCABULARY, (rows, LONGEST))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    current = np.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    # Ratios of responses near 1 as well as ratios of tokens far from it, so that every range clips some.
    old = current + rng.normal(size=(rows, LONGEST)) * np.where(np.arange(rows) % 3, 1.2, 2e-4)[:, None]
    ref = current + rng.normal(size=(rows, LONGEST)) * 0.3
    rewards = rng.random(rows)
    rewards[4:8] = 0.5
    return mask, logits, targets, old, ref, rewards


def expected_loss(torch, logits, targets, old, ref, advantages, mask, cfg):
    """The loss of `cfg` by the papers' formulas, one token at a time, over torch scalars in double precision."""
    logprobs = torch.log_softmax(logits, dim=-1)
    used = [n for n in range(len(mask)) if mask[n].any()]
    total = torch.zeros((), dtype=torch.float64)
    low, high = 1 - cfg.clip_low, 1 + cfg.clip_high
    for n in used:
        tokens = [int(t) for t in np.flatnonzero(mask[n])]
        own = [logprobs[n, t, int(targets[n, t])] for t in tokens]
        logs = [lp - old[n, t] for lp, t in zip(own, tokens, strict=True)]
        length, advantage = len(tokens), float(advantages[n])

        def surrogate(ratio, advantage=advantage):
            pessimistic = torch.minimum(ratio * advantage, torch.clamp(ratio, low, high) * advantage)
            if cfg.dual_clip and advantage < 0:
                pessimistic = torch.maximum(pessimistic, torch.tensor(cfg.dual_clip * advantage))
            return pessimistic

        of_response = torch.exp(sum(logs) / length)
        for t, lp, log in zip(tokens, own, logs, strict=True):
            if cfg.loss == "clip":
                objective = surrogate(torch.exp(log))
            elif cfg.loss == "gspo":
                objective = surrogate(of_response)
            elif cfg.loss == "gspo_token":
                objective = surrogate(of_response.detach() * torch.exp(lp - lp.detach()))
            else:
                objective = torch.clamp(torch.exp(log), low, high).detach() * advantage * lp
            d = lp - ref[n, t]
            divergence = {"k2": d * d / 2, "k3": torch.exp(-d) - 1 + d}[cfg.kl_estimator]
            weight = {
                "token_mean": 1 / mask.sum(),
                "sequence_mean": 1 / (length * len(used)),
                "sequence_sum": 1 / (LONGEST * len(used)),
            }[cfg.aggregation]
            entropy = -(logprobs[n, t].exp() * logprobs[n, t]).sum()
            total = total + weight * (cfg.kl_coef * divergence - objective - cfg.entropy_coef * entropy)
    return total


@pytest.mark.parametrize(
    ("algorithm", "entropy_coef"), [*((name, 0.0) for name in ALGORITHMS), ("dr_grpo", 0.3)]
)
def test_loss_and_gradient_equal_torch(algorithm, entropy_coef):
    torch = pytest.importorskip("torch")
    cfg = section(algorithm, entropy_coef=entropy_coef)
    mask, logits, targets, old, ref, rewards = make_batch()
    if cfg.mask_truncated:
        mask = mask & ~(mask.sum(1) == LONGEST)[:, None]

    options = dict(baseline=cfg.baseline, std=cfg.std, eps=cfg.std_eps, floor=cfg.std_floor)
    advantages, _ = normalise_rewards(jnp.asarray(rewards, jnp.float32), GROUP, **options)
    theirs = torch.tensor(logits, requires_grad=True)
    expected = expected_loss(
        torch, theirs, targets, old, ref, expected_advantages(rewards.tolist(), cfg), mask, cfg
    )
    expected.backward()

    def ours(logits):
        distribution = jax.nn.log_softmax(logits)
        logprobs = jnp.take_along_axis(distribution, jnp.asarray(targets)[..., None], -1)[..., 0]
        entropy = -(jnp.exp(distribution) * distribution).sum(-1)
        old_, ref_, m = jnp.asarray(old, jnp.float32), jnp.asarray(ref, jnp.float32), jnp.asarray(mask)
        weights = losses.token_weights(m, cfg.aggregation, LONGEST)
        return losses.policy_loss(logprobs, old_, ref_, advantages, weights, m, cfg, entropy=entropy)

    (loss, sums), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(loss, expected.item(), atol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), atol=1e-5)
    # Each bound was reached, so that a loss without it would differ.
    assert float(sums["clip_high"]) > 0 and np.abs(theirs.grad.numpy()).max() > 1e-3
    assert (float(sums["clip_low"]) > 0) == (cfg.clip_low < 1) and (float(sums["dual_clip"]) > 0) == bool(
        cfg.dual_clip
    )


@pytest.mark.parametrize("name", SURROGATES)
def test_the_first_update_of_a_step_is_reinforce(name):
    """With a ratio of 1 every loss has the gradient -A of each token's log-probability, weighted."""
    mask = jnp.asarray(np.arange(5) < np.array([[3], [5], [0]]))
    logprobs = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5)) - 2, jnp.float32)
    advantages = jnp.array([2.0, -1.0, np.nan])
    weights = losses.token_weights(mask, "sequence_mean", 5)
    cfg = section(loss=name, kl_coef=0.0, dual_clip=0.0)
    gradient = jax.grad(
        lambda lp: losses.policy_loss(lp, jax.lax.stop_gradient(lp), lp, advantages, weights, mask, cfg)[0]
    )(logprobs)
    expected = np.where(mask, -np.nan_to_num(np.asarray(advantages))[:, None] * np.asarray(weights), 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("name", SURROGATES)
def test_values_outside_the_mask_have_no_effect(name):
    rng = np.random.default_rng(4)
    mask = jnp.asarray(np.arange(5)[None] < np.array([3, 0, 5])[:, None])
    arrays = [jnp.asarray(rng.normal(size=(3, 5)), jnp.float32) for _ in range(3)]
    cfg, weights = section(loss=name, dual_clip=0.0), losses.token_weights(mask, "token_mean", 5)

    def run(arrays, advantages):
        def loss(lp):
            return losses.policy_loss(lp, *arrays[1:], advantages, weights, mask, cfg)

        (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(arrays[0])
        return [np.asarray(x).tobytes() for x in (value, gradient, *sums.values())]

    clean = run(arrays, jnp.array([1.0, 0.5, -2.0]))
    for garbage in (np.nan, np.inf, -1e30):
        dirty = [jnp.where(mask, x, garbage) for x in arrays]
        assert run(dirty, jnp.array([1.0, garbage, -2.0])) == clean


# --- settings ----------------------------------------------------------------------------------------


def test_truncated_responses_are_excluded_with_mask_truncated_alone():
    completions = [Completion("a"), Completion("b", True), Completion("c")]
    zeros, ones = np.zeros(3), np.ones(3)
    found = find_excluded(section(mask_truncated=True), completions, zeros, ones, 3)
    assert found.tolist() == [False, True, False]
    assert not find_excluded(section(), completions, zeros, zeros, 3).any()


def test_flat_groups_are_excluded_with_mask_flat_groups_alone():
    completions = [Completion("a", True), *[Completion("b")] * 5]
    # Deviations 0, .014 and .71: the second group counts as flat with flat_std alone.
    rewards, advantages = np.array([1, 1, 0.52, 0.5, 0, 1.0]), np.array([0, 0, 1, 0, -1, 0.0])
    for settings, expected in (
        (dict(mask_flat_groups=True), [1, 1, 0, 0, 0, 0]),
        (dict(mask_flat_groups=True, mask_truncated=True), [1, 1, 0, 0, 0, 0]),
        (dict(mask_flat_groups=True, flat_std=0.05), [1, 1, 1, 1, 0, 0]),
        (dict(mask_truncated=True, flat_std=0.05), [1, 0, 0, 0, 0, 0]),
    ):
        found = find_excluded(section(**settings), completions, rewards, advantages, 2)
        assert found.tolist() == [bool(x) for x in expected]


def test_long_responses_lose_up_to_one():
    completions = [Completion("x", tokens=n) for n in (1, 12, 14, 16)]
    np.testing.assert_allclose(penalise_length(completions, 16, 4), [0, 0, -0.5, -1])
    cfg = tiny.get_config()
    cfg.reward.overlong_tokens = cfg.rollout.max_new_tokens + 1
    with pytest.raises(
        SetupError, match="reward.overlong_tokens=33: it is at most rollout.max_new_tokens=32"
    ):
        RunSettings.from_config(cfg)


def test_algorithms_set_the_same_fields_and_released_is_the_default():
    assert len({frozenset(values) for values in ALGORITHMS.values()}) == 1
    policy = base.get_config().policy
    for field, value in ALGORITHMS["released"].items():
        assert policy[field.removeprefix("policy.")] == value, field


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss="ppo"), "policy.loss='ppo': it is one of clip, gspo, gspo_token, cispo"),
        (dict(baseline="mean"), "policy.baseline='mean': it is one of group_mean, leave_one_out, batch_mean"),
        (dict(std="global"), "policy.std='global': it is one of group, batch, none"),
        (
            dict(baseline="batch_mean"),
            "groups of equal rewards have no standard deviation; set .*std=batch or none",
        ),
        (dict(loss="cispo"), "policy.dual_clip=3.0: cispo clips its weights .* --config.policy.dual_clip=0"),
    ],
)
def test_settings_that_fit_no_algorithm_are_refused(changes, message):
    with pytest.raises(SetupError, match=message):
        section(**changes)


def test_the_share_of_advantages_from_nearly_equal_rewards():
    # Deviations .01 and .5: both groups have the same advantages when divided by their own.
    assert measure_flat_groups(np.array([0.5]), np.zeros(1), 1) == 0.0
    rewards = np.array([0.50, 0.51, 0.49, 1.0, 0.5, 0.0])
    advantages = np.array([0.0, 1, -1, 1, 0, -1])
    assert measure_flat_groups(rewards, advantages, 3) == 0.5
    # A masked response has no reward.
    assert (
        measure_flat_groups(np.array([np.nan, 0.5, 0.51, 1, 0, 0]), np.array([0, -1, 1, 3.0, 0, 0]), 3) == 0.4
    )
