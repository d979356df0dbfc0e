"""Training with top-k, top-p and min-p: the loss is that of the distribution that the rollout sampled from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from test_sampling import MODES, distribution, logits_of, sampler, uniforms_of
from tiny_models import one_device
from tiny_rollouts import PROMPTS, TINY, params_of, sampled, spec_of
from tiny_steps import AlwaysRight, config, make_builder, take_step

from cooper_jax.data import packing
from cooper_jax.kernels import head
from cooper_jax.policy import grpo
from cooper_jax.settings.setup_errors import SetupError
from cooper_jax.trainer import policy_stages, setup

FILTERS = {
    "top_p": dict(top_p=0.7),
    "all": dict(top_k=9, top_p=0.9, min_p=0.05, temperature=0.8),
}


# --- the sampler's threshold -----------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret", "triton_interpret"])
@pytest.mark.parametrize("mode", ["top_k", "top_p", "min_p", "all"])
def test_the_threshold_separates_the_kept_tokens_from_the_others(mode, implementation):
    logits = logits_of(3, 8, 1000)
    drawn = sampler(implementation=implementation, **MODES[mode])(logits, uniforms_of(4, 8))
    for row, threshold in zip(logits, np.asarray(drawn.threshold), strict=True):
        kept = distribution(row, **MODES[mode]) > 0
        assert 0 < kept.sum() < 1000
        # Halfway: rounding by less than half of the gap changes no decision.
        assert threshold == pytest.approx((row[kept].min() + row[~kept].max()) / 2, abs=1e-6)
        np.testing.assert_array_equal(row > threshold, kept)


def test_without_a_filter_there_is_no_threshold_and_where_all_are_kept_it_is_minus_infinity():
    logits, uniforms = logits_of(3, 2, 300), uniforms_of(4, 2)
    assert sampler(**MODES["temperature"])(logits, uniforms).threshold is None
    threshold = sampler(temperature=1.0, top_k=300, top_p=1.0)(logits, uniforms).threshold
    np.testing.assert_array_equal(threshold, [-np.inf] * 2)


@pytest.mark.parametrize("shards", [2, 4])
def test_the_threshold_is_the_same_on_shards_of_the_vocabulary(shards):
    logits, uniforms = logits_of(5, 4, 1024), uniforms_of(6, 4)
    mesh = Mesh(np.array(jax.devices()[:shards]), ("tensor",))
    body = sampler(axis_name="tensor", **MODES["all"])
    specs = PartitionSpec(None, "tensor"), PartitionSpec()
    sharded = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    want = sampler(**MODES["all"])(logits, uniforms)
    np.testing.assert_array_equal(jax.jit(sharded)(logits, uniforms).threshold, want.threshold)


# --- the learner's log-probabilities -----------------------------------------------------------------------


def head_inputs(rows=6, width=8, vocabulary=700):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(rows, width)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(vocabulary, width)), jnp.float32)
    logits = np.asarray(hidden) @ np.asarray(weights).T
    thresholds = np.sort(logits, axis=1)[:, -20] - 1e-3  # keeps 20 entries
    thresholds[-1] = -np.inf
    # The last targets but one is outside the kept entries.
    targets = np.argsort(logits, axis=1)[:, -7].astype(np.int32)
    targets[-2] = logits[-2].argmin()
    return hidden, weights, jnp.asarray(targets), jnp.asarray(thresholds, jnp.float32)


def plain_logprobs(hidden, weights, targets, thresholds, temperature, vocab_size):
    """The same by masking all logits: log-probabilities and entropies f32[N]."""
    logits = jnp.matmul(hidden, weights.T, precision="highest")
    index = jnp.arange(weights.shape[0])[None, :]
    kept = ((logits >= thresholds[:, None]) & (index < vocab_size)) | (index == targets[:, None])
    logs = jax.nn.log_softmax(jnp.where(kept, logits / temperature, -1e30), axis=1)
    entropy = -jnp.sum(jnp.where(kept, jnp.exp(logs) * logs, 0.0), axis=1)
    return jnp.take_along_axis(logs, targets[:, None], axis=1)[:, 0], entropy


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("implementation", ["xla", "tpu_interpret"])
def test_values_and_gradients_equal_those_of_masked_logits(implementation, shards, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", 2**10)
    monkeypatch.setattr(head, "LARGE_CHUNK", 2**10)
    hidden, weights, targets, thresholds = head_inputs(vocabulary=2048)
    slopes = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6)), jnp.float32)
    options = dict(temperature=0.7, vocab_size=2000)

    def fused(hidden, weights, targets, thresholds):
        return head.head_logprobs(
            hidden, weights, targets, thresholds=thresholds, entropy_gradient=True,
            axis_name="tensor" if shards > 1 else None, implementation=implementation, **options,
        )  # fmt: skip

    if shards > 1:
        mesh = Mesh(np.array(jax.devices()[:shards]), ("tensor",))
        whole = PartitionSpec()
        specs = whole, PartitionSpec("tensor"), whole, whole
        fused = jax.shard_map(fused, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)

    def total(form, hidden, weights):
        logprobs, entropy = form(hidden, weights)
        return jnp.sum(slopes[0] * logprobs + slopes[1] * entropy)

    def of(hidden, weights):
        return fused(hidden, weights, targets, thresholds)

    def plain(hidden, weights):
        return plain_logprobs(hidden, weights, targets, thresholds, **options)

    for got, want in zip(jax.jit(of)(hidden, weights), plain(hidden, weights), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    grads, wanted = (
        jax.jit(jax.grad(lambda h, w, form=form: total(form, h, w), (0, 1)))(hidden, weights)
        for form in (of, plain)
    )
    for got, want in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name", FILTERS)
def test_a_rollouts_logprobs_equal_the_learners(name):
    """Through decoding and through the forward pass of the loss; without the thresholds they differ."""
    spec = spec_of(**FILTERS[name])
    batch = packing.pack_policy_batch(PROMPTS, sampled(spec), bucket=4)
    options = dict(temperature=spec.temperature, dtype=jnp.float32, remat=False, layout=one_device())

    def learners(thresholds):
        found, _ = grpo.response_logprobs(
            params_of(), TINY, batch.tokens, batch.valid, batch.response_mask.shape[1],
            thresholds=thresholds, **options,
        )  # fmt: skip
        return np.where(batch.response_mask, found, 0.0)

    np.testing.assert_allclose(learners(jnp.asarray(batch.thresholds)), batch.rollout_logprobs, atol=1e-5)
    assert np.abs(learners(None) - batch.rollout_logprobs).max() > 0.1


# --- a run -------------------------------------------------------------------------------------------------


@pytest.fixture
def build(monkeypatch, tmp_path):
    return make_builder(monkeypatch, tmp_path)


@pytest.mark.slow
def test_a_step_has_no_mismatch(build):
    """With fewer slots than responses, so that thresholds go through refills, and with refilled groups."""
    changes = {
        "reward.arm": "rule", "rollout.top_p": 0.8, "rollout.top_k": 40, "rollout.max_rows": 4,
        "policy.optimiser.warmup_steps": 0,
    }  # fmt: skip
    with build(devices=4, **changes) as (components, state):
        components = dataclasses.replace(components, rule=AlwaysRight())
        _, metrics, _ = take_step(components, state)
        assert metrics["policy/rollout_mismatch_max"] < 1e-5
        assert metrics["policy/entropy"] < np.log(40)


@pytest.mark.slow
def test_refilled_groups_keep_their_thresholds(build, monkeypatch):
    """Every group is flat until the budget is spent, so the kept rows come from several rollouts."""
    changes = {
        "reward.arm": "rule",
        "rollout.top_p": 0.8,
        "data.refill_prompts": 3,
        "data.synthetic_size": 32,
    }
    packed = []
    compute_logprobs = policy_stages.compute_logprobs

    def record(components, state, prompt_tokens, rollout):
        packed.append(rollout)
        return compute_logprobs(components, state, prompt_tokens, rollout)

    monkeypatch.setattr(policy_stages, "compute_logprobs", record)
    with build(**changes) as (components, state):
        components = dataclasses.replace(components, rule=AlwaysRight())
        _, metrics, _ = take_step(components, state)
    assert metrics["data/refill_prompts"] == 3
    assert packed[0].thresholds.shape == packed[0].tokens.shape
    assert metrics["policy/rollout_mismatch_max"] < 1e-5


@pytest.mark.parametrize(
    "changes", [{"policy.epochs": 2}, {"policy.minibatches": 2}, {"exact": True, "rollout.dtype": "float32"}]
)
def test_what_has_no_fixed_support_is_refused(changes):
    with pytest.raises(SetupError, match=r"rollout.top_k=0, rollout.top_p=0.9 and rollout.min_p=0.0"):
        setup.read_settings(config(**{"rollout.top_p": 0.9} | changes))
