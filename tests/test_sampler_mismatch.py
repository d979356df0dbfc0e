"""The difference between the sampler's and the learner's log-probabilities: its measure, and its correction."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cooper_jax.configs import base
from cooper_jax.policy import losses
from cooper_jax.policy.sampler_mismatch import (
    CORRECTIONS,
    choose_correction,
    correction_weights,
    measure_mismatch,
    reduce_mismatch,
)
from cooper_jax.settings.setup_errors import SetupError

LOG2 = float(np.log(2))


def test_weights_by_hand():
    """Ratios 1/4, 2, 1 and 8 in the first row; 1/2 and 1/2 in the second, whose padding may be anything."""
    difference = jnp.array([[-2 * LOG2, LOG2, 0, 3 * LOG2], [-LOG2, -LOG2, jnp.nan, jnp.inf], [jnp.nan] * 4])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)

    def weights(correction, cap=3.0):
        return np.asarray(correction_weights(difference, mask, correction, cap))

    np.testing.assert_allclose(weights("none"), mask)
    np.testing.assert_allclose(weights("token"), [[0.25, 2, 1, 3], [0.5, 0.5, 0, 0], [0] * 4], rtol=1e-6)
    np.testing.assert_allclose(weights("token_mask"), [[0, 1, 1, 0], [1, 1, 0, 0], [0] * 4])
    # The products are 4 and 1/4.
    np.testing.assert_allclose(weights("sequence"), [[3] * 4, [0.25, 0.25, 0, 0], [0] * 4], rtol=1e-6)
    np.testing.assert_allclose(weights("sequence", 5.0), [[4] * 4, [0.25, 0.25, 0, 0], [0] * 4], rtol=1e-6)
    assert not weights("sequence_mask").any() and weights("sequence_mask", 4.5).sum() == 6
    with pytest.raises(ValueError, match="policy.correction is 'both'; it is one of none, token"):
        weights("both")


def test_sequence_weights_make_the_gradient_unbiased():
    """All responses of two tokens over three symbols, weighted by the sampler's probability of each.

    The expected gradient of the corrected loss under the sampler is that of the loss under the policy.
    """
    rng = np.random.default_rng(0)
    policy, sampler = (jax.nn.log_softmax(jnp.asarray(rng.normal(size=(2, 3)))) for _ in range(2))
    symbols = jnp.array([(a, b) for a in range(3) for b in range(3)])  # [9, 2]
    rewards = jnp.asarray(rng.normal(size=9))
    mask = jnp.ones((9, 2), bool)

    def of_tokens(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), symbols.T, axis=1).T  # [9, 2]

    def expected_loss(logits, drawn_from, correction):
        logprobs = of_tokens(logits)
        weights = correction_weights(of_tokens(policy) - of_tokens(sampler), mask, correction, 1e6)
        per_response = -(weights * rewards[:, None] * logprobs).sum(axis=1)
        return (jnp.exp(of_tokens(drawn_from).sum(axis=1)) * per_response).sum()

    gradient = jax.grad(expected_loss)
    wanted = gradient(policy, policy, "none")
    np.testing.assert_allclose(gradient(policy, sampler, "sequence"), wanted, atol=1e-6)
    assert jnp.abs(gradient(policy, sampler, "none") - wanted).max() > 0.01


def test_quantiles_and_extremes_against_numpy():
    rng = np.random.default_rng(1)
    mask = np.arange(40) < rng.integers(0, 41, 64)[:, None]
    difference = rng.normal(size=(64, 40)) * 10.0 ** rng.uniform(-5, 0, (64, 40))
    dirty = jnp.asarray(np.where(mask, difference, np.nan), jnp.float32)

    # Two microbatches, of different sizes.
    parts = [measure_mismatch(dirty[rows], jnp.asarray(mask[rows])) for rows in (slice(0, 24), slice(24, 64))]
    sums = {name: jnp.stack([part[name] for part in parts]) for name in parts[0]}
    got = {k: float(v) for k, v in reduce_mismatch(sums, jnp.float32(mask.sum())).items()}
    assert sums == {}
    sizes = np.abs(difference[mask])
    assert got["rollout_mismatch"] == pytest.approx(sizes.mean(), rel=1e-5)
    assert got["rollout_mismatch_max"] == pytest.approx(sizes.max(), rel=1e-6)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        exact = np.quantile(sizes, share, method="inverted_cdf")
        assert exact <= got[f"rollout_mismatch_{name}"] <= 1.34 * exact
    totals = np.where(mask, difference, 0).sum(axis=1)
    assert got["rollout_ratio_min"] == pytest.approx(np.exp(totals.min()), rel=1e-4)
    assert got["rollout_ratio_max"] == pytest.approx(np.exp(totals.max()), rel=1e-4)


def test_equal_log_probabilities_have_a_mismatch_of_exactly_zero():
    sums = measure_mismatch(jnp.zeros((3, 5)), jnp.ones((3, 5), bool))
    got = reduce_mismatch({name: value[None] for name, value in sums.items()}, jnp.float32(15))
    assert {k: float(v) for k, v in got.items() if "ratio" not in k} == dict.fromkeys(
        ("rollout_mismatch", "rollout_mismatch_max", "rollout_mismatch_p50", "rollout_mismatch_p99"), 0.0
    )
    assert float(got["rollout_ratio_min"]) == float(got["rollout_ratio_max"]) == 1.0


def test_the_correction_weighs_the_policy_gradient_and_not_the_kl_term():
    cfg = base.get_config().policy
    cfg.kl_coef, cfg.dual_clip = 0.5, 0.0
    cfg = losses.PolicyConfig.from_config(cfg)
    rng = np.random.default_rng(2)
    logprobs, ref, correction = (jnp.asarray(rng.random((4, 3)), jnp.float32) for _ in range(3))
    mask, advantages = jnp.ones((4, 3), bool), jnp.arange(4.0)
    weights = losses.token_weights(mask, "token_mean", 3)

    def loss(lp, correction):
        return losses.policy_loss(
            lp, jax.lax.stop_gradient(lp), ref, advantages, weights, mask, cfg, correction
        )[0]

    corrected, plain = (jax.grad(loss)(logprobs, c) for c in (correction, None))
    np.testing.assert_allclose(plain - corrected, -(1 - correction) * advantages[:, None] / 12, atol=1e-6)


def test_auto_corrects_where_the_sampler_is_not_float32():
    assert choose_correction("auto", True) == "none" and choose_correction("auto", False) == "token"
    for setting in CORRECTIONS:
        assert choose_correction(setting, False) == setting


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(correction="tokens"), "policy.correction='tokens': it is one of auto, none, token, sequence"),
        (dict(correction_cap=1.0), "policy.correction_cap=1.0: it must be above 1"),
    ],
)
def test_corrections_that_do_not_exist_are_refused(changes, words):
    section = base.get_config().policy
    section.update(changes)
    with pytest.raises(SetupError, match=words):
        losses.PolicyConfig.from_config(section)
